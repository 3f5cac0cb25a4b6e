"""Times at knots, their errors, and the bounds no iteration may beat.

Rules kept:

* Least squares on *relative* error of the whole iteration (10 ms of decode count as much as 1 s of prefill).
* Attention never falls with sequences or context, and a row never grows more slowly than the row before it. A curve may
  fall (kernels change with size), but not at its end, which is extrapolated.
* Knots of a curve are placed where its source bends: the point with the largest error becomes one, until no error is
  above ``TOLERANCE`` or there are enough. Tiles of matrix multiplications make steps; a straight line would not.
* Numbers are rounded to what the YAML shows *before* errors are computed.
* Errors are those of the same fit, made again on three quarters of the conditions, on the rest. A fit that beats the
  FLOP or bandwidth bound anywhere is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from profile_fit.architecture import Architecture, Device, Precision
from profile_fit.steps import Floats, Points, Steps, predict_us
from sage_sim.iteration import IterationTime
from sage_sim.profile import Attention, Curve, FitError, Phase, Prefill, TimeModel

TOLERANCE = 0.005
KNOTS_MAX = 40
BEND_PRICE = 1e-3
CONTEXT_BEND_SHARE = 0.03
"""Where no point decides, twice the sequences take twice as long, whatever the shape along the context."""
LINE_SIZES_MIN = 3
HEAD_KNOTS_MAX = 12
CONTEXTS = (16, 64, 128, 512, 2048, 8192, 16384, 32768, 65536)
BASE_TOKENS = (16, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SATURATION = (0, 64, 96, 128, 160, 192, 224, 260, 300, 340, 384, 448, 512)
"""Chunk tokens below which attention is bound by reading its context, tried in turn."""


class BoundError(ValueError):
    """A fit claims iterations faster than the hardware can read or multiply."""


@dataclass(frozen=True)
class Parts:
    """Kernel times of one source by the part of an iteration they belong to; each over all layers.

    token, head: by tokens and by sequences; ``head`` is None for an encoder. decode, prefill, mixed: attention alone,
    ``time_us`` without the other parts; ``mixed`` may be a number instead, an assumed factor on decode attention beside a
    prefill. prompts: shortest and longest prompt, context included.
    """

    token: Points
    head: Points | None
    decode: Steps
    prefill: Steps
    mixed: Steps | float
    prompts: tuple[int, int]

    def phases(self) -> dict[Phase, Steps]:
        """The attention of the phases that were measured, by name."""
        named: dict[Phase, Steps | float] = {"decode": self.decode, "prefill": self.prefill, "mixed": self.mixed}
        return {phase: steps for phase, steps in named.items() if isinstance(steps, Steps) and len(steps)}

    def rest_us(self, steps: Steps) -> Floats:
        """All but attention of these iterations."""
        head = 0.0 if self.head is None else self.head.at(steps.chunks + steps.seqs)
        return self.token.at(steps.tokens + steps.seqs) + head

    def iterations(self, steps: Steps) -> Steps:
        """Whole iterations from their attention: what the source itself gives for them, without a fit."""
        return steps.timed(self.rest_us(steps) + steps.time_us)


@dataclass(frozen=True)
class Limits:
    """What the hardware needs at least per unit of each term, over all ranks together (data-sheet rates)."""

    weights_us: float
    kv_us: float
    token_us: float
    pair_us: float

    @classmethod
    def of(cls, arch: Architecture, device: Device, precision: Precision, tp: int) -> Limits:
        """Weights that a token uses (with the LM head, without the input embedding) and KV cache are read once per
        iteration, every token is multiplied with the weights it uses, every query-key pair costs its attention FLOPs."""
        bandwidth, peak = tp * device.bandwidth_gb_s * 1e3, tp * device.tflops * 1e6
        head = arch.vocab * arch.hidden if arch.decoder else 0
        return cls(
            weights_us=(arch.active_parameters + head) * precision.weight_bytes / bandwidth,
            kv_us=arch.kv_bytes_per_token(precision.kv_bytes) / bandwidth,
            token_us=arch.flops_per_token / peak,
            pair_us=arch.flops_per_pair / peak,
        )


def fit_parts(name: str, parts: Parts, kv_tokens_max: int) -> tuple[TimeModel, dict[Phase, FitError]]:
    """The fit on everything, and the errors of the fit on three quarters, where the cache holds ``kv_tokens_max``."""
    split = {phase: steps.split(f"{name}/{phase}") for phase, steps in parts.phases().items()}
    attention: dict[str, Any] = {phase: kept for phase, (kept, _) in split.items()}
    train = replace(
        parts,
        token=parts.token.without_held_out(f"{name}/token"),
        head=parts.head and parts.head.without_held_out(f"{name}/head"),
        **attention,
    )
    law = _fit(train).law()
    embedding = parts.head is None
    errors = {}
    for phase, (kept, held) in split.items():
        whole = parts.iterations(fitting(held, kv_tokens_max))
        predicted = predict_us(law, whole, embedding=embedding)
        errors[phase] = measure(predicted, whole.time_us, train=len(kept))
    return _fit(parts), errors


def fit_iterations(name: str, decode: Steps, prefill: Steps, limits: Limits) -> tuple[TimeModel, dict[Phase, FitError]]:
    """The same from whole iterations, where parts cannot be told apart.

    Decode: one sequence, what more of them add, and a price per cached token. Prefill: a floor, a line over tokens and a
    price per pair. Both stand in the attention of the law, over a token curve that is one number. Nothing was measured of
    mixed iterations: they take a prefill and what the decodes add to an iteration of their own.
    """
    split: dict[Phase, tuple[Steps, Steps]] = {
        "decode": decode.split(f"{name}/decode"),
        "prefill": prefill.split(f"{name}/prefill"),
    }
    law = _fit_whole(split["decode"][0], split["prefill"][0], limits).law()
    errors = {
        phase: measure(predict_us(law, held), held.time_us, train=len(kept)) for phase, (kept, held) in split.items()
    }
    return _fit_whole(decode, prefill, limits), errors


def measure(predicted: Floats, actual: Floats, train: int) -> FitError:
    """MAPE, 95th percentile of the absolute error and mean signed error, in per cent of the actual time."""
    error = 100 * (predicted / actual - 1)
    return FitError(
        train=train,
        held_out=len(actual),
        mape_pct=round(float(np.mean(np.abs(error))), 2),
        ape_pct_p95=round(float(np.percentile(np.abs(error), 95)), 2),
        bias_pct=round(float(np.mean(error)), 2),
    )


def check_bounds(law: IterationTime, steps: Steps, limits: Limits, *, embedding: bool = False) -> float:
    """Largest share of the hardware's limit that the law claims at any of ``steps``; BoundError when over 1."""
    read_us = limits.weights_us + limits.kv_us * steps.kv
    compute_us = limits.token_us * (steps.tokens + steps.seqs) + limits.pair_us * (steps.pairs + steps.kv)
    share = np.maximum(read_us, compute_us) / predict_us(law, steps, embedding=embedding)
    worst = int(np.argmax(share))
    if share[worst] > 1:
        raise BoundError(
            f"the fit beats the {'bandwidth' if read_us[worst] > compute_us[worst] else 'FLOP'} bound "
            f"{share[worst]:.2f} times at P={steps.tokens[worst]:g}, A={steps.pairs[worst]:g}, "
            f"seqs={steps.seqs[worst]:g}, KV={steps.kv[worst]:g}: check the units and the source"
        )
    return float(share[worst])


def fitting(steps: Steps, kv_tokens_max: int) -> Steps:
    """Without iterations whose context a cache of ``kv_tokens_max`` would not hold."""
    return steps.where(steps.context + steps.tokens + steps.kv <= kv_tokens_max)


def fit_curve(points: Points, knots_max: int = KNOTS_MAX) -> Curve:
    """Few knots that follow the points, by relative error."""
    size, time_us = points.size, points.time_us
    knots = [size[0], size[-1]]
    while True:
        columns = _hats(size, knots)
        values = _relative_lsq(columns, time_us, time_us)
        error = np.abs(columns @ values / time_us - 1)
        if error.max() <= TOLERANCE or len(knots) >= min(knots_max, len(size)):
            values[-1] = values[-2:].max()
            return Curve([round(knot) for knot in knots], _rounded_row(values))
        free = np.where(np.isin(size, knots), -1, error)
        knots = sorted([*knots, size[int(np.argmax(free))]])


def rounded(value: float) -> float:
    """Five significant digits: what the YAML shows."""
    return float(f"{value:.5g}")


def rounded_ns(value: float) -> float:
    """The same in whole picoseconds, which is what the engine computes with."""
    return round(rounded(value), 3)


def _fit(parts: Parts) -> TimeModel:
    prefill = _fit_prefill(parts.prefill, parts.iterations(parts.prefill).time_us)
    return TimeModel(
        token=fit_curve(parts.token),
        head=None if parts.head is None else fit_curve(parts.head, HEAD_KNOTS_MAX),
        prefill=prefill,
        attention=_fit_attention(parts, prefill) if parts.head else None,
    )


def _fit_prefill(steps: Steps, whole_us: Floats) -> Prefill:
    """Base and price per pair for each point of saturation; the best one stays."""
    knots = _within(BASE_TOKENS, steps.tokens)
    base = _hats(steps.tokens, knots) @ _steps_up(len(knots))
    deepest = steps.context / np.minimum(steps.chunks, 2)
    best: tuple[float, Prefill] | None = None
    for tokens in SATURATION if deepest.any() else (0,):
        columns = np.column_stack([base, np.maximum(steps.pairs, tokens * deepest)])
        values = _relative_lsq(columns, steps.time_us, whole_us)
        loss = float(np.sum(((columns @ values - steps.time_us) / whole_us) ** 2))
        if best is None or loss < best[0]:
            pair_ns = 1e3 * values[-1]
            curve = Curve([round(knot) for knot in knots], _rounded_row(np.cumsum(values[:-1])))
            best = loss, Prefill(curve, rounded_ns(pair_ns), rounded_ns(pair_ns * tokens))
    assert best is not None
    return best[1]


def _fit_attention(parts: Parts, prefill: Prefill) -> Attention:
    decode = parts.decode
    seqs = sorted(set(decode.seqs))
    contexts = _within(CONTEXTS, decode.kv / decode.seqs)
    alone, _ = _fit_table(decode, decode.time_us, parts.iterations(decode).time_us, seqs, contexts)
    if isinstance(parts.mixed, Steps):
        mixed, rate = _fit_mixed(parts, parts.mixed, prefill, seqs, contexts)
    else:
        mixed, rate = parts.mixed * alone, 0.0
    return Attention(
        [round(n) for n in seqs],
        [round(context) for context in contexts],
        [_rounded_row(row) for row in alone],
        [_rounded_row(row) for row in mixed],
        rounded_ns(1e3 * rate),
    )


def _fit_mixed(
    parts: Parts, steps: Steps, prefill: Prefill, seqs: list[float], contexts: list[float]
) -> tuple[Floats, float]:
    """What decoding sequences add to the attention of a prefill."""
    bare = TimeModel(token=Curve([1], [1e-6]), prefill=prefill).law()
    alone = np.array([bare.iteration_ps(work) for work in steps.timed(steps.time_us).works()]) / 1e6
    beside = steps.seqs * steps.tokens / steps.chunks
    return _fit_table(steps, steps.time_us - alone, parts.iterations(steps).time_us, seqs, contexts, beside)


def _fit_table(
    steps: Steps,
    actual: Floats,
    whole_us: Floats,
    seqs: list[float],
    contexts: list[float],
    beside: Floats | None = None,
) -> tuple[Floats, float]:
    """Times at ``seqs`` x ``contexts``, and the price of ``beside`` where it is given.

    Knots that no point determines continue their neighbours in a straight line: bends have a price, too small to matter
    where there are points.
    """
    rows, columns = _hats(steps.seqs, seqs), _hats(steps.kv / steps.seqs, contexts)
    cells = (rows[:, :, None] * columns[:, None, :]).reshape(len(steps), -1)
    up = np.kron(_steps_up(len(seqs)), _steps_up(len(contexts)))
    along_seqs = np.kron(_bends(seqs), np.eye(len(contexts)))
    along_contexts = np.kron(np.eye(len(seqs)), _bends(contexts))
    bends = np.vstack([along_seqs, CONTEXT_BEND_SHARE * along_contexts])
    price = BEND_PRICE / float(np.median(whole_us))
    design = np.vstack([cells @ up, bends @ up])
    if beside is not None:
        design = np.column_stack([design, np.concatenate([beside, np.zeros(len(bends))])])
    zeros = np.zeros(len(bends))
    values = _relative_lsq(design, np.concatenate([actual, zeros]), np.concatenate([whole_us, zeros + 1 / price]))
    table = (up @ values[: up.shape[1]]).reshape(len(seqs), len(contexts))
    return table, 0.0 if beside is None else float(values[-1])


def _fit_whole(decode: Steps, prefill: Steps, limits: Limits) -> TimeModel:
    once, each, cached = _fit_decode(decode, limits)
    floor, start, token, pair = _fit_floor_and_line(prefill, limits)
    knee, end = max(2.0, (floor - start) / token), float(prefill.tokens.max())
    base = np.array([floor, floor, max(floor, start + token * end)]) - once
    seqs, context = sorted(set(decode.seqs)), round((decode.kv / decode.seqs).max())
    rows = [_rounded_row(np.array([more, more + cached * n * context])) for n, more in zip(seqs, each, strict=True)]
    return TimeModel(
        token=Curve([1], [rounded(once)]),
        head=Curve([1], [0.0]),
        prefill=Prefill(Curve([1, round(knee), round(end)], _rounded_row(np.maximum(0, base))), rounded_ns(1e3 * pair)),
        attention=Attention([round(n) for n in seqs], [0, context], rows, rows),
    )


def _fit_decode(steps: Steps, limits: Limits) -> tuple[float, Floats, float]:
    """What one sequence costs at no context, what more sequences add to it, and each cached token."""
    knots = sorted(set(steps.seqs))
    columns = np.column_stack([_hats(steps.seqs, knots) @ _steps_up(len(knots)), steps.kv])
    least = np.array([limits.weights_us, *np.zeros(len(knots) - 1), limits.kv_us])
    values = _relative_lsq(columns, steps.time_us - columns @ least, steps.time_us) + least
    rises = np.cumsum(values[:-1])
    return float(rises[0]), rises - rises[0], float(values[-1])


def _fit_floor_and_line(steps: Steps, limits: Limits) -> tuple[float, float, float, float]:
    """``max(floor, start + token * P) + pair * A``.

    Which points lie on the floor is not known, so every knee between the observed token counts is tried; the pair of
    floor and line whose *maximum* has the least squared relative error wins.
    """
    least = np.array([0.0, limits.token_us, limits.pair_us])
    best: tuple[float, tuple[float, float, float, float]] | None = None
    for knee in [0.0, *np.unique(steps.tokens)]:
        below = steps.tokens <= knee
        if len(np.unique(steps.tokens[~below])) < LINE_SIZES_MIN:
            break
        columns = np.column_stack([np.ones(len(steps)), steps.tokens, steps.pairs])
        rest = (steps.time_us - columns @ least)[~below]
        start, token, pair = _relative_lsq(columns[~below], rest, steps.time_us[~below]) + least
        flat = (steps.time_us - pair * steps.pairs)[below]
        floor = float(_relative_lsq(np.ones((len(flat), 1)), flat, steps.time_us[below])[0]) if below.any() else 0.0
        floor = max(floor, start + token)
        predicted = np.maximum(floor, start + token * steps.tokens) + pair * steps.pairs
        loss = float(np.sum((predicted / steps.time_us - 1) ** 2))
        if best is None or loss < best[0]:
            best = loss, (floor, float(start), float(token), float(pair))
    if best is None:
        raise ValueError(f"prefill: {len(steps)} points are too few to fit")
    return best[1]


def _within(candidates: tuple[int, ...], values: Floats) -> list[float]:
    """Both ends of ``values``, and the candidates well between them."""
    low, high = float(values.min()), float(values.max())
    return [low, *(float(at) for at in candidates if 1.5 * low <= at <= high / 1.5), high]


def _hats(x: Floats, knots: list[float]) -> Floats:
    """Weights of each knot in the value at each x: linear between, constant below, the last segment beyond."""
    at = np.array(knots)
    if len(at) == 1:
        return np.ones((len(x), 1))
    i = np.clip(np.searchsorted(at, x, side="right") - 1, 0, len(at) - 2)
    share = np.maximum(0.0, (x - at[i]) / (at[i + 1] - at[i]))
    weights = np.zeros((len(x), len(at)))
    rows = np.arange(len(x))
    weights[rows, i], weights[rows, i + 1] = 1 - share, share
    return weights


def _bends(knots: list[float]) -> Floats:
    """How far each inner value lies from the line through its neighbours."""
    bends = np.zeros((max(0, len(knots) - 2), len(knots)))
    for i, (low, middle, high) in enumerate(zip(knots, knots[1:], knots[2:], strict=False)):
        share = (middle - low) / (high - low)
        bends[i, i : i + 3] = share - 1, 1, -share
    return bends


def _steps_up(count: int) -> Floats:
    """From rises to values."""
    return np.tril(np.ones((count, count)))


def _relative_lsq(columns: Floats, actual: Floats, whole: Floats) -> Floats:
    """x >= 0 that minimises the sum of ((columns @ x - actual) / whole)^2."""
    relative = columns / whole[:, None]
    scale = np.linalg.norm(relative, axis=0)  # columns span eight decades: without this nnls loses the small ones
    scale[scale == 0] = 1.0
    q, r = np.linalg.qr(relative / scale)  # the same least squares in as many rows as there are columns
    return np.asarray(nnls(r, q.T @ (actual / whole), maxiter=50 * columns.shape[1])[0] / scale, dtype=np.float64)


def _rounded_row(values: Floats) -> list[float]:
    return [rounded(value) for value in values]
