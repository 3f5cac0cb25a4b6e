"""What clients send to an engine, as structs, and what an engine needs to know of it.

Fields are OpenAI's, and vLLM's where OpenAI has none (``ignore_eos``, ``min_tokens``, ``priority``). Unknown fields pass, as
they do in vLLM. Errors are :class:`sage_live.errors.ApiError` and name the field.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import msgspec

from sage_live.errors import bad_request
from sage_live.http.server import Request

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
TokenIds: TypeAlias = list[Natural]


class Part(msgspec.Struct):
    """A piece of a message. Pieces that are not text count for nothing."""

    type: str
    text: str = ""


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class GenerationBody(msgspec.Struct, kw_only=True):
    """What chat and completion requests have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    min_tokens: Natural = 0
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = 1
    seed: int | None = None
    priority: int = 0


class ChatBody(GenerationBody, kw_only=True):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[Any]
    echo: bool | None = False

    def __post_init__(self) -> None:
        if self.echo:
            raise ValueError("echo is not supported")

    def single_prompt(self) -> str | TokenIds:
        """The text or the token ids. Several prompts are refused: one request is one sequence here."""
        (prompt,) = inputs_of(self.prompt, "prompt", most=1)
        return prompt


class EmbeddingBody(msgspec.Struct, kw_only=True):
    input: str | list[Any]
    model: str | None = None
    encoding_format: str | None = "float"
    dimensions: Count | None = None

    def __post_init__(self) -> None:
        if self.encoding_format not in (None, "float", "base64"):
            raise ValueError(f"expected float or base64, got {self.encoding_format!r}")

    def inputs(self, most: int) -> list[str | TokenIds]:
        """The texts or token arrays, in order."""
        return inputs_of(self.input, "input", most)


class BodyDecoder:
    """Bytes to a struct; what is wrong with them is a 400 that names the field."""

    __slots__ = ("_decode",)

    def __init__(self, kind: type) -> None:
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(kind).decode

    def __call__(self, body: bytes) -> Any:
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            text, _, path = str(error).partition(" - at `$.")
            param = path.rstrip("`") or None
            raise bad_request(f"{param}: {text}" if param else text, param=param) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise bad_request(f"The body is not valid JSON: {error}") from None


def inputs_of(value: str | list[Any], field: str, most: int) -> list[str | TokenIds]:
    """OpenAI's four forms: a text, a list of texts, token ids, a list of lists of them."""
    inputs: list[Any]
    if isinstance(value, str) or (value and type(value[0]) is int):
        inputs = [value]
    else:
        inputs = value
    if not 1 <= len(inputs) <= most:
        expected = "one text" if most == 1 else f"1 to {most} texts"
        raise bad_request(f"{field}: expected {expected}, got {len(inputs)}", param=field)
    for item in inputs:
        if not item:
            raise bad_request(f"{field}: an input is empty", param=field)
    try:
        return msgspec.convert(inputs, list[str | TokenIds])
    except msgspec.ValidationError as error:
        raise bad_request(f"{field}: expected texts or token ids: {error}", param=field) from None


def utf8(prompt: str | TokenIds) -> bytes | TokenIds:
    """A text as bytes; token ids as they are."""
    return prompt.encode() if isinstance(prompt, str) else prompt


def chat_text(messages: list[Message]) -> bytes:
    """All that is said in a chat, in order: enough to tell prompts apart, and to see what they begin with alike."""
    pieces: list[str] = []
    for message in messages:
        pieces.append(message.role)
        if isinstance(message.content, str):
            pieces.append(message.content)
        elif message.content is not None:
            pieces += [part.text for part in message.content]
    return "\n".join(pieces).encode()


def stated_input_tokens(request: Request) -> int | None:
    """``x-sage-input-tokens``: the exact number, from a client that knows the tokenizer."""
    value = request.headers.get(b"x-sage-input-tokens")
    if value is None:
        return None
    if not (value.isdigit() and len(value) <= 10 and 1 <= int(value) < 2**31):
        raise bad_request(f"x-sage-input-tokens: expected a whole number from 1, got {value[:40]!a}")
    return int(value)


_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:+-]{1,128}")


def request_id(request: Request, number: int) -> bytes:
    """The client's ``x-request-id`` where it is plain, else one of our own."""
    given = request.headers.get(b"x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else b"%016x" % number
