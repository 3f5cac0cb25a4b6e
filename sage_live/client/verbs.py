"""What a client can be asked, for callers that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Literal, Self, TypeVar, Unpack, overload

from sage_core.errors import ConfigError
from sage_live.client.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    EmbeddingList,
    Model,
    read_chat,
    read_chat_chunk,
    read_completion,
    read_embeddings,
    read_models,
)
from sage_live.client.ask import (
    MODELS,
    Ask,
    EmbeddingOptions,
    GenerationOptions,
    Inputs,
    Kind,
    Messages,
    Prompt,
    chat_ask,
    completion_ask,
    embedding_ask,
)
from sage_live.client.asking import Delivery
from sage_live.client.loop import Session

Chunk = TypeVar("Chunk")


def only_model(models: Sequence[Model], kind: Kind) -> str:
    """The model that a call of this kind means when it names none. ConfigError naming the choices.

    Not every server says what kind a model is of; those that do not might be of either.
    """
    fitting = [model.id for model in models if model.kind in (None, kind)]
    if len(fitting) != 1:
        names = ", ".join(sorted(fitting))
        why = (
            f"{len(fitting)} models could be meant; choose one of {names}" if fitting else f"no {kind} model is served"
        )
        raise ConfigError(f"model: {why}")
    return fitting[0]


class Stream(Generic[Chunk]):
    """Pieces of an answer as they come. Leaving the ``for`` loop, :meth:`close`, or letting go of it ends the request,
    up to the engine.

    What breaks a stream is raised by the step that meets it, after the pieces before it.
    """

    def __init__(self, session: Session, ask: Ask, read: Callable[[bytes], Chunk]) -> None:
        """Waits for the stream to begin: what a server refuses is raised here."""
        self._session = session  # which lasts as long as its streams
        self._read = read
        self._deliveries: SimpleQueue[Delivery] = SimpleQueue()
        self._events: list[bytes] = []  # in reverse
        self._over = True
        self._asking = session.stream(ask, self._deliveries.put)
        self._over = False
        self._wait()

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while True:
                try:
                    chunk = next(self)
                except StopIteration:
                    return
                yield chunk
        finally:
            self.close()

    def __next__(self) -> Chunk:
        while not self._events:
            if self._over:
                raise StopIteration
            self._wait()
        return self._read(self._events.pop())

    def close(self) -> None:
        """Want no more of it. Does not wait."""
        self._over = True
        self._events.clear()
        self._asking.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._over:
            self.close()

    def _wait(self) -> None:
        try:
            delivery = self._deliveries.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if isinstance(delivery, list):
            self._asking.took(len(delivery))
            self._events = delivery[::-1]
            return
        self._over = True
        if delivery is not None:
            raise delivery


class Verbs:
    """Any number of threads may ask at once.

    Raises (all verbs):
        ApiError: the server or the control plane said no; ``status``, ``code``, ``param``, ``retry_after_s``.
        EngineError: nobody answered, or not in OpenAI's form. NoAnswerInTime: not within ``timeout_s``.
        ConfigError: no model was named and it is not clear which is meant; the client is closed or of another process.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: list[Model] | None = None

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerationOptions],
    ) -> ChatCompletion: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[GenerationOptions],
    ) -> Stream[ChatCompletionChunk]: ...

    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> ChatCompletion | Stream[ChatCompletionChunk]:
        """The next turn of a conversation. model: None takes the only LLM there is. options: see
        :class:`sage_live.client.ask.GenerationOptions`."""
        ask = chat_ask(messages, self._model(model, "llm"), stream, options)
        if stream:
            return Stream(self._session, ask, read_chat_chunk)
        return read_chat(self._whole(ask))

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerationOptions],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[GenerationOptions],
    ) -> Stream[Completion]: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> Completion | Stream[Completion]:
        """The continuation of a text. As :meth:`chat`; without ``max_tokens`` most engines stop after 16."""
        ask = completion_ask(prompt, self._model(model, "llm"), stream, options)
        if stream:
            return Stream(self._session, ask, read_completion)
        return read_completion(self._whole(ask))

    def embed(self, texts: Inputs, *, model: str | None = None, **options: Unpack[EmbeddingOptions]) -> EmbeddingList:
        """A vector for each text. model: None takes the only embedding model there is."""
        return read_embeddings(self._whole(embedding_ask(texts, self._model(model, "embedding"), options)))

    def models(self) -> list[Model]:
        """What is served now."""
        self._known = read_models(self._whole(Ask(MODELS)))
        return self._known

    def _model(self, named: str | None, kind: Kind) -> str:
        return named if named is not None else only_model(self._known or self.models(), kind)

    def _whole(self, ask: Ask) -> bytes:
        asking = self._session.whole(ask)
        try:
            return asking.answer.result()
        except BaseException:
            asking.cancel()  # Ctrl-C; after an answer it does nothing
            raise
