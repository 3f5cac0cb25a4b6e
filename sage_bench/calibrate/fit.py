"""From observations to the law of :mod:`sage_sim.iteration`: every knot at once, none below zero.

An observed time is a sum of iterations, and an iteration is linear in the values at the knots, so all of them are one
system of linear equations. It is solved by least squares on *relative* errors with non-negative unknowns; a condition
whose repetitions scatter counts for less. Attention never falls with sequences or context; the curve over tokens may
(kernels change with size), but not at its end, which goes on. What the equations leave open is decided by prices:

* the curve over tokens, and attention over sequences and over context, bend little;
* what a mixed iteration takes that neither its tokens nor its decodes explain is small;
* attention of a lone sequence of the shortest context is as small as the observations allow. What further sequences take
  whatever their context stays with it: on engines that stream, much of that is sending their tokens.

How much the first two weigh is decided by the errors on conditions that are left out (:data:`STIFFNESS`): an engine that repeats
itself shows every bend of its kernels, and one that does not would have its noise drawn as bends.

``ingress`` and the constant part of ``prefill.base`` (what any iteration with a prompt takes on top, whatever its length)
are told apart by the prompts that came while others were decoding: those wait for the second only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from sage_bench.calibrate.observation import Observation, Repeated
from sage_core.rng import Streams
from sage_sim.iteration import IterationWork
from sage_sim.profile import Attention, Curve, FitError, Phase, Prefill, TimeModel

Floats: TypeAlias = NDArray[np.float64]

STIFFNESS = (0.3, 0.1, 0.03, 0.01, 0.003)
SHORT_ATTENTION = 0.3
"""A bend, and attention (of a lone short sequence, and of the pairs of the longest prompt), over the shortest time observed: as
unlikely to be larger as an observation is to be off by more than the conditions scatter. The stiffest is taken whose error on
conditions left out is at most :data:`STIFF_WORTH` times the least."""

STIFF_WORTH = 1.05

SCATTER_MIN = 0.003
SCATTER_UNKNOWN = 0.05
"""Relative scatter that a condition is taken to have at least, and where it was met too seldom to tell."""

FOLDS = 4
"""A quarter of the conditions is left out in turn."""


@dataclass(frozen=True, slots=True)
class Fit:
    """time: for a profile. ingress_us: into the engine, and back out. predicted_us: (n,) of the observations fitted."""

    time: TimeModel
    ingress_us: float
    predicted_us: Floats = field(repr=False)


class Terms:
    """The unknowns of a fit, and how an iteration depends on them. Knots: tokens of an iteration; decoding sequences;
    their mean context. An embedding engine has no sequences."""

    def __init__(self, tokens: Sequence[int], seqs: Sequence[int] = (), contexts: Sequence[int] = ()) -> None:
        self.tokens, self.seqs, self.contexts = list(tokens), list(seqs), list(contexts)
        cells = len(self.seqs) * len(self.contexts)
        counts = {"token": len(self.tokens), "decode": cells}
        self._at: dict[str, slice] = {}
        end = 0
        for name in (
            "token",
            "head",
            "decode",
            "base",
            "pair",
            "mixed_seq",
            "mixed_kv_token",
            "mixed_seq_token",
            "ingress",
        ):
            count = counts.get(name, 1)
            self._at[name] = slice(end, end + count)
            end += count
        self._count = end

    def solved(self, observations: Sequence[Repeated], streams: Streams) -> tuple[Fit, dict[Phase, FitError]]:
        """The fit to ``observations``, and its errors by phase: of fits made without a quarter of the conditions, on that
        quarter, for each quarter."""
        rows, times, weights = self._system(observations)
        fold = np.empty(len(rows), np.int64)
        fold[streams.stream("calibrate/folds").permutation(len(rows))] = np.arange(len(rows)) % FOLDS
        left_out = [self._left_out(rows, times, weights, fold, bend) for bend in STIFFNESS]
        scores = [float(np.abs(off).mean()) for off in left_out]
        chosen = max(i for i, score in enumerate(scores) if score <= STIFF_WORTH * min(scores))
        unknowns = self._nnls(rows, times, weights, STIFFNESS[chosen])
        fit = Fit(self._time(unknowns), float(unknowns[self._at["ingress"]][0]), rows @ unknowns)
        return fit, _by_phase(observations, left_out[chosen])

    def _left_out(self, rows: Floats, times: Floats, weights: Floats, fold: NDArray[np.int64], bend: float) -> Floats:
        """(n,) per cent, each by the fit that has not seen it."""
        off = np.empty(len(rows))
        for each in range(FOLDS):
            out = fold == each
            unknowns = self._nnls(rows[~out], times[~out], weights[~out], bend)
            off[out] = 100 * (rows[out] @ unknowns - times[out]) / times[out]
        return off

    # --- equations ----------------------------------------------------------------------------------------------------

    def _system(self, observations: Sequence[Repeated]) -> tuple[Floats, Floats, Floats]:
        """Rows (n, unknowns), times (n,) in us, and weights (n,): one over the relative scatter."""
        scatter = np.array([each.scatter if each.times > 2 else SCATTER_UNKNOWN for each in observations])
        floor = max(SCATTER_MIN, float(np.median(scatter)))  # of few repetitions, little scatter is luck
        rows = np.stack([self._row(each.median) for each in observations])
        return rows, np.array([each.median.time_us for each in observations]), 1 / np.maximum(scatter, floor)

    def _row(self, observation: Observation) -> Floats:
        row = np.zeros(self._count)
        for count, work in observation.works:
            row += count * self._iteration(work)
        if observation.condition.ingress:
            row[self._at["ingress"]] += 1
        return row

    def _iteration(self, work: IterationWork) -> Floats:
        """(unknowns,) what multiplies each of them in the time of an iteration."""
        row = np.zeros(self._count)
        row[self._at["token"]] = _values(self.tokens, work.seqs + work.prefill_tokens)
        if self.seqs:
            row[self._at["head"]] = work.seqs + work.chunks
        if work.seqs:
            context = _steps(self.contexts, work.kv_tokens / work.seqs)
            row[self._at["decode"]] = np.outer(_steps(self.seqs, work.seqs), context).ravel()
        if work.prefill_tokens:
            row[self._at["base"]] = 1
            row[self._at["pair"]] = work.attention2 / 2
            row[self._at["mixed_seq"]] = work.seqs
            row[self._at["mixed_kv_token"]] = work.kv_tokens
            row[self._at["mixed_seq_token"]] = work.seqs * work.prefill_tokens / work.chunks
        return row

    def _nnls(self, rows: Floats, times: Floats, weights: Floats, bend: float) -> Floats:
        """What is asked of every row is its time; of every price, nothing."""
        matrix = np.vstack([rows * (weights / times)[:, None], self._prices(bend) / times.min()])
        scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)  # unknowns of very different size, made alike
        target = np.concatenate([weights, np.zeros(len(matrix) - len(rows))])
        solution, _ = nnls(matrix / scale, target, maxiter=10_000)
        return np.asarray(solution / scale)

    def _prices(self, bend: float) -> Floats:
        """Rows, in us: bends, what is left for mixed iterations, and attention."""
        found = [
            each / bend for each in self._bends("token", self.tokens, [_values(self.tokens, x) for x in self.tokens])
        ]
        row = np.zeros(self._count)
        row[self._at["pair"]] = self.tokens[-1] ** 2 / 2 / SHORT_ATTENTION
        found.append(row)
        if self.seqs:
            seqs, contexts = np.tril(np.ones((len(self.seqs),) * 2)), np.tril(np.ones((len(self.contexts),) * 2))
            for context in contexts:
                values = [np.outer(step, context).ravel() for step in seqs]
                found += [each / bend for each in self._bends("decode", self.seqs, values)]
            for step in seqs:
                values = [np.outer(step, context).ravel() for context in contexts]
                found += [each / bend for each in self._bends("decode", self.contexts, values)]
            most = self.seqs[-1]
            largest = {"mixed_seq": 1, "mixed_kv_token": self.contexts[-1], "mixed_seq_token": self.tokens[-1]}
            for name, times in largest.items():
                row = np.zeros(self._count)
                row[self._at[name]] = most * times / bend
                found.append(row)
            row = np.zeros(self._count)
            row[self._at["decode"].start] = 1 / SHORT_ATTENTION
            found.append(row)
        return np.array(found).reshape(-1, self._count)

    def _bends(self, name: str, knots: Sequence[int], values: Sequence[Floats]) -> list[Floats]:
        """Rows: how far the value at each inner knot is from the straight line between its neighbours. values: what the unknowns
        ``name`` count for at each knot."""
        found = []
        for low, middle, high in zip(range(len(values)), range(1, len(values)), range(2, len(values)), strict=False):
            row = np.zeros(self._count)
            share = (knots[middle] - knots[low]) / (knots[high] - knots[low])
            row[self._at[name]] = values[middle] - (1 - share) * values[low] - share * values[high]
            found.append(row)
        return found

    # --- the law ------------------------------------------------------------------------------------------------------

    def _time(self, unknowns: Floats) -> TimeModel:
        of = {name: unknowns[at] for name, at in self._at.items()}
        token = [_rounded(value) for value in of["token"]]
        if len(token) > 1:
            token[-1] = _rounded(token[-1] + token[-2])
        prefill = Prefill(Curve([1], [_rounded(of["base"][0])]), _rounded(of["pair"][0] * 1e3, 6))
        if not self.seqs:
            return TimeModel(token=Curve(self.tokens, [max(each, 0.001) for each in token]), prefill=prefill)
        steps = of["decode"].reshape(len(self.seqs), len(self.contexts))
        decode = steps.cumsum(axis=0).cumsum(axis=1)
        seqs, contexts = np.array(self.seqs)[:, None], np.array(self.contexts)[None, :]
        mixed = decode + seqs * (of["mixed_seq"] + of["mixed_kv_token"] * contexts)
        head = float(of["head"][0])
        return TimeModel(
            token=Curve(self.tokens, [max(each, 0.001) for each in token]),
            head=Curve([0, self.seqs[-1]], [0.0, _rounded(head * self.seqs[-1])]),
            prefill=prefill,
            attention=Attention(
                self.seqs,
                self.contexts,
                [[_rounded(each) for each in row] for row in decode],
                [[_rounded(each) for each in row] for row in mixed],
                _rounded(of["mixed_seq_token"][0] * 1e3, 6),
            ),
        )


def _by_phase(observations: Sequence[Repeated], off: Floats) -> dict[Phase, FitError]:
    """off: (n,) per cent."""
    phases = np.array([each.median.condition.phase for each in observations])
    errors: dict[Phase, FitError] = {}
    for phase in ("decode", "prefill", "mixed"):
        of = off[phases == phase]
        if len(of):
            errors[phase] = FitError(
                len(off) * (FOLDS - 1) // FOLDS,
                len(of),
                round(float(np.abs(of).mean()), 2),
                round(float(np.percentile(np.abs(of), 95)), 2),
                round(float(of.mean()), 2),
            )
    return errors


def _values(knots: Sequence[int], x: float) -> Floats:
    """(knots,) what the values at the knots count for at ``x``, on straight lines between them. The last unknown is a step
    from the value before, and the line goes on."""
    found = np.zeros(len(knots))
    steps = _steps(knots, x)
    if len(knots) == 1:
        return steps
    found[:-1] = np.minimum(steps[:-1], 1.0)
    found[:-2] -= found[1:-1]
    found[-1] = steps[-1]
    return found


def _steps(knots: Sequence[int], x: float) -> Floats:
    """(knots,) how far ``x`` is over the step from the knot before to each knot, so that the value at ``x`` is the product
    with the steps: 1 where it is past it, a fraction within, and more than 1 in the last, which goes on."""
    found = np.ones(len(knots))
    for i in range(1, len(knots)):
        reach = (x - knots[i - 1]) / (knots[i] - knots[i - 1])
        found[i] = max(0.0, reach if i == len(knots) - 1 else min(reach, 1.0))
    return found


def _rounded(value: float, digits: int = 3) -> float:
    return round(float(value), digits)
