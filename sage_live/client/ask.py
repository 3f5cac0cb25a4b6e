"""A request in the words of OpenAI's API: the same bytes for a gateway and for a control plane in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypedDict

import msgspec

from sage_live.client.answers import ChatMessage
from sage_live.gateway.headers import E2E, INPUT_TOKENS, PRIORITY, TENANT, TTFT, wishes

CHAT, COMPLETIONS, EMBEDDINGS, MODELS = "/chat/completions", "/completions", "/embeddings", "/models"

Kind: TypeAlias = Literal["llm", "embedding"]
"""What a model does."""

KIND_OF: Final[Mapping[str, Kind]] = {CHAT: "llm", COMPLETIONS: "llm", EMBEDDINGS: "embedding"}

Messages: TypeAlias = str | Sequence[Mapping[str, Any] | ChatMessage]
"""A conversation; a text alone is what the user says."""

Prompt: TypeAlias = str | Sequence[int]
"""A text, or its tokens."""

Inputs: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""One text or several, or their tokens."""

_encode = msgspec.json.Encoder().encode


class CallOptions(TypedDict, total=False):
    """What any call may say. The first five are for the control plane; a server of another kind ignores them.

    priority: 0 is interactive, larger is less urgent. ttft_s, e2e_s: objectives in seconds, else those of the request's
    class. input_tokens: length of the prompt, if it is known. timeout_s: of this call instead of the client's. extra_body:
    fields for the engine that are not named here.
    """

    tenant: str
    priority: int
    ttft_s: float
    e2e_s: float
    input_tokens: int
    timeout_s: float
    extra_body: Mapping[str, Any]


class GenerationOptions(CallOptions, total=False):
    """Fields of the body, as OpenAI documents them; the last four are vLLM's."""

    max_tokens: int
    temperature: float
    top_p: float
    n: int
    seed: int
    stop: str | Sequence[str]
    presence_penalty: float
    frequency_penalty: float
    logprobs: bool | int
    stream_options: Mapping[str, bool]
    user: str
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    response_format: Mapping[str, Any]
    top_k: int
    min_p: float
    min_tokens: int
    ignore_eos: bool


class EmbeddingOptions(CallOptions, total=False):
    """Fields of the body, as OpenAI documents them."""

    dimensions: int
    user: str


class Ask(NamedTuple):
    """``endpoint`` goes behind the base URL. An empty ``body`` is asked with GET."""

    endpoint: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    stream: bool = False
    timeout_s: float | None = None


def chat_ask(messages: Messages, model: str, stream: bool, options: GenerationOptions) -> Ask:
    """ApiError 400 for an option that no gateway would take."""
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return _ask(CHAT, {"model": model, "messages": said}, stream, options)


def completion_ask(prompt: Prompt, model: str, stream: bool, options: GenerationOptions) -> Ask:
    """ApiError 400 for an option that no gateway would take."""
    return _ask(COMPLETIONS, {"model": model, "prompt": prompt}, stream, options)


def embedding_ask(texts: Inputs, model: str, options: EmbeddingOptions) -> Ask:
    """Vectors come as base64, a third of what they are as decimals. ApiError as :func:`chat_ask`."""
    return _ask(EMBEDDINGS, {"model": model, "input": texts, "encoding_format": "base64"}, False, options)


def _ask(endpoint: str, body: dict[str, Any], stream: bool, options: CallOptions) -> Ask:
    fields: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    headers = []
    for header, key in ((TENANT, "tenant"), (PRIORITY, "priority"), (INPUT_TOKENS, "input_tokens")):
        if (value := fields.pop(key, None)) is not None:
            headers.append((header, str(value).encode()))
    for header, key in ((TTFT, "ttft_s"), (E2E, "e2e_s")):
        if (value := fields.pop(key, None)) is not None:
            headers.append((header, b"%r" % (value * 1000)))
    wishes(dict(headers))  # here, so that a wrong one is told alike whoever would have read it
    timeout_s = fields.pop("timeout_s", None)
    extra = fields.pop("extra_body", {})
    if stream:
        body["stream"] = True
    body |= fields
    body |= extra
    return Ask(endpoint, tuple(headers), _encode(body), stream, timeout_s)
