"""Answers in the form of OpenAI's API: https://platform.openai.com/docs/api-reference. What is not named here is dropped."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from sage_core.errors import EngineError


class Usage(msgspec.Struct, frozen=True):
    """Tokens, as counted by the engine."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn. Can be sent back as part of the next conversation."""

    role: str
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """``finish_reason``: ``stop``, ``length``, ``tool_calls``."""

    message: ChatMessage
    index: int = 0
    finish_reason: str | None = None
    logprobs: Any = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """The answer to a chat."""

    choices: list[ChatChoice]
    id: str = ""
    created: int = 0
    model: str = ""
    object: str = "chat.completion"
    usage: Usage | None = None
    sources: list[str] = []
    """Documents that a pipeline answered from; of a plain engine, none."""

    @property
    def text(self) -> str:
        """What the first choice says."""
        return self.choices[0].message.content or "" if self.choices else ""


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """``finish_reason`` stands in the last one."""

    delta: Delta = Delta()
    index: int = 0
    finish_reason: str | None = None
    logprobs: Any = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """A piece of a streamed chat. ``usage``: of the last, where it was asked for; it has no choices."""

    choices: list[ChunkChoice]
    id: str = ""
    created: int = 0
    model: str = ""
    object: str = "chat.completion.chunk"
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What it adds to the first choice."""
        return self.choices[0].delta.content or "" if self.choices else ""


class CompletionChoice(msgspec.Struct, frozen=True):
    """``finish_reason``: ``stop``, ``length``."""

    text: str = ""
    index: int = 0
    finish_reason: str | None = None
    logprobs: Any = None


class Completion(msgspec.Struct, frozen=True):
    """The continuation of a text, or, streamed, a piece of it."""

    choices: list[CompletionChoice]
    id: str = ""
    created: int = 0
    model: str = ""
    object: str = "text_completion"
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """One vector, (d,) float32."""

    index: int
    embedding: NDArray[np.float32]
    object: str = "embedding"


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingList:
    """``vectors``: (n, d), in the order of the inputs."""

    vectors: NDArray[np.float32]
    model: str = ""
    usage: Usage = field(default_factory=Usage)
    object: str = "list"

    @property
    def data(self) -> list[Embedding]:
        """One item an input, as OpenAI has it."""
        return [Embedding(index, vector) for index, vector in enumerate(self.vectors)]


class Model(msgspec.Struct, frozen=True):
    """``kind``: ``llm`` or ``embedding``, where the server says."""

    id: str
    created: int = 0
    object: str = "model"
    owned_by: str = ""
    kind: str | None = None


class _Models(msgspec.Struct):
    data: list[Model]


class _Vector(msgspec.Struct):
    embedding: str | list[float]
    index: int = 0


class _Vectors(msgspec.Struct):
    data: list[_Vector]
    model: str = ""
    usage: Usage = msgspec.field(default_factory=Usage)


_chat = msgspec.json.Decoder(ChatCompletion)
_chat_chunk = msgspec.json.Decoder(ChatCompletionChunk)
_completion = msgspec.json.Decoder(Completion)
_models = msgspec.json.Decoder(_Models)
_vectors = msgspec.json.Decoder(_Vectors)

_T = TypeVar("_T")


def read_chat(body: bytes) -> ChatCompletion:
    """EngineError for anything else; so do the other readers."""
    return _read(_chat, body)


def read_chat_chunk(body: bytes) -> ChatCompletionChunk:
    return _read(_chat_chunk, body)


def read_completion(body: bytes) -> Completion:
    return _read(_completion, body)


def read_models(body: bytes) -> list[Model]:
    return _read(_models, body).data


def read_embeddings(body: bytes) -> EmbeddingList:
    """Vectors may be base64 of little-endian float32 or lists of numbers: some servers know only one of them."""
    reply = _read(_vectors, body)
    items = sorted(reply.data, key=lambda item: item.index)
    if [item.index for item in items] != list(range(len(items))):
        raise EngineError(f"the answer's {len(items)} vectors are not numbered from 0; the server is at fault")
    try:
        if all(isinstance(item.embedding, str) for item in items):
            flat = np.frombuffer(bytearray().join([base64.b64decode(item.embedding) for item in items]), "<f4")  # type: ignore[arg-type]
            vectors = flat.reshape(len(items), -1) if items else flat.reshape(0, 0)
        else:
            vectors = np.array([item.embedding for item in items], np.float32)
    except ValueError as error:
        raise EngineError(f"the answer's vectors cannot be read: {error}; the server is at fault") from error
    return EmbeddingList(vectors.astype(np.float32, copy=False), reply.model, reply.usage)


def _read(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(
            f"the answer is not OpenAI's: {error}; the server is at fault, or not what it was taken for"
        ) from error
