"""Requests of many clients, embedded in batches by one thread.

The thread takes what waits, oldest first and a few batches at most, tokenises it in one call, sorts by length, so that a
batch pads little, and encodes. A request is told when its last text is done; one whose client has gone is skipped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from sage_live.errors import ApiError, bad_request, internal
from sage_live.servers.encoder import Encoder

_ROUND_BATCHES = 4
"""Batches whose texts are sorted together: more would pad less and let the first wait longer."""

_log = logging.getLogger(__name__)


class Wanted:
    """One request: its texts, given as text or token ids."""

    __slots__ = ("gone", "inputs", "left", "on_done", "on_failed", "tokens", "vectors")

    def __init__(
        self,
        inputs: Sequence[str | list[int]],
        on_done: Callable[[NDArray[np.float32], int], None],
        on_failed: Callable[[ApiError], None],
    ) -> None:
        """``on_done`` gets (texts, dimensions) in the order of the inputs and how many tokens they had; either is called
        in the thread of the event loop."""
        self.inputs = inputs
        self.on_done, self.on_failed = on_done, on_failed
        self.gone = False  # nobody waits for it any more
        self.left = len(inputs)
        self.tokens = 0
        self.vectors: NDArray[np.float32] | None = None


class _Text:
    __slots__ = ("ids", "of", "place")

    def __init__(self, of: Wanted, place: int, ids: list[int]) -> None:
        self.of, self.place, self.ids = of, place, ids


class Batcher:
    """Build inside a running event loop. max_batch: most texts of a batch; max_batch_tokens: most tokens, padding included
    (a text that is longer goes alone)."""

    def __init__(self, encoder: Encoder, max_batch: int, max_batch_tokens: int) -> None:
        self._encoder = encoder
        self._max_batch, self._max_batch_tokens = max_batch, max_batch_tokens
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._waiting: deque[Wanted] = deque()
        self._closing = False
        self.running = 0  # texts
        self.batches = self.texts = self.tokens = self.padded_tokens = self.skipped = 0
        self._thread = threading.Thread(target=self._work, name="sage-embedding", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that no batch has begun."""
        return len(self._waiting)

    def submit(self, wanted: Wanted) -> None:
        """Behind those that wait."""
        with self._changed:
            self._waiting.append(wanted)
            self._changed.notify()

    async def close(self) -> None:
        """End after the batch in progress; what waits is never told."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await self._loop.run_in_executor(None, self._thread.join)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (round_ := self._next_round()) is not None:
            texts = self._tokenized(round_)
            texts.sort(key=lambda text: len(text.ids))
            while texts and not self._closing:
                self._encode(self._batch(texts))

    def _next_round(self) -> list[Wanted] | None:
        """The oldest requests that wait; None when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return None
            taken: list[Wanted] = []
            room = _ROUND_BATCHES * self._max_batch
            while self._waiting and (not taken or room >= len(self._waiting[0].inputs)):
                wanted = self._waiting.popleft()
                room -= len(wanted.inputs)
                taken.append(wanted)
            return taken

    def _tokenized(self, round_: list[Wanted]) -> list[_Text]:
        """The texts of those that nothing is wrong with; the others are told."""
        live = [wanted for wanted in round_ if not self._skip(wanted)]
        raw = [item for wanted in live for item in wanted.inputs if isinstance(item, str)]
        try:
            ids = iter(self._encoder.tokenize(raw) if raw else [])
        except Exception as error:
            self._fail(live, error)
            return []
        texts: list[_Text] = []
        for wanted in live:
            own = [next(ids) if isinstance(item, str) else item for item in wanted.inputs]
            refusal = self._refusal(own)
            if refusal is not None:
                self._loop.call_soon_threadsafe(wanted.on_failed, refusal)
                continue
            wanted.tokens = sum(map(len, own))
            texts += map(_Text, [wanted] * len(own), count(), own)
        return texts

    def _refusal(self, texts: list[list[int]]) -> ApiError | None:
        longest = max(map(len, texts))
        if longest > self._encoder.tokens_max:
            return bad_request(
                f"This model's maximum context length is {self._encoder.tokens_max} tokens. However, you requested {longest} in one "
                "input; shorten it.",
                param="input",
                code="context_length_exceeded",
            )
        if max(map(max, texts)) >= self._encoder.vocabulary:
            return bad_request(f"input: expected token ids below {self._encoder.vocabulary}", param="input")
        return None

    def _batch(self, texts: list[_Text]) -> list[_Text]:
        """Takes the longest texts that are left, so that the first batch tells at once whether memory suffices."""
        batch: list[_Text] = []
        longest = len(texts[-1].ids)
        while texts and len(batch) < self._max_batch:
            if batch and longest * (len(batch) + 1) > self._max_batch_tokens:
                break
            text = texts.pop()
            if not self._skip(text.of):
                batch.append(text)
        return batch

    def _encode(self, batch: list[_Text]) -> None:
        if not batch:
            return
        self.running = len(batch)
        try:
            vectors = self._encoder.encode([text.ids for text in batch])
        except Exception as error:
            self._fail(list(dict.fromkeys(text.of for text in batch)), error)
            return
        finally:
            self.running = 0
        self.batches += 1
        self.texts += len(batch)
        self.tokens += sum(len(text.ids) for text in batch)
        self.padded_tokens += len(batch) * max(len(text.ids) for text in batch)
        for text, vector in zip(batch, vectors, strict=True):
            wanted = text.of
            if wanted.vectors is None:
                wanted.vectors = np.empty((len(wanted.inputs), len(vector)), np.float32)
            wanted.vectors[text.place] = vector
            wanted.left -= 1
            if wanted.left == 0:
                self._loop.call_soon_threadsafe(wanted.on_done, wanted.vectors, wanted.tokens)

    def _skip(self, wanted: Wanted) -> bool:
        if wanted.gone and wanted.left > 0:
            wanted.left = 0
            self.skipped += 1
        return wanted.gone

    def _fail(self, requests: list[Wanted], error: Exception) -> None:
        _log.error("the embedding model failed on a batch", exc_info=error)
        for wanted in requests:
            wanted.gone = True  # its other texts are not wanted either
            self._loop.call_soon_threadsafe(wanted.on_failed, internal())
