"""What a client can be asked, for coroutines: the verbs of ``verbs.py`` under the same names, in any asyncio loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Generic, Literal, Self, TypeVar, Unpack, overload

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
from sage_live.client.verbs import only_model

Chunk = TypeVar("Chunk")


class AsyncStream(Generic[Chunk]):
    """As :class:`sage_live.client.verbs.Stream`, with ``async for``. Made by :meth:`begin`, for one event loop."""

    def __init__(self, session: Session, ask: Ask, read: Callable[[bytes], Chunk]) -> None:
        self._session = session
        self._read = read
        loop = asyncio.get_running_loop()
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        self._events: deque[bytes] = deque()
        self._over = True

        put = self._deliveries.put_nowait  # not of self, which would keep itself alive

        def deliver(delivery: Delivery) -> None:
            loop.call_soon_threadsafe(put, delivery)

        self._asking = session.stream(ask, deliver)
        self._over = False

    @classmethod
    async def begin(cls, session: Session, ask: Ask, read: Callable[[bytes], Chunk]) -> Self:
        """Waits for the stream to begin: what a server refuses is raised here."""
        stream = cls(session, ask, read)
        await stream._wait()
        return stream

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return _Steps(self)

    async def __anext__(self) -> Chunk:
        while not self._events:
            if self._over:
                raise StopAsyncIteration
            await self._wait()
        return self._read(self._events.popleft())

    def close(self) -> None:
        """Want no more of it. Does not wait."""
        self._over = True
        self._events.clear()
        self._asking.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._over:
            self.close()

    async def _wait(self) -> None:
        try:
            delivery = await self._deliveries.get()
        except BaseException:  # a cancelled task
            self.close()
            raise
        if isinstance(delivery, list):
            self._asking.took(len(delivery))
            self._events.extend(delivery)
            return
        self._over = True
        if delivery is not None:
            raise delivery


class _Steps(Generic[Chunk]):
    """Of one ``async for``: when the loop is left, nothing holds it any more. An async generator would be closed by the
    event loop, some turns later."""

    def __init__(self, stream: AsyncStream[Chunk]) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._stream)

    def __del__(self) -> None:
        self._stream.close()


class AsyncVerbs:
    """Raises what :class:`sage_live.client.verbs.Verbs` raises. A cancelled task cancels its request, up to the engine."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: list[Model] | None = None

    @overload
    async def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerationOptions],
    ) -> ChatCompletion: ...

    @overload
    async def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[GenerationOptions],
    ) -> AsyncStream[ChatCompletionChunk]: ...

    async def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """See :meth:`sage_live.client.verbs.Verbs.chat`."""
        ask = chat_ask(messages, await self._model(model, "llm"), stream, options)
        if stream:
            return await AsyncStream.begin(self._session, ask, read_chat_chunk)
        return read_chat(await self._whole(ask))

    @overload
    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[GenerationOptions],
    ) -> Completion: ...

    @overload
    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[GenerationOptions],
    ) -> AsyncStream[Completion]: ...

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> Completion | AsyncStream[Completion]:
        """See :meth:`sage_live.client.verbs.Verbs.generate`."""
        ask = completion_ask(prompt, await self._model(model, "llm"), stream, options)
        if stream:
            return await AsyncStream.begin(self._session, ask, read_completion)
        return read_completion(await self._whole(ask))

    async def embed(
        self, texts: Inputs, *, model: str | None = None, **options: Unpack[EmbeddingOptions]
    ) -> EmbeddingList:
        """See :meth:`sage_live.client.verbs.Verbs.embed`."""
        ask = embedding_ask(texts, await self._model(model, "embedding"), options)
        return read_embeddings(await self._whole(ask))

    async def models(self) -> list[Model]:
        """What is served now."""
        self._known = read_models(await self._whole(Ask(MODELS)))
        return self._known

    async def close(self) -> None:
        """Close the client, whose synchronous half this ends too."""
        await self._session.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _model(self, named: str | None, kind: Kind) -> str:
        return named if named is not None else only_model(self._known or await self.models(), kind)

    async def _whole(self, ask: Ask) -> bytes:
        asking = self._session.whole(ask)
        try:
            return await asyncio.wrap_future(asking.answer)
        except BaseException:
            asking.cancel()  # a cancelled task; after an answer it does nothing
            raise
