"""Comparisons of a fitted profile with measurements it was not made from: profile over measured.

A comparison across engine versions is kept although it fails: it shows what a change of engine is worth, which is the
reason why profiles of different versions are never mixed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from profile_fit.kernels import Kernels
from profile_fit.steps import Floats, Steps, decode, predict_us, prefill
from sage_sim.iteration import IterationTime
from sage_sim.profile import Check

VIDUR_OPS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
"""Vidur's names of a layer's weight matrices."""


def compared(against: str, predicted: Floats, actual: Floats, note: str) -> Check:
    """Mean absolute and mean signed difference in per cent of ``actual``."""
    error = 100 * (np.asarray(predicted, dtype=np.float64) / np.asarray(actual, dtype=np.float64) - 1)
    mape, bias = float(np.mean(np.abs(error))), float(np.mean(error))
    return Check(against, len(error), round(mape, 2), round(bias, 2), note)


def of_composed(data: Path, name: str, kernels: Kernels, law: IterationTime) -> list[Check]:
    """What there is for a composed LLM: interpolation, Vidur's exact shapes, real runs of the same model."""
    checks = [interpolation(kernels)]
    model, gpu = kernels.model.name, kernels.device.name.removesuffix("_sxm")
    vidur_model = {"meta-llama/Llama-3.1-8B": "meta-llama/Meta-Llama-3-8B"}.get(model, model)
    if kernels.precision.name == "bf16":
        checks += _linear_layers(data, kernels, gpu, vidur_model)
    if model == "meta-llama/Llama-2-70b-hf" and gpu == "a100":
        checks += _older_engine(data, law, kernels.tp)
    if name == "llama-3.1-8b-h200-fp8-tp1":
        checks.append(_closed_loop(data, law))
    return checks


def interpolation(kernels: Kernels) -> Check:
    """Time at each measured width from its two neighbours: what interpolating an unmeasured width costs."""
    predicted, actual = [], []
    for by_width in kernels.gemm_table().values():
        widths = [width for width in sorted(by_width) if width >= 1024]
        for low, middle, high in zip(widths, widths[1:], widths[2:], strict=False):
            ms, times = by_width[middle]
            keep = np.isin(ms, [1, 16, 64, 256, 1024, 4096])
            at_low, at_high = (np.interp(ms[keep], *by_width[width]) for width in (low, high))
            predicted.append(at_low + (at_high - at_low) * (middle - low) / (high - low))
            actual.append(times[keep])
    note = "single matrix multiplications, each width from its neighbours; scatter averages out over a layer, bias not"
    return compared(
        "the same kernel table, one width left out", np.concatenate(predicted), np.concatenate(actual), note
    )


def of_rtx4090(data: Path, law: IterationTime, kv_tokens_max: int) -> list[Check]:
    """A real vLLM 0.19 run on the same GPU: seconds of pure decoding, and the KV capacity it reported."""
    ticks = pd.read_parquet(data / "e2e_vllm_timeseries_rtx4090.parquet")
    requests = pd.read_parquet(data / "e2e_vllm_requests_rtx4090.parquet")
    capacity = int(requests.kv_tokens.iloc[0])
    # A tick averages a second, and a prompt is booked when it completes. Keep seconds in which nothing was admitted:
    # no prompt tokens now or next, the queue not shorter and the batch not larger than before; drop the ragged end.
    quiet = (ticks.prompt_throughput == 0) & (ticks.prompt_throughput.shift(-1) == 0) & (ticks.running >= 8)
    quiet &= (ticks.waiting >= ticks.waiting.shift(1)) & (ticks.running <= ticks.running.shift(1))
    ticks = ticks[quiet]
    kv = ticks.kv_cache_pct.to_numpy(np.float64) / 100 * capacity
    running = ticks.running.to_numpy(np.float64)
    return [
        compared(
            "e2e_vllm_timeseries_rtx4090.parquet (measured, vLLM 0.19.0)",
            predict_us(law, Steps.of(map(decode, running, kv, np.zeros(len(kv))))) / 1e3,
            1e3 * running / ticks.gen_throughput.to_numpy(np.float64),
            "decode step = running / tokens per second, in seconds in which nothing was admitted",
        ),
        compared(
            "e2e_vllm_requests_rtx4090.parquet (KV capacity reported by vLLM 0.19.0)",
            np.array([float(kv_tokens_max)]),
            np.array([float(capacity)]),
            f"kv_tokens_max {kv_tokens_max:,} against {capacity:,}",
        ),
    ]


def of_measured(kernels: Kernels, law: IterationTime) -> list[Check]:
    """The measured engine against a composition of current kernels: how far the engines are apart."""
    parts = kernels.parts(100_000, 8192)
    note = f"composed from vLLM {kernels.version} kernels without CPU time: an engine of another time, not an error"
    return [
        compared(
            f"ops_aiconfigurator_vllm.parquet, composed {phase} iterations",
            predict_us(law, attention),
            parts.iterations(attention).time_us,
            note,
        )
        for phase, attention in parts.phases().items()
    ]


def other_engines(data: Path, model: str, device: str, engine: str, rate: float) -> Check:
    """The other rates that were published for the same model and device."""
    rows = pd.read_csv(data / "embedding_throughput.csv")
    rows = rows[
        (rows.model == model) & (rows.device == device) & (rows.metric == "tokens_per_s") & (rows.engine != engine)
    ]
    times = 1 / rows.value.to_numpy(np.float64)
    return compared(
        "embedding_throughput.csv, other engines on the same device",
        np.full(len(times), 1 / rate),
        times,
        f"time per token; {', '.join(rows.engine)}: the engine matters more than any error of a fit",
    )


def _linear_layers(data: Path, kernels: Kernels, gpu: str, model: str) -> list[Check]:
    """The four matrix multiplications of a layer against Vidur's profile of the exact shapes."""
    rows = pd.read_parquet(data / "ops_vidur_mlp_comm.parquet", filters=[("gpu", "=", gpu), ("model", "=", model)])
    rows = rows[(rows.tensor_parallel == kernels.tp) & rows.op.isin(VIDUR_OPS) & (rows.num_tokens <= 8192)]
    if rows.empty:
        return []
    measured = rows.groupby(["num_tokens", "op"]).time_ms.median().unstack("op").dropna().sum(axis=1) * 1e3
    gemms = kernels.model.layer_gemms(kernels.tp)
    predicted = np.array([sum(kernels.gemm_us(int(m), n, k) for n, k in gemms) for m in measured.index])
    actual = measured.to_numpy(np.float64)
    against = f"ops_vidur_mlp_comm.parquet ({gpu}, {model}, TP {kernels.tp})"
    few = measured.index.to_numpy() <= 256
    return [
        compared(against, predicted[part], actual[part], f"matrix multiplications of a layer at {size} tokens, 2023-24")
        for part, size in ((few, "1 to 256"), (~few, "257 to 8,192"))
    ]


def _older_engine(data: Path, law: IterationTime, tp: int) -> list[Check]:
    rows = pd.read_parquet(data / "calibration_splitwise_a100.parquet")
    rows = rows[(rows.model == "llama2-70b") & (rows.tensor_parallel == tp) & (rows.note.fillna("") == "")]
    note = "whole iterations of a 2023-24 engine with its CPU time: the difference is the engine's vintage"
    against = f"calibration_splitwise_a100.parquet (measured, TP {tp})"
    return [
        compared(f"{against}, {phase}", predict_us(law, steps), steps.time_us, note)
        for phase, steps in zip(("decode", "prefill"), measured_iterations(rows), strict=True)
    ]


def measured_iterations(rows: pd.DataFrame) -> tuple[Steps, Steps]:
    """Decode and prefill of a table of measured iterations (no prompt there has cached context)."""
    decoding, prompts = rows[rows.phase == "decode"], rows[rows.phase == "prefill"]
    sizes = decoding[["batch_size", "context_tokens", "time_ms"]].itertuples(index=False)
    chunks = prompts[["batch_size", "prompt_tokens", "time_ms"]].itertuples(index=False)
    return (
        Steps.of(decode(seqs, seqs * context, time_ms * 1e3) for seqs, context, time_ms in sizes),
        Steps.of(prefill(batch, tokens, 0, time_ms * 1e3) for batch, tokens, time_ms in chunks),
    )


def _closed_loop(data: Path, law: IterationTime) -> Check:
    """Measured TPOT under a closed loop of B requests, against its steady state.

    In the time of ``osl`` steps every request is replaced once, so B prompts are prefilled; they share n = min(B, osl)
    mixed steps, and the rest decode only: TPOT = (n * mixed + (osl - n) * decode) / osl at B * (isl + osl / 2) cached
    tokens. vLLM's rows of the same table are left out: (TTFT + (osl - 1) TPOT) per B prompts makes up to 118,000 prompt
    tokens a second, 86 % of the FP8 peak beside decoding, where the measured kernels reach 82,000 alone. Not all those
    prompts can have been computed (prefix-cache hits on repeated prompts would explain it; the source does not say).
    """
    rows = pd.read_parquet(data / "calibration_e2e_silicon.parquet")
    rows = rows[(rows.gpu == "h200_sxm") & (rows.model == "meta-llama/Llama-3.1-8B-Instruct") & (rows.tp_size == 1)]
    rows = rows[rows.engine == "sglang"].drop_duplicates(["isl", "osl", "batch_size", "tpot_ms"])
    batch, isl, osl = (rows[name].to_numpy(np.float64) for name in ("batch_size", "isl", "osl"))
    kv, n = batch * (isl + osl / 2), np.minimum(batch, osl)
    chunks = batch / n  # prompts of a mixed iteration, on average; whole ones and their neighbours cost the same
    tokens = chunks * isl
    none = 0 * n
    mixed = predict_us(law, Steps(np.maximum(1, chunks), tokens, none, tokens * isl / 2, batch, kv, none))
    alone = predict_us(law, Steps(none, none, none, none, batch, kv, none))
    return compared(
        "calibration_e2e_silicon.parquet (measured TPOT, SGLang 0.5.6, FP8, closed loop)",
        (n * mixed + (osl - n) * alone) / osl / 1e3,
        rows.tpot_ms.to_numpy(np.float64),
        "steady state of a closed loop; another engine, same GPU, model and precision",
    )
