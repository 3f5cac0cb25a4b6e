"""Iterations as columns: the one table that measurements and compositions are turned into before anything is fitted.

One row is one engine iteration (or one kernel of it): ``chunks`` prompts of which ``tokens`` new tokens are prefilled on
``context`` tokens computed before, with ``pairs`` A = sum p (ctx + p/2); ``seqs`` decoding sequences with ``kv`` cached
tokens in all; and ``time_us``. Repeats of one measurement share its condition and are held out together, because a repeat
of a training point is no test.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sage_core.rng import Streams
from sage_sim.iteration import IterationTime, IterationWork

Floats = NDArray[np.float64]

HELD_OUT_SHARE = 0.25


class Step(NamedTuple):
    """One row."""

    chunks: float
    tokens: float
    context: float
    pairs: float
    seqs: float
    kv: float
    time_us: float


@dataclass(frozen=True)
class Steps:
    """Columns of equal length."""

    chunks: Floats
    tokens: Floats
    context: Floats
    pairs: Floats
    seqs: Floats
    kv: Floats
    time_us: Floats

    @classmethod
    def of(cls, rows: Iterable[Step]) -> Steps:
        """From rows; an empty input gives empty columns."""
        table = np.array(list(rows), dtype=np.float64).reshape(-1, len(Step._fields))
        return cls(*(table[:, i].copy() for i in range(table.shape[1])))

    def __len__(self) -> int:
        return len(self.time_us)

    def where(self, mask: NDArray[np.bool_]) -> Steps:
        """The rows that ``mask`` keeps."""
        return Steps(*(getattr(self, name)[mask] for name in Step._fields))

    def timed(self, time_us: Floats) -> Steps:
        """The same iterations with other times."""
        return replace(self, time_us=time_us)

    def split(self, name: str) -> tuple[Steps, Steps]:
        """``(train, held out)``: a quarter of the conditions, drawn by the stream ``name``, is held out."""
        keys = np.stack([getattr(self, field) for field in Step._fields[:-1]], axis=1)
        _, condition = np.unique(keys, axis=0, return_inverse=True)
        condition = condition.reshape(-1)
        held = np.isin(condition, _drawn(int(condition.max()) + 1 if len(self) else 0, name))
        return self.where(~held), self.where(held)

    def works(self) -> Iterator[IterationWork]:
        """As the law takes them: whole numbers."""
        columns = (self.seqs, self.kv, self.chunks, self.tokens, self.context, 2 * self.pairs)
        for row in np.stack([np.rint(column) for column in columns], axis=1).astype(np.int64).tolist():
            yield IterationWork(*row)


@dataclass(frozen=True)
class Points:
    """A time (us) for each of some rising sizes: tokens or sequences of an iteration."""

    size: Floats
    time_us: Floats

    def at(self, size: Floats) -> Floats:
        """Linear between the points."""
        return np.asarray(np.interp(size, self.size, self.time_us), dtype=np.float64)

    def without_held_out(self, name: str) -> Points:
        """Three quarters of the points, both ends among them; which, the stream ``name`` draws."""
        held = _drawn(len(self.size) - 2, name) + 1
        keep = ~np.isin(np.arange(len(self.size)), held)
        return Points(self.size[keep], self.time_us[keep])


def prefill(batch: int, prompt: int, context: int, time_us: float) -> Step:
    """An iteration of ``batch`` equal chunks of ``prompt`` tokens, each on ``context`` tokens."""
    tokens = batch * prompt
    return Step(batch, tokens, batch * context, tokens * (context + prompt / 2), 0, 0, time_us)


def decode(seqs: int, kv: float, time_us: float) -> Step:
    """An iteration of ``seqs`` sequences, one token each, over ``kv`` cached tokens in all."""
    return Step(0, 0, 0, 0, seqs, kv, time_us)


def predict_us(law: IterationTime, steps: Steps, *, embedding: bool = False) -> Floats:
    """What the engine would take for each iteration; an embedding engine runs batches."""
    if embedding:
        times = [law.batch_ps(work.prefill_tokens, work.attention2) for work in steps.works()]
    else:
        times = [law.iteration_ps(work) for work in steps.works()]
    return np.array(times, dtype=np.float64) / 1e6


def _drawn(count: int, name: str) -> NDArray[np.int64]:
    return Streams(0).stream(f"held-out/{name}").permutation(count)[: round(count * HELD_OUT_SHARE)]
