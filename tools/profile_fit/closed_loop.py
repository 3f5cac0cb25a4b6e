"""A closed loop of clients on one engine: how much work of each kind lies between two tokens of a request.

Every client sends its next request when its last is answered, so which iteration holds what depends on the scheduler
alone and not on how long iterations take. The loop is replayed iteration by iteration (decode-only stretches in one
step), and the work of an iteration is kept apart by kind, to be weighted later. Rules kept:

* Decodes go first, prompts fill what is left of the token budget; an engine that does not mix runs prompts alone.
* An engine without reservation admits a prompt that has room now, and preempts the newest sequence when the cache is
  full: that one computes everything again.
* Time per output token is counted as load generators do: from the first token to the last, preemption included.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeAlias

import numpy as np

from profile_fit.kernels import Kernels
from profile_fit.steps import Floats
from sage_core.rng import Streams

WORK = ("dense", "decode attention", "prompts", "iterations", "sequences", "requests")
"""Kinds of work: three in ms, three counts. ``prompts``: what prompts add to the dense layers, and their attention."""

Work: TypeAlias = Floats
"""One number for each of ``WORK``."""


@dataclass(frozen=True)
class Rules:
    """How an engine fills an iteration. ``budget``: tokens; ``mixed``: prompts and decodes together; ``reserve``: a
    request is admitted when its whole length has room."""

    budget: int
    mixed: bool
    reserve: bool


@dataclass(frozen=True)
class Load:
    """``requests`` in all, ``clients`` at a time; lengths are uniform from ``shortest`` times the nominal to it."""

    isl: int
    osl: int
    clients: int
    requests: int
    shortest: float = 1.0

    def lengths(self, name: str) -> tuple[list[int], list[int]]:
        """Prompt and output tokens of every request, drawn by the stream ``name``."""
        stream = Streams(0).stream(name)
        prompts, outputs = (
            stream.integers(max(1, int(nominal * self.shortest)), nominal + 1, self.requests)
            for nominal in (self.isl, self.osl)
        )
        return prompts.tolist(), outputs.tolist()


class Costs:
    """Kernel times of one setup, in ms, as look-ups: up to ``tokens_max`` tokens, ``seqs_max`` sequences."""

    def __init__(self, kernels: Kernels, tokens_max: int, seqs_max: int) -> None:
        layers = kernels.model.layers / 1e3
        knots = np.unique(np.geomspace(1, tokens_max, 96).round()).astype(int)
        dense = [layers * kernels.linear_us(int(tokens)) for tokens in knots]
        self.dense: list[float] = np.interp(np.arange(tokens_max + 1), knots, dense).tolist()
        self.finish: list[float] = [0.0, *(kernels.finish_us(seqs) / 1e3 for seqs in range(1, seqs_max + 1))]
        self._contexts, self._decode = _decode_table(kernels, seqs_max)
        lengths = kernels._context[1][0].tolist()
        self._lengths = np.array([0, *lengths], dtype=np.float64)
        self._prompt = np.array([0.0, *(layers * kernels.prompts_us(1, length) for length in lengths)])

    def decode(self, seqs: int, kv: float) -> float:
        """Decode attention of ``seqs`` sequences over ``kv`` cached tokens in all."""
        return float(np.interp(kv / seqs, self._contexts, self._decode[seqs]))

    def prompt(self, tokens: int, context: int) -> float:
        """Attention of a chunk: that of the prompt up to its end, less that up to its start."""
        before, after = np.interp([context, context + tokens], self._lengths, self._prompt)
        return float(after - before)


def work_per_token(load: Load, rules: Rules, costs: Costs, kv_tokens: int, name: str) -> Work:
    """Work between the first and the last token of a request, over its tokens after the first; mean over requests."""
    return _Loop(load, rules, costs, kv_tokens, name).run()


class _Loop:
    """State of the replay. ``kv`` counts whole prompts from their admission on."""

    def __init__(self, load: Load, rules: Rules, costs: Costs, kv_tokens: int, name: str) -> None:
        self.load, self.rules, self.costs, self.kv_tokens = load, rules, costs, kv_tokens
        self.prompts, self.outputs = load.lengths(name)
        self.left = list(self.outputs)  # tokens to come, as of the last (re)start
        self.waiting = list(range(min(load.clients, load.requests)))
        self.sent = len(self.waiting)
        self.prefilling: dict[int, int] = {}  # request -> prompt tokens done
        self.running: list[tuple[int, int]] = []  # heap of (decode iteration of the last token, request)
        self.decodes = 0
        self.kv = self.reserved = 0
        self.done = np.zeros(len(WORK))
        self.at_first: dict[int, Work] = {}
        self.means: list[Work] = []

    def run(self) -> Work:
        while self.waiting or self.prefilling or self.running:
            chunks = self._schedule()
            if chunks:
                self._prefill(chunks)
            else:
                self._decode()
        return np.asarray(np.mean(self.means, axis=0), dtype=np.float64)

    def _schedule(self) -> list[tuple[int, int, int]]:
        """``(request, tokens, context)`` of the next iteration's chunks."""
        room = self.rules.budget - (len(self.running) if self.rules.mixed else 0)
        chunks: list[tuple[int, int, int]] = []
        while room > 0:
            started = [request for request in self.prefilling if all(request != chunk[0] for chunk in chunks)]
            if not started:
                if not (self.waiting and self._fits(self.waiting[0])):
                    break
                started = [self._admit()]
            request, before = started[0], self.prefilling[started[0]]
            tokens = min(room, self._prompt(request) - before)
            chunks.append((request, tokens, before))
            room -= tokens
        return chunks

    def _admit(self) -> int:
        request = self.waiting.pop(0)
        self.prefilling[request] = 0
        self.kv += self._prompt(request)
        self.reserved += self._whole(request)
        return request

    def _prefill(self, chunks: list[tuple[int, int, int]]) -> None:
        seqs = len(self.running) if self.rules.mixed else 0
        tokens = sum(count for _, count, _ in chunks)
        added = self.costs.dense[tokens + seqs] - self.costs.dense[seqs]
        added += sum(self.costs.prompt(count, before) for _, count, before in chunks)
        self._account(seqs, 1, added, len(chunks))
        if seqs:
            self._advance(1)
        for request, count, before in chunks:
            self.prefilling[request] = before + count
            if before + count == self._prompt(request):
                del self.prefilling[request]
                self._first_token(request)

    def _decode(self) -> None:
        """Every iteration until a sequence ends or the cache is full."""
        while not self.rules.reserve and len(self.running) > 1 and self.kv + len(self.running) > self.kv_tokens:
            self._preempt()
        count = self._stretch()
        self._account(len(self.running), count, 0.0, 0)
        self._advance(count)

    def _stretch(self) -> int:
        """Iterations until the batch changes."""
        count = self.running[0][0] - self.decodes
        if self.rules.reserve:
            return count
        return min(count, max(1, (self.kv_tokens - self.kv) // len(self.running)))

    def _account(self, seqs: int, count: int, prompts_ms: float, requests: int) -> None:
        dense = decode = 0.0
        if seqs:
            dense = count * (self.costs.dense[seqs] + self.costs.finish[seqs])
            decode = count * self.costs.decode(seqs, self.kv + seqs * (count - 1) / 2)
        self.done = self.done + np.array([dense, decode, prompts_ms, count, count * seqs, requests])

    def _advance(self, count: int) -> None:
        self.decodes += count
        self.kv += count * len(self.running)
        while self.running and self.running[0][0] <= self.decodes:
            self._end(heappop(self.running)[1])

    def _first_token(self, request: int) -> None:
        """The prompt gives a token; after a preemption it is not the first of its request."""
        self.at_first.setdefault(request, self.done)
        self.kv += 1
        self.left[request] -= 1
        if self.left[request]:
            heappush(self.running, (self.decodes + self.left[request], request))
        else:
            self._end(request)

    def _end(self, request: int) -> None:
        self.kv -= self._whole(request)
        self.reserved -= self._whole(request)
        if self.outputs[request] > 1:
            self.means.append((self.done - self.at_first[request]) / (self.outputs[request] - 1))
        if self.sent < self.load.requests:
            self.waiting.append(self.sent)
            self.sent += 1

    def _preempt(self) -> None:
        newest = max(self.running, key=lambda entry: entry[1])
        self.running.remove(newest)
        heapify(self.running)
        last, request = newest
        self.left[request] = last - self.decodes
        self.kv -= self._prompt(request)
        self.reserved -= self._whole(request)
        self.waiting.insert(0, request)

    def _prompt(self, request: int) -> int:
        """What a (re)start has to compute: the prompt and the output so far."""
        return self._whole(request) - self.left[request]

    def _whole(self, request: int) -> int:
        return self.prompts[request] + self.outputs[request]

    def _fits(self, request: int) -> bool:
        if not (self.running or self.prefilling):
            return True
        if self.rules.reserve:
            return self.reserved + self._whole(request) <= self.kv_tokens
        return self.kv + self._prompt(request) + len(self.running) <= self.kv_tokens


def _decode_table(kernels: Kernels, seqs_max: int) -> tuple[Floats, list[Floats]]:
    """Contexts, and a row of ms for each number of sequences from 0, linear between the measured numbers."""
    measured: dict[int, dict[int, float]] = {}
    for seqs, context in sorted(kernels.generation):
        row = measured.setdefault(seqs, {})
        row[context] = kernels.generation_us(seqs, context) * kernels.model.layers / 1e3
    contexts = np.array(sorted({context for row in measured.values() for context in row}), dtype=np.float64)
    batches = np.array(sorted(measured), dtype=np.float64)
    table = np.stack([_extended(row, contexts) for _, row in sorted(measured.items())])
    every = np.arange(seqs_max + 1)
    columns = np.stack([np.interp(every, batches, table[:, i]) for i in range(len(contexts))], axis=1)
    return contexts, list(columns)


def _extended(row: dict[int, float], contexts: Floats) -> Floats:
    """``row`` at ``contexts``; beyond its last, on the line through its last two."""
    known, times = np.array(list(row), dtype=np.float64), np.array(list(row.values()))
    slope = (times[-1] - times[-2]) / (known[-1] - known[-2])
    beyond = times[-1] + slope * (contexts - known[-1])
    return np.asarray(np.where(contexts > known[-1], beyond, np.interp(contexts, known, times)), dtype=np.float64)
