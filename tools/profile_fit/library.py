"""The shipped profiles beside those of ``recipes``: more sizes, more GPUs, and GPUs that nobody measured.

* ``composed``: 7B, 13B and 70B decoders and embedding models on the GPUs with kernel tables.
* ``roofline``: GPUs without tables, from their data sheets (``roofline``). They carry no error of their own; what the same
  prior does on GPUs that were measured, when it is made without them, stands in their ``checks``.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from profile_fit import silicon
from profile_fit.aiconfigurator import NeighbouringShapes, shape_checks
from profile_fit.architecture import (
    BF16,
    BGE_LARGE,
    FP8,
    FP16,
    LLAMA_2_70B,
    LLAMA_31_8B,
    Architecture,
    Precision,
    read_device,
)
from profile_fit.assembly import Fitted, Setup, assemble
from profile_fit.checks import compared
from profile_fit.kernels import OPS, SMALL_OPS
from profile_fit.models import BGE_M3, LLAMA_2_13B, LLAMA_31_70B, LLAMA_32_3B, QWEN_25_7B
from profile_fit.recipes import (
    AICONFIGURATOR,
    INFINITY,
    LLMSERVINGSIM,
    SENTENCE_TOKENS,
    Recipe,
    composed_encoder,
    composed_llm,
)
from profile_fit.roofline import RooflineKernels, data_sheet, left_out_checks, prior
from sage_sim.profile import Check, Engine, Profile, Source

TOKENS_MAX = 8192
ENCODER_TOKENS_MAX = 16384
L4_RATE = 62192.4
"""Tokens a second of bge-large on an L4 over HTTP (``embedding_throughput.csv``, TEI 89-0.6, 449 tokens a sentence)."""


def neighbouring_llm(arch: Architecture, device: str) -> Recipe:
    """A composed LLM on one GPU, whose number of heads no table has."""
    composed = composed_llm(arch, device, BF16, 1, NeighbouringShapes)

    def build(name: str, data: Path) -> Profile:
        profile = composed(name, data)
        shapes = shape_checks(data, arch, read_device(data, device, BF16), BF16, 1)
        return msgspec.structs.replace(
            profile,
            checks=[*profile.checks, *shapes],
            assumptions=[*profile.assumptions, UNGROUPED if arch.heads == arch.kv_heads else BETWEEN],
        )

    return build


def served_llm(arch: Architecture, device: str, tp: int) -> Recipe:
    """A composed LLM in FP8 whose model vLLM was measured serving, on the same GPU."""
    composed = composed_llm(arch, device, FP8, tp)

    def build(name: str, data: Path) -> Profile:
        profile = composed(name, data)
        served = silicon.kernels_alone(data, (device, arch.name, "vllm", "fp8"), tp)
        return msgspec.structs.replace(
            profile, checks=[*profile.checks, served], assumptions=[*profile.assumptions, EIGHT_BITS]
        )

    return build


def roofline_llm(arch: Architecture, device: str, precision: Precision) -> Recipe:
    """An LLM on one GPU without kernel tables."""

    def build(name: str, data: Path) -> Profile:
        setup = Setup(arch, data_sheet(device, precision), precision, 1)
        kernels = RooflineKernels(data, arch, setup.device, precision, 1, prior(data, precision))
        fitted = Fitted.of(name, setup, kernels.parts(setup.kv_tokens_max, TOKENS_MAX))
        checks = left_out_checks(data, LLAMA_31_8B, precision)
        return _unmeasured(name, "llm", setup, fitted, checks, [MIXED.format(kernels.small.mixed_attention)])

    return build


def roofline_encoder(arch: Architecture, device: str) -> Recipe:
    """An embedding model on one GPU without kernel tables."""

    def build(name: str, data: Path) -> Profile:
        setup = Setup(arch, data_sheet(device, FP16), FP16, 1)
        kernels = RooflineKernels(data, arch, setup.device, FP16, 1, prior(data, FP16))
        fitted = Fitted.of(name, setup, kernels.parts(0, ENCODER_TOKENS_MAX))
        checks = [*left_out_checks(data, arch, FP16), _served(data)]
        return _unmeasured(name, "embedding", setup, fitted, checks, [SERVING])

    return build


EIGHT_BITS = (
    "Weights and matrix multiplications in FP8, KV cache in bf16; the fastest FP8 kernel of each shape; activation "
    "quantisation is not counted."
)
UNGROUPED = (
    "Decode attention was measured up to 8 heads without grouping: n such heads are taken as n/8 times the sequences with "
    "8 heads each."
)
BETWEEN = "The number of query heads was not measured: attention is linear between the numbers beside it."
MIXED = (
    "In mixed steps decode attention costs {:.2f} times its time alone: the median on an RTX 4090 and an RTX PRO 6000 (vLLM "
    "0.19), taken over to this GPU."
)
SERVING = (
    "No CPU time and no tokenisation, and no power limit: a small board under load is slower, as the L4 check shows."
)
NOTES = {
    "t4": "vLLM's current attention kernels do not run on Turing; older ones reach less of the peak than assumed.",
    "l4": "A 72 W board does not hold its peak rate: long prefills are slower than this.",
    "a100_sxm": "Matrix multiplications of this GPU are among the measured ones, its encoder attention is not.",
}

RECIPES: dict[str, Recipe] = {
    "llama-3.1-8b-h200-tp1": composed_llm(LLAMA_31_8B, "h200_sxm", BF16, 1),
    "llama-3.1-70b-h100-fp8-tp2": served_llm(LLAMA_31_70B, "h100_sxm", 2),
    "llama-3.1-70b-h100-fp8-tp4": served_llm(LLAMA_31_70B, "h100_sxm", 4),
    "llama-2-70b-h200-tp4": composed_llm(LLAMA_2_70B, "h200_sxm", BF16, 4),
    **{
        f"{short}-{gpu}-tp1": neighbouring_llm(arch, device)
        for short, arch in (("qwen2.5-7b-instruct", QWEN_25_7B), ("llama-2-13b", LLAMA_2_13B))
        for gpu, device in (("a100", "a100_sxm"), ("h100", "h100_sxm"), ("h200", "h200_sxm"), ("l40s", "l40s"))
    },
    "bge-large-en-v1.5-h200": composed_encoder(BGE_LARGE, "h200_sxm"),
    "bge-m3-h100": composed_encoder(BGE_M3, "h100_sxm"),
    "bge-m3-h200": composed_encoder(BGE_M3, "h200_sxm"),
    "bge-m3-l40s": composed_encoder(BGE_M3, "l40s"),
    "llama-3.1-8b-l4-tp1": roofline_llm(LLAMA_31_8B, "l4", BF16),
    "qwen2.5-7b-instruct-l4-tp1": roofline_llm(QWEN_25_7B, "l4", BF16),
    "llama-3.2-3b-t4-tp1": roofline_llm(LLAMA_32_3B, "t4", FP16),
    "bge-m3-a100": roofline_encoder(BGE_M3, "a100_sxm"),
    "bge-m3-l4": roofline_encoder(BGE_M3, "l4"),
    "bge-m3-t4": roofline_encoder(BGE_M3, "t4"),
}


def _unmeasured(
    name: str, kind: str, setup: Setup, fitted: Fitted, checks: list[Check], assumptions: list[str]
) -> Profile:
    assert kind in ("llm", "embedding")
    note = NOTES.get(setup.device.name)
    profile = assemble(
        name,
        "llm" if kind == "llm" else "embedding",
        setup,
        Engine("vllm", "none"),
        fitted,
        Source(
            kind="roofline",
            files=[OPS, SMALL_OPS],
            origin=[AICONFIGURATOR, LLMSERVINGSIM],
            licence="Apache-2.0, MIT",
            date="not stated in the source",
            method="data-sheet rates times the mean shares that kernels reach on A100, H100, H200 and L40S, with their mean "
            "launch times",
        ),
        checks,
        [
            "A prior, not a measurement: no error of this profile is known. The checks say what the same prior does on a "
            "measured GPU that it was made without.",
            "No CPU time: the scheduler is taken to hide behind the GPU (overhead_us 0).",
            *assumptions,
            *([note] if note else []),
        ],
    )
    # The law follows the modelled kernels to a few per mille; that is no error of the profile.
    return msgspec.structs.replace(profile, errors={})


def _served(data: Path) -> Check:
    """The one rate that was measured on a GPU without tables."""
    device = data_sheet("l4", FP16)
    kernels = RooflineKernels(data, BGE_LARGE, device, FP16, 1, prior(data, FP16))
    tokens = 256 * SENTENCE_TOKENS
    time_us = BGE_LARGE.layers * (kernels.linear_us(tokens) + kernels.prompts_us(256, SENTENCE_TOKENS))
    return compared(
        "embedding_throughput.csv, bge-large on an L4 (TEI, over HTTP)",
        np.array([time_us]),
        np.array([tokens / L4_RATE * 1e6]),
        f"{tokens:,} tokens as 256 sentences; the measurement includes HTTP and tokenisation ({INFINITY})",
    )
