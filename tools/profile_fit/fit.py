"""Coefficients, their errors, and the bounds no step may beat.

Rules kept:

* Least squares on *relative* error (a 10 ms decode step counts as much as a 1 s prefill), each coefficient at least
  what the hardware needs for its term: a slope below the FLOP bound would extrapolate into the impossible.
* Phases are fitted apart (one joint fit is 18-21 % off end to end on real runs); a mixed step then gets one number, the
  factor on the decode terms.
* Coefficients are rounded to what the YAML shows *before* errors are computed, so the errors are those of the file.
* Errors are on conditions held out of the fit. A fit that beats the FLOP or bandwidth bound is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from scipy.optimize import nnls

from profile_fit.architecture import Architecture, Device, Precision
from profile_fit.steps import Floats, Steps
from sage_sim.profile import FitError, Phase, TimeModel

MIN_LINEAR_POINTS = 6


class BoundError(ValueError):
    """A fit claims steps faster than the hardware can read or multiply."""


@dataclass(frozen=True)
class Phases:
    """The steps of one source by phase; a phase may be empty. ``prompts``: shortest and longest prompt, context
    included."""

    decode: Steps
    prefill: Steps
    mixed: Steps
    prompts: tuple[int, int]

    def present(self) -> dict[Phase, Steps]:
        """The phases that have steps, by name."""
        named: dict[Phase, Steps] = {"decode": self.decode, "prefill": self.prefill, "mixed": self.mixed}
        return {phase: steps for phase, steps in named.items() if len(steps)}


@dataclass(frozen=True)
class Limits:
    """What the hardware needs at least per unit of each term, over all ranks together (data-sheet rates)."""

    weights_us: float
    kv_us: float
    token_us: float
    pair_us: float

    @classmethod
    def of(cls, arch: Architecture, device: Device, precision: Precision, tp: int) -> Limits:
        """Weights (with the LM head, without the input embedding) and KV cache are read once per step, every token
        is multiplied with every layer's weights, every query-key pair costs its attention FLOPs."""
        bandwidth, peak = tp * device.bandwidth_gb_s * 1e3, tp * device.tflops * 1e6
        head = arch.vocab * arch.hidden if arch.decoder else 0
        return cls(
            weights_us=(arch.linear_parameters + head) * precision.weight_bytes / bandwidth,
            kv_us=arch.kv_bytes_per_token(precision.kv_bytes) / bandwidth,
            token_us=arch.flops_per_token / peak,
            pair_us=arch.flops_per_pair / peak,
        )


def fit_model(name: str, phases: Phases, limits: Limits) -> tuple[TimeModel, dict[Phase, FitError]]:
    """Fit each phase on three quarters of its conditions, and report the error on the rest."""
    parts = {phase: steps.split(f"{name}/{phase}") for phase, steps in phases.present().items()}
    values = fit_prefill(parts["prefill"][0], limits)
    if "decode" in parts:
        values |= fit_decode(parts["decode"][0], limits)
    model = TimeModel(**values, mixed_permille=1000)
    if "mixed" in parts:
        model = msgspec.structs.replace(model, mixed_permille=fit_mixed(model, parts["mixed"][0]))
    errors = {
        phase: measure(predict_us(model, held), held.time_us, train=len(train))
        for phase, (train, held) in parts.items()
    }
    return model, errors


def fit_decode(steps: Steps, limits: Limits) -> dict[str, float]:
    """``base + per_seq * seqs + per_kv_token * kv``."""
    columns = np.stack([np.ones(len(steps)), steps.seqs, steps.kv], axis=1)
    base, seq, kv = _relative_lsq(columns, steps.time_us, [limits.weights_us, 0.0, limits.kv_us])
    return {
        "decode_base_us": rounded(base),
        "decode_per_seq_us": rounded(seq),
        "decode_per_kv_token_ns": rounded_ns(kv * 1e3),
    }


def fit_prefill(steps: Steps, limits: Limits) -> dict[str, float]:
    """``max(floor, base + per_token * P + per_token2 * A)``.

    Which points lie on the floor is not known, so every knee between the observed token counts is tried: below it the
    floor is fitted, above it the line; the pair whose *maximum* has the least squared relative error wins.
    """
    best: tuple[float, dict[str, float]] | None = None
    for knee in [0.0, *np.unique(steps.tokens)]:
        below = steps.tokens <= knee
        if int((~below).sum()) < MIN_LINEAR_POINTS:
            break
        above = steps.where(~below)
        columns = np.stack([np.ones(len(above)), above.tokens, above.pairs], axis=1)
        base, token, pair = _relative_lsq(columns, above.time_us, [0.0, limits.token_us, limits.pair_us])
        floor = _relative_lsq(np.ones((int(below.sum()), 1)), steps.time_us[below], [0.0])[0] if below.any() else 0.0
        values = {
            "prefill_floor_us": rounded(floor),
            "prefill_base_us": rounded(base),
            "prefill_per_token_us": rounded(token),
            "prefill_per_token2_ns": rounded_ns(pair * 1e3),
        }
        loss = float(np.sum((predict_us(TimeModel(**values, mixed_permille=1000), steps) / steps.time_us - 1) ** 2))
        if best is None or loss < best[0]:
            best = (loss, values)
    if best is None:
        raise ValueError(f"prefill: {len(steps)} points are too few to fit")
    return best[1]


def fit_mixed(model: TimeModel, steps: Steps) -> int:
    """The factor, in thousandths, on the decode terms of a mixed step, given the other coefficients."""
    alone = model.prefill_us(steps.tokens, steps.pairs)
    beside = model.decode_per_seq_us * steps.seqs + model.decode_per_kv_token_ns * steps.kv / 1e3
    x, y = beside / steps.time_us, (steps.time_us - alone) / steps.time_us
    return max(0, round(1000 * float(x @ y) / float(x @ x)))


def predict_us(model: TimeModel, steps: Steps) -> Floats:
    """Time of every step, in us, by the phase its columns imply."""
    return np.asarray(model.step_us(steps.tokens, steps.pairs, steps.seqs, steps.kv), dtype=np.float64)


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


def check_bounds(model: TimeModel, steps: Steps, limits: Limits) -> float:
    """Largest share of the hardware's limit that the fit claims at any of ``steps``; BoundError when over 1."""
    read_us = limits.weights_us + limits.kv_us * steps.kv
    compute_us = limits.token_us * (steps.tokens + steps.seqs) + limits.pair_us * (steps.pairs + steps.kv)
    share = np.maximum(read_us, compute_us) / predict_us(model, steps)
    worst = int(np.argmax(share))
    if share[worst] > 1:
        raise BoundError(
            f"the fit beats the {'bandwidth' if read_us[worst] > compute_us[worst] else 'FLOP'} bound "
            f"{share[worst]:.2f} times at P={steps.tokens[worst]:g}, A={steps.pairs[worst]:g}, "
            f"seqs={steps.seqs[worst]:g}, KV={steps.kv[worst]:g}: check the units and the source"
        )
    return float(share[worst])


def _relative_lsq(columns: Floats, actual: Floats, lowest: list[float]) -> Floats:
    """x >= lowest that minimises the sum of (columns @ x / actual - 1)^2."""
    relative = columns / actual[:, None]
    rest = 1 - relative @ np.array(lowest)
    scale = np.linalg.norm(relative, axis=0)  # columns span eight decades: without this nnls loses the small ones
    return np.asarray(nnls(relative / scale, rest)[0] / scale + lowest, dtype=np.float64)


def rounded(value: float) -> float:
    """Five significant digits: what the YAML shows."""
    return float(f"{value:.5g}")


def rounded_ns(value: float) -> float:
    """The same in whole picoseconds, which is what the engine computes with."""
    return round(rounded(value), 3)
