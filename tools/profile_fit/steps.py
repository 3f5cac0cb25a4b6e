"""Step times as columns: the one table that measurements and compositions are turned into before anything is fitted.

One row is one engine step: ``tokens`` P new prompt tokens, ``pairs`` A = sum p (ctx + p/2), ``seqs`` decoding sequences
with ``kv`` cached tokens in all, and ``time_us``. ``condition`` numbers the experimental condition: repeats of one
measurement share it, and are held out together, because a repeat of a training point is no test.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sage_core.rng import Streams

Floats = NDArray[np.float64]

HELD_OUT_SHARE = 0.25


class Step(NamedTuple):
    """One row."""

    tokens: float
    pairs: float
    seqs: float
    kv: float
    time_us: float


@dataclass(frozen=True)
class Steps:
    """Columns of equal length."""

    tokens: Floats
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

    def split(self, name: str) -> tuple[Steps, Steps]:
        """``(train, held out)``: a quarter of the conditions, drawn by the stream ``name``, is held out."""
        keys = np.stack([self.tokens, self.pairs, self.seqs, self.kv], axis=1)
        _, condition = np.unique(keys, axis=0, return_inverse=True)
        condition = condition.reshape(-1)
        count = int(condition.max()) + 1 if len(self) else 0
        drawn = Streams(0).stream(f"held-out/{name}").permutation(count)[: round(count * HELD_OUT_SHARE)]
        held = np.isin(condition, drawn)
        return self.where(~held), self.where(held)


def prefill(batch: int, prompt: int, context: int, time_us: float) -> Step:
    """A step of ``batch`` equal prompts."""
    return Step(batch * prompt, batch * prompt * (context + prompt / 2), 0, 0, time_us)


def decode(seqs: int, kv: float, time_us: float) -> Step:
    """A step of ``seqs`` sequences, one token each, over ``kv`` cached tokens in all."""
    return Step(0, 0, seqs, kv, time_us)
