"""Models whose attention shape was not measured: from the shapes beside it, in the tables of ``ops_aiconfigurator``.

Two rules, each checked on shapes that were measured (:func:`shape_checks`):

* A number of query heads between two measured ones, at the same number of key-value heads, takes time linear between
  them: decode reads the same cache, a prompt computes the heads.
* Without grouping (as many key-value heads as query heads) a sequence is as much work as ``heads / 8`` sequences of
  eight heads each: the kernel runs over (sequence, head) pairs, and each reads its own cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from profile_fit.architecture import Architecture, Device, Precision
from profile_fit.checks import compared
from profile_fit.kernels import TILE, Kernels
from sage_sim.profile import Check

MEASURED_HEADS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64)
UNGROUPED_HEADS_MAX = 8
"""Decode attention with as many key-value heads as query heads was measured up to this many."""

Generation = dict[tuple[int, int], float]


class NeighbouringShapes(Kernels):
    """``Kernels`` of a model with query heads, or ungrouped heads, that no table has, and widths far from measured ones."""

    def __init__(self, data: Path, model: Architecture, device: Device, precision: Precision, tp: int) -> None:
        super().__init__(data, model, device, precision, tp)
        heads, kv_heads = model.heads // tp, max(1, model.kv_heads // tp)
        if self.generation:
            return
        if heads == kv_heads:
            of_eight = Kernels(
                data, with_heads(model, tp, UNGROUPED_HEADS_MAX, UNGROUPED_HEADS_MAX), device, precision, tp
            )
            self.generation = more_sequences(of_eight.generation, heads / UNGROUPED_HEADS_MAX)
            return
        low = max(measured for measured in MEASURED_HEADS if measured < heads)
        high = min(measured for measured in MEASURED_HEADS if measured > heads)
        below, above = (Kernels(data, with_heads(model, tp, n, kv_heads), device, precision, tp) for n in (low, high))
        share = (heads - low) / (high - low)
        self.generation = {
            key: below.generation[key] * (1 - share) + above.generation[key] * share
            for key in below.generation.keys() & above.generation.keys()
        }
        self._context = {
            batch: (lengths, times * (1 - share) + np.interp(lengths, *above._context[batch]) * share)
            for batch, (lengths, times) in below._context.items()
            if batch in above._context
        }

    def gemm_us(self, m: int, n: int, k: int) -> float:
        """One matrix multiplication; up to a tile of tokens, the median over the tile.

        Such a product reads its weights and computes one tile whatever ``m`` is: what its times differ by is scatter of
        the measurement, and between two far widths it would be made larger.
        """
        if m > TILE:
            return super().gemm_us(m, n, k)
        return float(np.median([super(NeighbouringShapes, self).gemm_us(same, n, k) for same in range(1, TILE + 1)]))


def with_heads(model: Architecture, tp: int, heads: int, kv_heads: int) -> Architecture:
    """``model`` with that many heads on each of ``tp`` ranks."""
    return replace(model, heads=heads * tp, kv_heads=kv_heads * tp)


def more_sequences(generation: Generation, factor: float) -> Generation:
    """Decode attention with ``factor`` times the heads: that of ``factor`` times the sequences, linear between."""
    by_context: dict[int, list[tuple[int, float]]] = {}
    for (seqs, context), time_us in sorted(generation.items()):
        by_context.setdefault(context, []).append((seqs, time_us))
    out = {}
    for context, row in by_context.items():
        seqs, times = np.array(row).T
        for count in seqs:
            if count * factor <= seqs[-1]:
                out[int(count), context] = float(np.interp(count * factor, seqs, times))
    return out


def shape_checks(data: Path, model: Architecture, device: Device, precision: Precision, tp: int) -> list[Check]:
    """The two rules on measured shapes of the same table, for the kind of attention ``model`` has."""

    def of(heads: int, kv_heads: int) -> Generation:
        return Kernels(data, with_heads(model, tp, heads, kv_heads), device, precision, tp).generation

    heads, kv_heads = model.heads // tp, max(1, model.kv_heads // tp)
    if heads == kv_heads:
        predicted, actual = more_sequences(of(4, 4), 2.0), of(8, 8)
        against = "the same kernel table: 8 ungrouped heads from 4"
    else:
        below, above, actual = of(24, kv_heads), of(40, kv_heads), of(32, kv_heads)
        predicted = {key: (below[key] + above[key]) / 2 for key in below.keys() & above.keys()}
        against = f"the same kernel table: 32 query heads on {kv_heads} from 24 and 40"
    keys = sorted(predicted.keys() & actual.keys())
    return [
        compared(
            against,
            np.array([predicted[key] for key in keys]),
            np.array([actual[key] for key in keys]),
            "decode attention: the rule by which an unmeasured number of heads is made",
        )
    ]
