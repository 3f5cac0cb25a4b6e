"""Time per output token of real engines in a closed loop, against composed kernels: the error on rows left out.

``calibration_e2e_silicon.parquet`` holds mean TPOT of engines under closed loops of clients. Dense models in one pool
of GPUs are compared, in three steps:

1. **Work.** The loop is replayed with the engine's rules (``closed_loop``), priced with measured kernels (``Kernels``)
   where the GPU has tables and by roofline (``RooflineKernels``) where it has none.
2. **Correction**, six weights and two ceilings per group of rows (:class:`Correction`): how much slower than alone each
   kind of kernel runs in that engine, what its CPU adds per iteration, sequence and request, and the rates above which
   the engine is not what limits (a load generator that cannot read faster).
3. **Left out.** The correction for a row never saw that row (``row``); or no row of its tensor-parallel degree
   (``degree``); or no row of its GPU, model and engine, only other rows of that engine, or of all engines where there
   are none (``setup``). Three answers to three questions: another load on a machine that was measured, another number
   of GPUs, another machine.

Repeats of one configuration are replaced by their mean, since a repeat of a training point is no test. Groups of fewer
than ``GROUP_MIN`` configurations cannot carry a correction; they are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from profile_fit.architecture import BF16, FP8, GIB, LLAMA_31_8B, Architecture, read_device
from profile_fit.checks import compared
from profile_fit.closed_loop import WORK, Costs, Load, Rules, Work, work_per_token
from profile_fit.kernels import Kernels
from profile_fit.models import LLAMA_31_70B
from profile_fit.roofline import MEASURED, RooflineKernels, prior
from profile_fit.steps import Floats
from sage_core.errors import DataError
from sage_sim.profile import Check

SILICON = "calibration_e2e_silicon.parquet"
GROUP_MIN = 20
Group: TypeAlias = tuple[str, str, str, str]
"""``(gpu, model, engine, precision)``."""

ARCHITECTURES: dict[str, Architecture] = {
    "meta-llama/Llama-3.1-70B": LLAMA_31_70B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_31_8B,
    "nvidia/Llama-3.1-8B-Instruct-FP8": LLAMA_31_8B,
}
DENSE = "Llama-3.1|Qwen3-32B"
RULES = {
    "vllm": Rules(8192, mixed=True, reserve=False),
    "trtllm": Rules(8192, mixed=True, reserve=True),
    "sglang": Rules(8192, mixed=False, reserve=False),
}
INFERENCEMAX = "2026-04-06.csv"
"""Origin of the InferenceMAX rows: ten requests a client, lengths from 0.8 of the nominal, no prefix cache."""

WAVES = 3
"""Requests a client where the source does not say; lengths are then exact."""

KEYS = ["gpu", "model", "engine", "precision", "tp_size", "isl", "osl", "batch_size"]
"""A configuration; the first four are its group."""

NOT_STATED = "not stated"
FP8_CACHE = replace(FP8, kv_bytes=1)
FP4_WEIGHT_BYTES = 0.5625
"""Four bits, and one FP8 scale for sixteen weights."""

OUTSIDE_GIB = 3.0
"""Of a GPU's memory for context, graphs and activations: leaves the KV room at which H100 rows begin to queue."""


@dataclass(frozen=True)
class Measured:
    """One configuration: its group, its work, and its measured TPOT (mean over repeats)."""

    group: Group
    degree: int
    load: Load
    work: Work
    tpot_ms: float


@dataclass(frozen=True)
class Correction:
    """TPOT = the largest of ``weights @ work``, ``per_sequence_ms`` a sequence and ``per_request_ms`` a request."""

    weights: Floats
    per_sequence_ms: float = 0.0
    per_request_ms: float = 0.0

    def tpot_ms(self, work: Floats) -> Floats:
        """Of rows of work, ``[rows, kinds]``."""
        return np.maximum(work @ self.weights, self._ceiling_ms(work))

    def limited_by_engine(self, work: Floats) -> np.ndarray:
        """Which rows the ceilings do not touch."""
        return work @ self.weights >= self._ceiling_ms(work)

    def error(self, work: Floats, tpot_ms: Floats) -> float:
        """Mean absolute relative error."""
        return float(np.mean(np.abs(self.tpot_ms(work) / tpot_ms - 1)))

    def _ceiling_ms(self, work: Floats) -> Floats:
        sequences, requests = work[:, WORK.index("sequences")], work[:, WORK.index("requests")]
        return np.maximum(self.per_sequence_ms * sequences, self.per_request_ms * requests)


@dataclass(frozen=True)
class LeftOut:
    """Errors in per cent on configurations that the correction has not seen."""

    mape_pct: float
    ape_pct_p95: float
    bias_pct: float
    configurations: int

    @classmethod
    def of(cls, predicted: Floats, rows: Sequence[Measured]) -> LeftOut:
        """Predictions beside the measurements of ``rows``."""
        error = 100 * (predicted / np.array([row.tpot_ms for row in rows]) - 1)
        return cls(
            round(float(np.mean(np.abs(error))), 2),
            round(float(np.percentile(np.abs(error), 95)), 2),
            round(float(np.mean(error)), 2),
            len(rows),
        )


@dataclass(frozen=True)
class Silicon:
    """The comparison. ``uncorrected``: kernels alone. ``small``: groups left out, with their sizes."""

    row: LeftOut
    degree: LeftOut
    setup: LeftOut
    uncorrected: LeftOut
    by_group: dict[Group, dict[str, LeftOut]]
    small: dict[Group, int]


def leave_one_out(data: Path) -> Silicon:
    """The errors of TPOT, three ways of leaving out, over all configurations and by group.

    Deterministic. Raises OSError when the table or the kernels are absent.
    """
    return left_out(*configurations(data))


def left_out(rows: list[Measured], small: dict[Group, int]) -> Silicon:
    """The same of given configurations."""
    computed = [row for row in rows if row.group not in cached_groups(rows)]
    seen: dict[str, Callable[[Measured, Measured], bool]] = {
        "row": lambda row, other: other.group == row.group and other is not row,
        "degree": lambda row, other: other.group == row.group and other.degree != row.degree,
    }
    predicted = {name: (rows, _predicted(rows, allowed, ceilings=True)) for name, allowed in seen.items()}
    predicted["setup"] = (computed, _predicted(computed, _other_setup, ceilings=False))
    predicted["uncorrected"] = (rows, _works(rows)[:, :3].sum(axis=1))
    return Silicon(
        **{name: LeftOut.of(values, of) for name, (of, values) in predicted.items()},
        by_group=_by_group(predicted),
        small=small,
    )


def kernels_alone(data: Path, group: Group, degree: int) -> Check:
    """The configurations of one group and degree against kernels without a correction, as a profile has them."""
    table = _table(data / SILICON)
    chosen = [key == (*group, degree) for key in table[KEYS[:5]].itertuples(index=False, name=None)]
    rows = _of_degree(data, group, degree, table[chosen])
    return compared(
        f"{SILICON} (measured TPOT, {' '.join(group)}, TP {degree})",
        _works(rows)[:, :3].sum(axis=1),
        np.array([row.tpot_ms for row in rows]),
        "closed loops replayed with the kernels of this profile, without any correction for the engine",
    )


def compare(data: Path, path: Path) -> LeftOut:
    """Another table of the same schema, against corrections from all of ``data``'s rows.

    A group that ``data`` has uses its own correction, another one the weights of its engine. DataError: a model or
    engine that is not known here.
    """
    rows, _ = configurations(data)
    others, _ = configurations(data, path, group_min=1)
    corrections = {}
    for other in others:
        if other.group not in corrections:
            same = [row for row in rows if row.group == other.group]
            corrections[other.group] = _fitted(same or _of_engine(rows, other), ceilings=bool(same))
    predicted = [corrections[other.group].tpot_ms(other.work[None, :])[0] for other in others]
    return LeftOut.of(np.array(predicted), others)


@cache
def configurations(
    data: Path, path: Path | None = None, group_min: int = GROUP_MIN
) -> tuple[list[Measured], dict[Group, int]]:
    """Every configuration of a dense model with its work, and the groups that are too small, with their sizes.

    ``data``: folder of the kernel tables; ``path``: the table of measurements, if not the one in ``data``.
    """
    table = _table(path or data / SILICON)
    groups = list(table[KEYS[:4]].itertuples(index=False, name=None))
    kept: list[Measured] = []
    small: dict[Group, int] = {}
    for group in sorted(set(groups)):
        rows = table[[other == group for other in groups]]
        if len(rows) < group_min:
            small[group] = len(rows)
            continue
        for degree in sorted(set(rows.tp_size.tolist())):
            kept += _of_degree(data, group, degree, rows[rows.tp_size == degree])
    return kept, small


def cached_groups(rows: list[Measured]) -> set[Group]:
    """Groups with a row that took less than the kernels of its prompts take alone."""
    return {row.group for row in rows if row.work[WORK.index("prompts")] > row.tpot_ms}


def fit(work: Floats, tpot_ms: Floats, ceilings: bool = True) -> Correction:
    """The correction of rows of work ``[rows, kinds]``: least squares on relative error, then the ceilings.

    Ceilings and weights depend on each other: a row at a ceiling says nothing about the weights. They are fitted in
    turns, and the best of the turns is kept; a ceiling that does not help stays 0. Without ``ceilings`` the weights
    alone, for a machine with other clients than those of the rows.
    """
    turn = best = Correction(_weights(work, tpot_ms))
    if not ceilings:
        return best
    for _ in range(TURNS):
        turn = _with_ceilings(turn, work, tpot_ms)
        inside = turn.limited_by_engine(work)
        if inside.sum() < 2 * len(WORK):
            break
        turn = replace(turn, weights=_weights(work[inside], tpot_ms[inside]))
        if turn.error(work, tpot_ms) >= best.error(work, tpot_ms):
            break
        best = turn
    return best


TURNS = 4
CEILING_GAIN = 0.001


def _table(path: Path) -> pd.DataFrame:
    """Dense models in one pool, a row a configuration: TPOT is the mean of its repeats."""
    table = pd.read_parquet(path)
    table = table[(table["mode"] == "agg") & table.model.str.contains(DENSE)]
    table = table.assign(precision=table.precision.fillna(NOT_STATED))
    table = table.groupby(KEYS, as_index=False).agg({"tpot_ms": "mean", "origin": "first"})
    return table.assign(tp_size=table.tp_size.astype(int), batch_size=table.batch_size.astype(int))


def _with_ceilings(correction: Correction, work: Floats, tpot_ms: Floats) -> Correction:
    # The rows at a ceiling are those with the least time a unit, so it lies in the lower half of what was seen.
    shares = np.linspace(0, 0.5, 24)
    sequences, requests = (np.maximum(work[:, WORK.index(kind)], 1e-9) for kind in ("sequences", "requests"))
    tried = np.quantile(tpot_ms / sequences, shares).tolist()
    correction = _best([replace(correction, per_sequence_ms=value) for value in [0.0, *tried]], work, tpot_ms)
    tried = np.quantile(tpot_ms / requests, shares).tolist()
    return _best([replace(correction, per_request_ms=value) for value in [0.0, *tried]], work, tpot_ms)


def _best(choices: list[Correction], work: Floats, tpot_ms: Floats) -> Correction:
    """The choice with the least error, but the first where the others gain less than ``CEILING_GAIN``: a ceiling
    through one row of the fit would bind where nothing was seen."""
    errors = [choice.error(work, tpot_ms) for choice in choices]
    best = int(np.argmin(errors))
    return choices[best] if errors[best] < errors[0] - CEILING_GAIN else choices[0]


def _weights(work: Floats, tpot_ms: Floats) -> Floats:
    relative = work / tpot_ms[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1
    return np.asarray(nnls(relative / scale, np.ones(len(tpot_ms)))[0] / scale, dtype=np.float64)


def _predicted(rows: list[Measured], allowed: Callable[[Measured, Measured], bool], ceilings: bool) -> Floats:
    """TPOT of every row by a correction of the rows it may see."""
    known: dict[tuple[int, ...], Correction] = {}
    out = []
    for row in rows:
        seen = [i for i, other in enumerate(rows) if allowed(row, other)]
        engine = [i for i in seen if rows[i].group[2] == row.group[2]]
        key = tuple(engine or seen)
        if key not in known:
            known[key] = _fitted([rows[i] for i in key], ceilings)
        out.append(known[key].tpot_ms(row.work[None, :])[0])
    return np.array(out)


def _other_setup(row: Measured, other: Measured) -> bool:
    return other.group[:3] != row.group[:3]


def _of_engine(rows: list[Measured], row: Measured) -> list[Measured]:
    cached = cached_groups(rows)
    computed = [other for other in rows if other.group not in cached]
    return [other for other in computed if other.group[2] == row.group[2]] or computed


def _by_group(predicted: dict[str, tuple[list[Measured], Floats]]) -> dict[Group, dict[str, LeftOut]]:
    out: dict[Group, dict[str, LeftOut]] = {}
    for name, (rows, values) in predicted.items():
        for group in sorted({row.group for row in rows}):
            mine = [i for i, row in enumerate(rows) if row.group == group]
            out.setdefault(group, {})[name] = LeftOut.of(values[mine], [rows[i] for i in mine])
    return out


def _fitted(rows: list[Measured], ceilings: bool) -> Correction:
    return fit(_works(rows), np.array([row.tpot_ms for row in rows]), ceilings)


def _works(rows: list[Measured]) -> Floats:
    return np.array([row.work for row in rows])


def _of_degree(data: Path, group: Group, degree: int, rows: pd.DataFrame) -> list[Measured]:
    gpu, model, engine, precision = group
    if model not in ARCHITECTURES or engine not in RULES:
        raise DataError(
            f"{SILICON}: {model} under {engine} is not known; known models: {', '.join(ARCHITECTURES)}; "
            f"engines: {', '.join(RULES)}"
        )
    kernels, rules = _kernels(data, group, degree), RULES[engine]
    seqs_max = int(rows.batch_size.max())
    costs = Costs(kernels, rules.budget + seqs_max, seqs_max)
    out = []
    columns = ["isl", "osl", "batch_size", "tpot_ms", "origin"]
    for isl, osl, clients, tpot_ms, origin in rows[columns].itertuples(index=False, name=None):
        maxed = origin == INFERENCEMAX
        load = Load(isl, osl, clients, clients * (10 if maxed else WAVES), 0.8 if maxed else 1.0)
        name = f"silicon/{gpu}/{engine}/{isl}x{osl}/{clients}"
        work = work_per_token(load, rules, costs, _kv_tokens(kernels, precision), name)
        out.append(Measured(group, degree, load, work, float(tpot_ms)))
    return out


def _kernels(data: Path, group: Group, degree: int) -> Kernels:
    gpu, model, _, stated = group
    arch = ARCHITECTURES[model]
    # The one group that states no precision decodes as slowly as reading 16-bit weights takes.
    precision = BF16 if stated == NOT_STATED else FP8
    if gpu in MEASURED:
        return Kernels(data, arch, read_device(data, gpu, precision), precision, degree)
    # B200 ran with an FP8 cache: twice the requests fit before it queues. The H100 rows queue as with 16 bits.
    device = read_device(data, gpu, FP8_CACHE)
    if stated == "fp4":
        doubled = replace(device, tflops=2 * device.tflops)
        return RooflineKernels(data, arch, doubled, FP8_CACHE, degree, prior(data, FP8), FP4_WEIGHT_BYTES)
    return RooflineKernels(data, arch, device, FP8_CACHE, degree, prior(data, FP8))


def _kv_tokens(kernels: Kernels, stated: str) -> int:
    arch = kernels.model
    per_weight = FP4_WEIGHT_BYTES if stated == "fp4" else kernels.precision.weight_bytes
    weights = arch.linear_parameters * per_weight + 2 * arch.vocab * arch.hidden * 2
    room = kernels.tp * (0.9 * kernels.device.memory_gib - OUTSIDE_GIB) * GIB - weights
    return int(room / arch.kv_bytes_per_token(kernels.precision.kv_bytes))
