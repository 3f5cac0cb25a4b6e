"""Kernel times of a GPU that nobody measured: rates of its data sheet times efficiencies of GPUs that were measured.

Each kind of kernel has a fixed cost and a share of the data-sheet rate it reaches::

    GEMM               launch + max(bytes / (bandwidth * share), FLOPs / (peak * share))
    decode attention   launch + KV bytes / (bandwidth * share)
    prompt attention   launch + FLOPs / (peak * share)          decoder and encoder apart
    all-reduce         latency + bytes on the link / (link * share)

The shares are fitted to the tables of one GPU (:func:`calibrate`). A GPU without tables gets the mean over those with
tables (:func:`prior`), and the error of that is what the same mean, taken without a measured GPU, does on that GPU
(:func:`left_out_errors`). It is a prior: tiles, wave quantisation and power limits are not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from profile_fit.architecture import Architecture, Device, Precision, read_device
from profile_fit.checks import compared
from profile_fit.kernels import GRAPH_TOKENS_MAX, OPS, Kernels, SmallKernels
from profile_fit.steps import Floats
from sage_sim.hardware import facts
from sage_sim.profile import Check

MEASURED = ("a100_sxm", "h100_sxm", "h200_sxm", "l40s")
"""GPUs with kernel tables."""

NVLINK = ("a100_sxm", "h100_sxm", "h200_sxm")

GEMM_WIDTHS = (1024, 16384)
"""Weight matrices of a layer lie in this range; narrower kernels are all launch."""

GEMM_TOKENS_MAX = 8192
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DECODE_STEPS = (63, 127, 255, 511, 1023, 2047, 4095, 8191, 16383)
PROMPTS = (1, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 10240, 12288, 16384)
CHECKED_PROMPTS = (16, 64, 256, 700, 1400, 2700, 5400, 8192)
PROMPT_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Efficiency:
    """Fixed costs in us; shares of the data-sheet bandwidth, peak FLOPs and link rate. NaN: no such table."""

    gemm_launch_us: float
    gemm_bandwidth: float
    gemm_flops: float
    decode_launch_us: float
    decode_bandwidth: float
    prompt_launch_us: float
    prompt_flops: float
    encoder_launch_us: float
    encoder_flops: float
    reduce_graph_us: float
    reduce_eager_us: float
    reduce_link: float


def calibrate(data: Path, name: str, precision: Precision) -> Efficiency:
    """The efficiencies of one GPU that has tables, at one precision of its matrix multiplications.

    ``name`` is one of ``MEASURED``. KeyError when the GPU has no kernels of that precision.
    """
    device = read_device(data, name, precision)
    rows = _rows(data, name)
    graph, eager, link = _fit_reduce(rows[rows.op_name == "all_reduce"], name)
    attention = rows[(rows.head_dim == 128) & (rows.window_size.fillna(0) == 0) & rows.num_key_value_heads.le(8)]
    attention = attention[attention.kv_cache_dtype == "bfloat16"]
    sixteen_bits = read_device(data, name, Precision("bf16", 2, 2))
    return Efficiency(
        *_fit_gemm(rows[rows.op_name == "gemm"], device, precision),
        *_fit_decode(attention[attention.op_name == "generation_attention"], device),
        *_fit_prompt(attention[(attention.op_name == "context_attention") & _grouped(attention)], sixteen_bits, 1),
        *_fit_prompt(rows[(rows.op_name == "encoder_attention") & (rows.head_dim == 64)], sixteen_bits, 2),
        graph,
        eager,
        link,
    )


def prior(data: Path, precision: Precision, without: str | None = None) -> Efficiency:
    """Mean of the measured GPUs, but ``without``. All-reduce is that of the GPUs with NVLink: PCIe is another thing."""
    known = [name for name in measured(precision) if name != without]
    each = {name: calibrate_once(data, name, precision) for name in known}
    means = {}
    for field in fields(Efficiency):
        names = [name for name in known if name in NVLINK or not field.name.startswith("reduce")]
        means[field.name] = float(np.nanmean([getattr(each[name], field.name) for name in names]))
    return Efficiency(**means)


def measured(precision: Precision) -> list[str]:
    """The GPUs with tables of that precision: an A100 has no FP8."""
    return [name for name in MEASURED if not (precision.name == "fp8" and name == "a100_sxm")]


@cache
def calibrate_once(data: Path, name: str, precision: Precision) -> Efficiency:
    """:func:`calibrate`, remembered."""
    return calibrate(data, name, precision)


def data_sheet(name: str, precision: Precision) -> Device:
    """A device of ``hardware.yaml``; KeyError when it lacks a rate that kernels need."""
    known = facts(name)
    peak = known and (known.fp8_tflops if precision.fp8_peak else known.bf16_tflops)
    if not (known and known.memory_gib and known.bandwidth_gb_s and known.tdp_w and peak):
        raise KeyError(f"hardware.yaml: {name} has no memory, bandwidth, TDP or peak at {precision.name}")
    return Device(name, known.memory_gib, known.bandwidth_gb_s, peak, known.tdp_w)


def left_out_checks(data: Path, model: Architecture, precision: Precision) -> list[Check]:
    """Steps of ``model`` on each measured GPU, on one rank: the prior of the others against its own kernels."""
    checks = []
    for name in measured(precision):
        if not model.decoder and np.isnan(calibrate_once(data, name, precision).encoder_flops):
            continue
        device = read_device(data, name, precision)
        modelled = RooflineKernels(data, model, device, precision, 1, prior(data, precision, without=name))
        kernels = Kernels(data, model, device, precision, 1)
        against = f"{name} left out of the prior: steps composed of its own kernels"
        batches = sorted(modelled.generation.keys() & kernels.generation.keys())
        if model.decoder:
            predicted, actual = (np.array([_decode_step(k, *batch) for batch in batches]) for k in (modelled, kernels))
            checks.append(compared(f"{against}, decode", predicted, actual, "1 to 512 sequences, 63 to 16,383 tokens"))
        prompts = [prompt for prompt in CHECKED_PROMPTS if prompt <= model.positions]
        predicted, actual = (np.array([_prompt_step(k, prompt) for prompt in prompts]) for k in (modelled, kernels))
        checks.append(compared(f"{against}, prefill", predicted, actual, f"one prompt of 16 to {prompts[-1]:,} tokens"))
    return checks


class RooflineKernels(Kernels):
    """Steps composed as in :class:`Kernels`, from modelled instead of measured kernels.

    ``weight_bytes``: bytes per weight where they are not whole (4-bit weights with their scales).
    """

    def __init__(
        self,
        data: Path,
        model: Architecture,
        device: Device,
        precision: Precision,
        tp: int,
        efficiency: Efficiency,
        weight_bytes: float | None = None,
    ) -> None:
        self.model, self.device, self.precision, self.tp = model, device, precision, tp
        self.small = SmallKernels.read(data)
        self.version = "none"
        self.efficiency = efficiency
        self._weight_bytes = precision.weight_bytes if weight_bytes is None else weight_bytes
        self._bandwidth = device.bandwidth_gb_s * 1e3
        self._peak = device.tflops * 1e6
        known = facts(device.name)
        self._link = known.link_gb_s * 1e3 if known is not None and known.link_gb_s else None
        self.generation = {(n, c): self._decode_us(n, c) for n in DECODE_BATCHES for c in DECODE_STEPS}
        lengths = np.array(PROMPTS, dtype=np.float64)
        per_token = {b: np.array([self._prompt_us(b, p) / p for p in PROMPTS]) for b in PROMPT_BATCHES}
        self._context = {batch: (lengths, times) for batch, times in per_token.items()}

    def gemm_us(self, m: int, n: int, k: int) -> float:
        """One matrix multiplication, ``[m, k] x [k, n]``."""
        moved = self._weight_bytes * (n * k + m * k) + 2 * m * n
        read = moved / (self._bandwidth * self.efficiency.gemm_bandwidth)
        return self.efficiency.gemm_launch_us + max(read, 2 * m * n * k / (self._peak * self.efficiency.gemm_flops))

    def _decode_us(self, seqs: int, context: int) -> float:
        values = seqs * context * 2 * max(1, self.model.kv_heads // self.tp) * self.model.head_dim
        rate = self._bandwidth * self.efficiency.decode_bandwidth
        return self.efficiency.decode_launch_us + values * self.precision.kv_bytes / rate

    def _prompt_us(self, batch: int, prompt: int) -> float:
        # FP8 peaks count twice what 16-bit attention reaches.
        peak = self._peak / 2 if self.precision.fp8_peak else self._peak
        known = self.efficiency
        pairs = 2 * batch * prompt**2 * (self.model.heads // self.tp) * self.model.head_dim
        if self.model.decoder:
            return known.prompt_launch_us + pairs / (peak * known.prompt_flops)
        return known.encoder_launch_us + 2 * pairs / (peak * known.encoder_flops)

    def _all_reduce_us(self, tokens: int) -> float:
        if self._link is None:
            raise KeyError(f"hardware.yaml: {self.device.name} has no link_gb_s, which tensor parallelism needs")
        latency = self.efficiency.reduce_graph_us if tokens <= GRAPH_TOKENS_MAX else self.efficiency.reduce_eager_us
        sent = float(_on_link(np.float64(tokens * self.model.hidden), np.float64(self.tp)))
        return latency + sent / (self._link * self.efficiency.reduce_link)


def _on_link(values: np.float64 | Floats, ranks: np.float64 | Floats) -> np.float64 | Floats:
    """Bytes of 16-bit ``values`` that each of ``ranks`` sends in a ring all-reduce."""
    return np.asarray(2 * values * 2 * (ranks - 1) / ranks)


def _decode_step(kernels: Kernels, seqs: int, context: int) -> float:
    each = kernels.linear_us(seqs) + kernels.generation_us(seqs, context)
    return kernels.model.layers * each + kernels.finish_us(seqs)


def _prompt_step(kernels: Kernels, tokens: int) -> float:
    each = kernels.linear_us(tokens) + kernels.prompts_us(1, tokens)
    return kernels.model.layers * each + kernels.finish_us(1)


@cache
def _rows(data: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(data / OPS, filters=[("system", "=", name)])


def _fit_gemm(rows: pd.DataFrame, device: Device, precision: Precision) -> tuple[float, float, float]:
    kernel = "fp8" if precision.name == "fp8" else "bfloat16"
    low, high = GEMM_WIDTHS
    rows = rows[(rows.gemm_dtype == kernel) & rows.n.between(low, high) & rows.k.between(low, high)]
    if rows.empty:
        raise KeyError(f"{OPS}: {device.name} has no {kernel} matrix multiplications")
    best = rows[rows.m <= GEMM_TOKENS_MAX].groupby(["m", "n", "k"]).latency_ms.min().reset_index()
    m, n, k, times = (best[column].to_numpy(np.float64) for column in ("m", "n", "k", "latency_ms"))
    bandwidth = device.bandwidth_gb_s * 1e3
    weights = n * k * precision.weight_bytes / bandwidth
    moved = (precision.weight_bytes * (n * k + m * k) + 2 * m * n) / bandwidth
    flops = 2 * m * n * k / (device.tflops * 1e6)
    launch, read, compute = _fit(
        lambda p: p[0] + np.maximum(moved / p[1], flops / p[2]), np.maximum(times * 1e3, weights), (3.0, 0.8, 0.7)
    )
    return launch, read, compute


def _fit_decode(rows: pd.DataFrame, device: Device) -> tuple[float, float]:
    rows = rows[rows.step.isin(DECODE_STEPS) & rows.batch_size.le(max(DECODE_BATCHES)) & _grouped(rows)]
    cached = rows.batch_size.to_numpy(np.float64) * (rows.step.to_numpy(np.float64) + 1)
    moved = cached * rows.num_key_value_heads.to_numpy(np.float64) * 128 * 4 / (device.bandwidth_gb_s * 1e3)
    # A cache that fits the L2 is read faster than from memory; a real step has evicted it.
    times = np.maximum(rows.latency_ms.to_numpy(np.float64) * 1e3, moved)
    launch, read = _fit(lambda p: p[0] + moved / p[1], times, (10.0, 0.8))
    return launch, read


def _fit_prompt(rows: pd.DataFrame, device: Device, ways: int) -> tuple[float, float]:
    """``ways``: a causal prompt has half the pairs of one that attends both ways."""
    rows = rows[rows.isl * rows.batch_size <= max(PROMPTS)]
    if rows.empty:
        return np.nan, np.nan
    batch, prompt, heads, dim = (rows[c].to_numpy(np.float64) for c in ("batch_size", "isl", "num_heads", "head_dim"))
    flops = ways * 2 * batch * prompt**2 * heads * dim / (device.tflops * 1e6)
    times = rows.latency_ms.to_numpy(np.float64) * 1e3
    launch, compute = _fit(lambda p: p[0] + flops / p[1], times, (10.0, 0.5))
    return launch, compute


def _fit_reduce(rows: pd.DataFrame, name: str) -> tuple[float, float, float]:
    known = facts(name)
    assert known is not None and known.link_gb_s is not None
    sizes, ranks, times = (rows[c].to_numpy(np.float64) for c in ("message_size", "num_gpus", "latency_ms"))
    graph = (rows.backend == "vllm_graph").to_numpy()
    sent = np.asarray(_on_link(sizes, ranks)) / (known.link_gb_s * 1e3)
    one, other, link = _fit(lambda p: np.where(graph, p[0], p[1]) + sent / p[2], times * 1e3, (5.0, 20.0, 0.6))
    return one, other, link


def _grouped(rows: pd.DataFrame) -> pd.Series:
    """Query groups as models have them: four to eight query heads for a key-value head."""
    return (rows.num_heads / rows.num_key_value_heads).isin([4, 5, 8])


def _fit(law: Callable[[Floats], Floats], times: Floats, start: tuple[float, ...]) -> tuple[float, ...]:
    """Positive parameters that minimise the logarithmic error; a tail of odd shapes counts linearly."""

    def errors(logarithms: Floats) -> Floats:
        return np.asarray(np.log(law(np.exp(logarithms)) / times), dtype=np.float64)

    found = least_squares(errors, np.log(np.array(start)), loss="soft_l1", f_scale=0.1)
    return tuple(float(value) for value in np.exp(found.x))
