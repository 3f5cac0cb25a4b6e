"""Which shipped profile comes from which source, and how: one entry of ``RECIPES`` per profile.

Measured engines come before compositions of kernels; where both exist, both are shipped under names that say so,
because a measured 2023 engine and a composed 2026 engine answer different questions.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pandas as pd

from profile_fit import checks
from profile_fit.architecture import (
    BF16,
    BGE_LARGE,
    BGE_SMALL,
    FP8,
    FP16,
    FP32,
    LLAMA_2_70B,
    LLAMA_31_8B,
    QWEN3_30B_A3B,
    QWEN3_32B,
    Architecture,
    Device,
    Precision,
    read_device,
)
from profile_fit.assembly import Fitted, Setup, assemble
from profile_fit.fit import check_bounds, rounded, rounded_ns
from profile_fit.kernels import OPS, SMALL_OPS, Kernels, LayerProfile
from profile_fit.steps import Steps, prefill
from sage_sim.profile import Curve, Engine, Hardware, Prefill, Profile, Source, TimeModel, Valid

AICONFIGURATOR = "ai-dynamo/aiconfigurator@095f58a51c4ca8e61b66ec108d86f223f8d559ce"
LLMSERVINGSIM = "casys-kaist/LLMServingSim@5daddb21a545658d5150b535712d0494584b5278"
SPLITWISE = "Mutinifni/splitwise-sim@8f99e7dc9b407f4ce2488d03dd44c0b8b946dab0"
SAGESERVE = "shashwatj07/SageServe@0b95ca2d615b46fc1cf9e7d7d9783c0dcb3fac17"
INFINITY = "michaelfeil/infinity@fcb951cb679d0de185bf254600d9b7d2cd3a263a"

Recipe = Callable[[str, Path], Profile]
"""``(profile name, data folder) -> profile``. Raises OSError (data absent), KeyError (a row is absent), BoundError."""


def composed_llm(
    arch: Architecture, device: str, precision: Precision, tp: int, source: type[Kernels] = Kernels
) -> Recipe:
    """An LLM from vLLM kernel times of ``ops_aiconfigurator_vllm``."""

    def build(name: str, data: Path) -> Profile:
        setup = Setup(arch, read_device(data, device, precision), precision, tp)
        kernels = source(data, arch, setup.device, precision, tp)
        fitted = Fitted.of(name, setup, kernels.parts(setup.kv_tokens_max, 8192))
        return assemble(
            name,
            "llm",
            setup,
            Engine("vllm", kernels.version),
            fitted,
            _kernel_source(),
            checks.of_composed(data, name, kernels, fitted.time.law()),
            [
                "No CPU time: the scheduler is taken to hide behind the GPU (overhead_us 0).",
                "No prefill over cached context was measured; its attention is the fitted cost per pair.",
                f"In mixed steps decode attention costs {kernels.small.mixed_attention:.2f} times its time alone: the "
                "median on an RTX 4090 and an RTX PRO 6000 (vLLM 0.19), taken over to this GPU.",
                "Norms, rotary embedding, activation and sampler: launch floors of the same two GPUs, or bytes over "
                "this GPU's bandwidth where that is more.",
                *NOTES.get(name, []),
            ],
        )

    return build


def profiled_llm(arch: Architecture, gpu: str, device: str, tp: int) -> Recipe:
    """An LLM from vLLM 0.19's per-layer kernel profile: the source behind the data set's composed table."""

    def build(name: str, data: Path) -> Profile:
        setup = Setup(arch, read_device(data, device, BF16), BF16, tp)
        fitted = Fitted.of(name, setup, LayerProfile(data, gpu, arch, tp).parts())
        method = f"per-layer CUDA kernel times (eager) summed over the layers, mixed attention measured as such; {FIT}"
        files, origin = [SMALL_OPS], [LLMSERVINGSIM]
        if tp > 1:
            files, origin = [*files, OPS], [*origin, AICONFIGURATOR]
        return assemble(
            name,
            "llm",
            setup,
            Engine("vllm", "0.19.0"),
            fitted,
            Source("composed", files, origin, "MIT", "not stated in the source", method),
            checks.of_rtx4090(data, fitted.time.law(), setup.kv_tokens_max) if gpu == "RTX4090" else [],
            [
                "No CPU time: the scheduler is taken to hide behind the GPU (overhead_us 0).",
                "One chunk at a time was measured. Several are taken to cost what their pairs cost, and those that are "
                "bound by reading their context to fill half of the GPU each.",
                *([ALL_REDUCE] if tp > 1 else []),
                *([EXPERTS] if arch.experts else []),
                *([EXPERTS_TP] if arch.experts and tp > 1 else []),
                *NOTES.get(name, []),
            ],
        )

    return build


def measured_llm(arch: Architecture, model: str, tp: int, file: str, origin: str, version: str, date: str) -> Recipe:
    """An LLM from whole iterations timed on A100-80GB; rows marked SUSPECT are left out, as the data set asks."""

    def build(name: str, data: Path) -> Profile:
        setup = Setup(arch, read_device(data, "a100_sxm", FP16), FP16, tp)
        rows = pd.read_parquet(data / file)
        rows = rows[(rows.model == model) & (rows.tensor_parallel == tp)]
        note = rows.note.fillna("")
        # Eight and more prompts at once may have run as several iterations: the source cannot say.
        rows = rows[~note.str.startswith("SUSPECT") & ~note.str.startswith("prompt batch may be")]
        fitted = Fitted.of_iterations(name, setup, *checks.measured_iterations(rows))
        method = f"whole iterations; decode is the time per output token, context its mean over the run; {FIT}"
        return assemble(
            name,
            "llm",
            setup,
            Engine("vllm", version),
            fitted,
            Source("measured", [file], [origin], "MIT", date, method),
            checks.of_measured(Kernels(data, arch, setup.device, FP16, tp), fitted.time.law()),
            [
                "Mixed iterations were not measured: prefill and decode attention add up, over one curve for all tokens.",
                "The precision is not stated in the source; 16 bits are assumed for weights and KV cache.",
                "Batch and context were varied one at a time: their joint effect is the sum of the two terms.",
                *NOTES.get(name, []),
            ],
        )

    return build


def composed_encoder(arch: Architecture, device: str) -> Recipe:
    """An embedding model from GEMM and encoder-attention kernel times of ``ops_aiconfigurator_vllm``."""

    def build(name: str, data: Path) -> Profile:
        setup = Setup(arch, read_device(data, device, BF16), BF16, 1)
        kernels = Kernels(data, arch, setup.device, BF16, 1)
        fitted = Fitted.of(name, setup, kernels.parts(0, 16384))
        return assemble(
            name,
            "embedding",
            setup,
            Engine("vllm", kernels.version),
            fitted,
            _kernel_source(),
            [checks.interpolation(kernels)],
            [
                "No CPU time and no tokenisation: kernel times only. A small batch on a real server is slower.",
                "Attention kernels are those of vLLM's vision encoder (bidirectional).",
            ],
        )

    return build


@dataclass(frozen=True)
class Throughput:
    """Which row of ``embedding_throughput.csv``, and how it is named in the profile."""

    model: str
    device: str
    engine: str
    short_device: str
    engine_name: str
    engine_version: str


def embedding_from_throughput(arch: Architecture, row: Throughput, gpu: str | None) -> Recipe:
    """An embedding model from one measured rate; the split into terms is by FLOPs, not measured.

    With t = 1 / rate at L tokens a sentence, and linear layers and attention taken to run at one FLOP rate,
    per_token = t * linear / (linear + attention) and per_token2 = t * attention / (linear + attention) / (L / 2):
    a sentence of L tokens has A = L^2 / 2, which is L / 2 per token. ``gpu``: its row of the hardware table, or None
    for a CPU, whose bandwidth and peak are not known here.
    """

    def build(name: str, data: Path) -> Profile:
        with (data / "embedding_throughput.csv").open(newline="") as file:
            wanted = {"model": row.model, "device": row.device, "engine": row.engine}
            rows = [line for line in csv.DictReader(file) if wanted.items() <= line.items()]
        if len(rows) != 1:
            raise KeyError(f"embedding_throughput.csv: expected one row with {wanted}, found {len(rows)}")
        rate, length = float(rows[0]["value"]), SENTENCE_TOKENS
        linear, attention = arch.flops_per_token, arch.flops_per_pair * length / 2
        share = attention / (linear + attention)
        token_us, pair_ns = (1 - share) * 1e6 / rate, share * 1e9 / rate / (length / 2)
        if gpu:
            setup = Setup(arch, read_device(data, gpu, FP16), FP16, 1)
            floor_us, floor = setup.limits.weights_us, "reading the weights once at data-sheet bandwidth: a lower bound"
        else:
            setup = Setup(arch, Device(row.short_device, 0.0, math.inf, math.inf, 0.0), FP32, 1)
            floor_us, floor = FLOOR_TOKENS * token_us, f"{FLOOR_TOKENS} tokens at the measured rate: a guess"
        knee = math.ceil(floor_us / token_us)
        time = TimeModel(
            token=Curve(
                [1, knee, 2 * knee], [rounded(us) for us in (knee * token_us, knee * token_us, 2 * knee * token_us)]
            ),
            prefill=Prefill(Curve([1], [0.0]), rounded_ns(pair_ns)),
        )
        # The benchmark sent 256 sentences a request; the server's own batches lay between one sentence and that.
        batch = Steps.of([prefill(256, length, 0, 256 * length * 1e6 / rate)])
        bound = round(check_bounds(time.law(), batch, setup.limits, embedding=True), 3)
        method = (
            f"one rate, {rate:g} tokens/s over HTTP at {length} tokens a sentence ({rows[0]['derivation']}); "
            f"{100 * share:.1f} % of it given to attention by FLOPs"
        )
        profile = assemble(
            name,
            "embedding",
            setup,
            Engine(row.engine_name, row.engine_version),
            Fitted(time, {}, Valid((length, 256 * length), (length, length)), bound),
            Source("measured", ["embedding_throughput.csv"], [INFINITY], "MIT", rows[0]["date"], method),
            [checks.other_engines(data, row.model, row.device, row.engine, rate)],
            [
                "Measured is one number, the rate of large batches of long sentences. No point is held out, so there "
                "is no error table.",
                "Attention and linear layers are taken to run at one FLOP rate; that sets how cost grows with length.",
                f"The least time of a batch is assumed: {floor}.",
                "No fixed cost per batch; the rate includes HTTP and tokenisation.",
                *NOTES.get(name, []),
            ],
        )
        unknown = Hardware(row.short_device, 1, None, None)
        return profile if gpu else msgspec.structs.replace(profile, hardware=unknown, bound_share=None)

    return build


SENTENCE_TOKENS = 449
"""115,000 tokens over 256 sentences: what the rows of ``embedding_throughput.csv`` state."""

FLOOR_TOKENS = 32
COMPOSITION = "GEMM, attention and all-reduce kernel times summed over the layers, LM head and sampler added"
FIT = (
    "times at knots by least squares on relative error; the errors are those of the same fit on three quarters of the "
    "conditions"
)
ALL_REDUCE = (
    "All-reduce was not profiled: two of them in a layer, at the times of two L40S on PCIe 4 (measured, vLLM 0.14, CUDA "
    "graph) for half the message, because the RTX PRO 6000 has PCIe 5."
)
EXPERTS = (
    "The number of experts that T tokens use is E (1 - (1 - k/E)^T): a gate that spreads tokens evenly. A trained gate "
    "uses fewer."
)
EXPERTS_TP = "Experts were profiled at TP 1 only: half of that time, as they are bound by reading weights."

NOTES = {
    "llama-3.1-8b-h200-fp8-tp1": [
        "Weights and matrix multiplications in FP8, KV cache in bf16; the fastest FP8 kernel of each shape; activation "
        "quantisation is not counted.",
        "The FP8 kernels take up to twice as long for 257 tokens as for 256 and less again for 512, because 257 is not a "
        "multiple of 16. Sizes between are taken to lie between; an engine that pads its batches is faster there.",
    ],
    "llama-3.1-8b-rtx4090-tp1": [
        "Bandwidth, peak FLOPS and TDP are from NVIDIA's data sheet; hardware_specs.csv has no such row.",
    ],
    "llama-3.1-8b-a100-tp4-sageserve": [
        "Four GPUs are slower than two in this source (the interconnect is not stated): that machine's times.",
    ],
    "bge-small-en-v1.5-cpu": [
        "Sixteen vCPUs of one GCP g2-standard-16; ONNX runtime, weights taken as FP32. Memory, TDP, bandwidth and peak "
        "of that machine are not known, so no bound is checked.",
    ],
}

_SPLITWISE = ("calibration_splitwise_a100.parquet", SPLITWISE, "2023-24", "2023-24; not stated exactly")
_SAGESERVE = ("calibration_sageserve.parquet", SAGESERVE, "unknown", "not stated in the source")
_L4 = Throughput(
    "BAAI/bge-large-en-v1.5", "NVIDIA L4", "TEI 89-0.6 flashbert", "l4", "text-embeddings-inference", "0.6"
)
_CPU = Throughput(
    "BAAI/bge-small-en-v1.5",
    "CPU Cascade Lake, GCP g2-standard-16 (16 vCPU)",
    "infinity-optimum-onnx",
    "cpu-cascade-lake-16vcpu",
    "infinity",
    "0.0.25",
)

RECIPES: dict[str, Recipe] = {
    "llama-3.1-8b-a100-tp1": composed_llm(LLAMA_31_8B, "a100_sxm", BF16, 1),
    "llama-3.1-8b-h100-tp1": composed_llm(LLAMA_31_8B, "h100_sxm", BF16, 1),
    "llama-3.1-8b-h200-fp8-tp1": composed_llm(LLAMA_31_8B, "h200_sxm", FP8, 1),
    "llama-3.1-8b-l40s-tp1": composed_llm(LLAMA_31_8B, "l40s", BF16, 1),
    "llama-3.1-8b-rtx4090-tp1": profiled_llm(LLAMA_31_8B, "RTX4090", "rtx4090", 1),
    **{
        f"{short}-rtxpro6000-tp{tp}": profiled_llm(arch, "RTXPRO6000", "rtx_pro_6000_server", tp)
        for short, arch in (("llama-3.1-8b", LLAMA_31_8B), ("qwen3-32b", QWEN3_32B), ("qwen3-30b-a3b", QWEN3_30B_A3B))
        for tp in (1, 2)
    },
    "llama-3.1-8b-a100-tp2-sageserve": measured_llm(LLAMA_31_8B, "Llama-3.1-8B", 2, *_SAGESERVE),
    "llama-3.1-8b-a100-tp4-sageserve": measured_llm(LLAMA_31_8B, "Llama-3.1-8B", 4, *_SAGESERVE),
    "llama-2-70b-a100-tp4": composed_llm(LLAMA_2_70B, "a100_sxm", BF16, 4),
    "llama-2-70b-a100-tp8": composed_llm(LLAMA_2_70B, "a100_sxm", BF16, 8),
    "llama-2-70b-h100-tp4": composed_llm(LLAMA_2_70B, "h100_sxm", BF16, 4),
    "llama-2-70b-h100-tp8": composed_llm(LLAMA_2_70B, "h100_sxm", BF16, 8),
    "llama-2-70b-a100-tp4-splitwise": measured_llm(LLAMA_2_70B, "llama2-70b", 4, *_SPLITWISE),
    "llama-2-70b-a100-tp8-splitwise": measured_llm(LLAMA_2_70B, "llama2-70b", 8, *_SPLITWISE),
    "bge-large-en-v1.5-h100": composed_encoder(BGE_LARGE, "h100_sxm"),
    "bge-large-en-v1.5-l40s": composed_encoder(BGE_LARGE, "l40s"),
    "bge-large-en-v1.5-l4": embedding_from_throughput(BGE_LARGE, _L4, "l4"),
    "bge-small-en-v1.5-cpu": embedding_from_throughput(BGE_SMALL, _CPU, None),
}


def _kernel_source() -> Source:
    return Source(
        kind="composed",
        files=[OPS, SMALL_OPS],
        origin=[AICONFIGURATOR, LLMSERVINGSIM],
        licence="Apache-2.0, MIT",
        date="not stated in the source",
        method=f"{COMPOSITION}; {FIT}",
    )
