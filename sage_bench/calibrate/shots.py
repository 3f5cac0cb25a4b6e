"""Requests by design and what became of them: :func:`shoot`.

Everything goes through the load generator (:mod:`sage_live.loadgen`), so what is measured is what a client of a live run
measures, from the same instants. Nothing of an engine's answers is known here but when its tokens came.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sage_core.errors import DataError
from sage_core.events import RequestArrived
from sage_core.load import Arrival
from sage_core.units import Nanos, RequestKind
from sage_live.loadgen.generator import generate
from sage_live.loadgen.options import Options
from sage_live.loadgen.schema import FIELDS, Error, gap_counts

PIPELINE = "calibrate"


class Shot(NamedTuple):
    """A request to send ``at_ns`` after the start of its volley. An embedding has no output."""

    at_ns: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answers:
    """What became of a volley; (n,) each, in order of its shots. Instants are ns since its start.

    tokens_ns: instants at which each answer's events were read. Servers put tokens into one event when they are late
    themselves: then there are fewer than tokens, and ``whole`` says so.
    """

    shots: Sequence[Shot]
    sent_ns: NDArray[np.int64]
    first_ns: NDArray[np.int64]
    ended_ns: NDArray[np.int64]
    tokens_ns: Sequence[NDArray[np.int64]]

    def whole(self, i: int) -> bool:
        """Whether every token of answer ``i`` has an instant of its own."""
        return len(self.tokens_ns[i]) == self.shots[i].output_tokens


class Range:
    """Fires volleys at one engine, one after another; each waits for the last answer of the one before."""

    def __init__(self, options: Options, kind: RequestKind) -> None:
        """``options``: of the load generator, with the model under :data:`PIPELINE`."""
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
        return Answers(shots, columns["sent_ns"], first_ns, ended_ns, tokens_ns)


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
