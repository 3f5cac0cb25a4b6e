"""Requests by design and what became of them: :func:`shoot`.

Everything goes through the load generator (:mod:`sage_live.loadgen`), so what is measured is what a client of a live run
measures, from the same instants. Nothing of an engine's answers is known here but when its tokens came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sage_bench.core_speed import CoreSpeed, Reference, probes_in
from sage_core.errors import DataError
from sage_core.events import RequestArrived
from sage_core.load import Arrival
from sage_core.units import Nanos, RequestKind
from sage_live.loadgen.generator import generate
from sage_live.loadgen.options import Options
from sage_live.loadgen.schema import FIELDS, Error, gap_counts

PIPELINE = "calibrate"

POWERS: Final = tuple(step / 4 for step in range(17))
"""Of the probe's time, that an engine's may go with: 0, where it does not, to 4."""

SAMPLED_S: Final = 0.3
"""Until what has been probed has been written."""


class Shot(NamedTuple):
    """A request to send ``at_ns`` after the start of its volley. An embedding has no output."""

    at_ns: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answers:
    """What became of a volley; (n,) each, in order of its shots. Instants are ns since its start.

    tokens_ns: instants at which each answer's events were read. Servers put tokens into one event when they are late
    themselves: then there are fewer than tokens, and ``whole`` says so. start_ns: of the volley, on the monotonic clock.
    """

    shots: Sequence[Shot]
    sent_ns: NDArray[np.int64]
    first_ns: NDArray[np.int64]
    ended_ns: NDArray[np.int64]
    tokens_ns: Sequence[NDArray[np.int64]]
    start_ns: int

    def whole(self, i: int) -> bool:
        """Whether every token of answer ``i`` has an instant of its own."""
        return len(self.tokens_ns[i]) == self.shots[i].output_tokens


class Range:
    """Fires volleys at one engine, one after another; each waits for the last answer of the one before."""

    def __init__(self, options: Options, kind: RequestKind, watched: Path | None = None) -> None:
        """``options``: of the load generator, with the model under :data:`PIPELINE`. watched: what the engine's core was probed
        to, where somebody does (:func:`sage_bench.core_speed.watching`)."""
        self._watched = watched
        self.reference: Reference | None = None
        """By which the core's speed is told, once it has been found."""
        self._options = options
        self._kind = kind
        self.fired = 0
        """Requests so far."""

    async def shoot(self, shots: Sequence[Shot]) -> Answers:
        """Send ``shots`` (in order of instant) and wait for all. DataError: one was not answered as asked."""
        options = replace(self._options, connections=min(len(shots), 64))
        load = _Volley(shots, self._kind, self.fired)
        self.fired += len(shots)
        measured = await generate(load, options)
        columns = dict(zip(FIELDS, measured.rows.T, strict=True))
        _check(columns, self._options.url)
        ended_ns = columns["ended_ns"]
        # A lone token may be no text of its own (half a character), and the event that ends an answer then shows none.
        first_ns = np.where(columns["first_token_ns"] < 0, ended_ns, columns["first_token_ns"])
        tokens_ns: list[NDArray[np.int64]] = []
        if self._kind != RequestKind.EMBEDDING:
            assert measured.gaps is not None
            ends = np.cumsum(gap_counts(columns["chunks"]))
            gaps = np.split(measured.gaps, ends[:-1])
            tokens_ns = [first + np.concatenate(([0], np.cumsum(of))) for first, of in zip(first_ns, gaps, strict=True)]
        return Answers(shots, columns["sent_ns"], first_ns, ended_ns, tokens_ns, measured.start_ns)

    async def timed(
        self, answers: Sequence[Answers], scatter: Callable[[Sequence[Answers]], float] | None = None
    ) -> Sequence[Answers]:
        """``answers`` in the time that the profile counts: seconds, or work time where the engine's core is watched.

        The first call sets the reference: the mean of the probes so far, and the power at which ``scatter``, of repetitions of
        the same conditions, is least.
        """
        if self._watched is None:
            return answers
        await asyncio.sleep(SAMPLED_S)
        probes = probes_in(self._watched, max(each.start_ns + int(each.ended_ns.max()) for each in answers))
        if self.reference is None:
            assert scatter is not None
            mean_us = float(probes.uninterrupted_ns().mean()) / 1e3
            tried = {power: scatter(worked(answers, CoreSpeed(probes, Reference(mean_us, power)))) for power in POWERS}
            self.reference = Reference(mean_us, min(tried, key=tried.__getitem__))
        return worked(answers, CoreSpeed(probes, self.reference))


def worked(answers: Sequence[Answers], speed: CoreSpeed) -> list[Answers]:
    """The same in work time."""
    return [_worked(each, speed) for each in answers]


def _worked(answers: Answers, speed: CoreSpeed) -> Answers:
    began = speed.work(answers.start_ns)

    def told(instants_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(speed.work(instants_ns + answers.start_ns) - began).astype(np.int64)

    return Answers(
        answers.shots,
        told(answers.sent_ns),
        told(answers.first_ns),
        told(answers.ended_ns),
        [told(each) for each in answers.tokens_ns],
        answers.start_ns,
    )


def _check(columns: dict[str, NDArray[np.int64]], url: str) -> None:
    wrong = np.flatnonzero(columns["error"] != Error.NONE)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{url}: {len(wrong)} of {len(columns['error'])} requests failed; the first with {columns['input_tokens_asked'][row]} "
            f"input and {columns['output_tokens_asked'][row]} output tokens: {Error(columns['error'][row]).name.lower()}, "
            f"status {columns['status'][row]}"
        )
    for name in ("input_tokens", "output_tokens"):
        seen, asked = columns[name], columns[f"{name}_asked"]
        off = np.flatnonzero((seen >= 0) & (seen != asked))
        if len(off):
            row = int(off[0])
            raise DataError(
                f"{url}: the engine counted {seen[row]} {name.replace('_', ' ')} where {asked[row]} were asked for; check "
                "that the tokenizer is the model's own, and that the engine knows ignore_eos and min_tokens"
            )


class _Volley:
    """A load of given arrivals, whose ids go on from ``first`` so that no two prompts of a calibration are equal."""

    def __init__(self, shots: Sequence[Shot], kind: RequestKind, first: int) -> None:
        self._shots = shots
        self._kind = kind
        self._first = first

    def arrivals(self) -> Iterator[Arrival]:
        for number, shot in enumerate(self._shots, self._first):
            at = Nanos(shot.at_ns)
            cap = max(shot.output_tokens, 1)
            asked = RequestArrived(number, PIPELINE, self._kind, "calibrate", 0, shot.input_tokens, cap, at)
            yield Arrival(at, asked, shot.output_tokens)

    def ended(self, now: Nanos, request: int) -> Arrival | None:
        return None
