"""Bodies of requests: what a gateway has to know of them, and nothing it need not.

The structs name the fields that decide where a request goes and what it may cost; a wrong type or bound in one of these is
the client's error, told before any engine is asked. Everything else (sampling, tools, extensions of an engine) passes: the
body is forwarded as it came. Field names, types and bounds: OpenAI's API reference,
https://platform.openai.com/docs/api-reference (chat/create, completions/create, embeddings/create), where null means absent.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from sage_live import errors
from sage_live.errors import ApiError

INPUTS_MAX: Final = 2048
"""Texts, or arrays of tokens, in one embedding request: OpenAI's bound."""

_Model = Annotated[str, Meta(min_length=1, max_length=256, description="A name from /v1/models.")]
_Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Count = Annotated[int, Meta(ge=1, le=128)]
_Inputs = Annotated[list[str | _Token | Annotated[list[_Token], Meta(min_length=1)]], Meta(min_length=1)]


class StreamOptions(msgspec.Struct):
    """What a stream carries beside the text."""

    include_usage: bool | None = None


class Message(msgspec.Struct):
    """One turn. ``content`` is the engine's business: a text, parts, or null beside tool calls."""

    role: str
    content: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class ChatBody(msgspec.Struct):
    """``POST /v1/chat/completions``."""

    model: _Model
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    n: _Count | None = None
    user: str | None = None


class CompletionBody(msgspec.Struct):
    """``POST /v1/completions``. A list is of texts, of tokens, or of lists of tokens, never a mixture."""

    model: _Model
    prompt: str | _Inputs
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    n: _Count | None = None
    user: str | None = None


class EmbeddingBody(msgspec.Struct):
    """``POST /v1/embeddings``. A list is of texts, of tokens, or of lists of tokens, never a mixture."""

    model: _Model
    input: str | _Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _Tokens | None = None
    user: str | None = None

    def inputs(self) -> list[str | list[int]]:
        """What is to be embedded, one item per vector of the answer: an array of tokens is one input, not many."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]  # type: ignore[list-item]
        return self.input  # type: ignore[return-value]


Body: TypeAlias = ChatBody | CompletionBody | EmbeddingBody


# In Python `$` also matches before a newline at the end; what follows it here says no, in JavaScript's dialect too.
class EngineBody(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /v1/management/engines``: an engine to send work to from now on."""

    url: Annotated[str, Meta(pattern=r"^https?://[^\s/]+/?$(?!\n)", description="Its base URL, without /v1.")]
    model: _Model
    kind: Literal["llm", "embedding"] = "llm"
    adapter: str = "vllm"
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$(?!\n)")] | None = None  # made from the URL if absent
    tasks_max: Annotated[int, Meta(ge=1, le=65536)] | None = None  # requests it is given at once


class PolicyBody(msgspec.Struct, forbid_unknown_fields=True):
    """``PUT /v1/management/policy``."""

    name: Annotated[str, Meta(min_length=1, max_length=64, description="A name from `sage policy list`.")]


_DECODERS: Final[dict[type, msgspec.json.Decoder[Any]]] = {
    struct: msgspec.json.Decoder(struct) for struct in (ChatBody, CompletionBody, EmbeddingBody, EngineBody, PolicyBody)
}
_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<where>[^`]*)`)?$", re.DOTALL)
_MISSING: Final = re.compile(r"Object (?:missing required|contains unknown) field `(?P<field>[^`]*)`")


def decode_chat(body: bytes) -> ChatBody:
    """Raises ``ApiError`` 400."""
    chat: ChatBody = _decode(ChatBody, body)
    return chat


def decode_completion(body: bytes) -> CompletionBody:
    """Raises ``ApiError`` 400."""
    completion: CompletionBody = _decode(CompletionBody, body)
    _check_one_sort("prompt", completion.prompt, None)
    return completion


def decode_embedding(body: bytes) -> EmbeddingBody:
    """Raises ``ApiError`` 400."""
    embedding: EmbeddingBody = _decode(EmbeddingBody, body)
    _check_one_sort("input", embedding.input, INPUTS_MAX)
    return embedding


def decode_engine(body: bytes) -> EngineBody:
    """Raises ``ApiError`` 400."""
    engine: EngineBody = _decode(EngineBody, body)
    return engine


def decode_policy(body: bytes) -> PolicyBody:
    """Raises ``ApiError`` 400."""
    policy: PolicyBody = _decode(PolicyBody, body)
    return policy


def _decode(struct: type, body: bytes) -> Any:
    try:
        if not body.isascii():
            body.decode()  # msgspec looks at the encoding of what it decodes only, and most of a body it skips
        return _DECODERS[struct].decode(body)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise errors.bad_request(f"The body is not valid JSON: {reason}.", code="invalid_json") from None


def _refusal(error: str) -> ApiError:
    """msgspec's sentence, "... - at `$.messages[0].role`", as a message and the name of the field."""
    match = _AT.match(error)
    what, where = (match["what"], match["where"]) if match else (error, None)
    missing = _MISSING.match(what)
    param = ".".join(part for part in (where, missing and missing["field"]) if part)
    return errors.bad_request(f"{param or 'body'}: {what}.", param=param or None, code="invalid_value")


def _check_one_sort(param: str, value: str | list[Any], items_max: int | None) -> None:
    if isinstance(value, str):
        return
    sort = type(value[0])
    if not all(type(item) is sort for item in value):
        message = f"{param}: expected texts, tokens or arrays of tokens, got a mixture."
        raise errors.bad_request(message, param=param, code="invalid_value")
    if items_max is not None and sort is not int and len(value) > items_max:
        message = f"{param}: expected at most {items_max} inputs, got {len(value)}."
        raise errors.bad_request(message, param=param, code="invalid_value")
