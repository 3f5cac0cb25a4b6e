"""What a transformer must compute and read: sizes, FLOPs and bytes, from its published architecture.

These are lower bounds, not estimates: a step that is faster than ``bytes / bandwidth`` or ``FLOPs / peak`` cannot have
happened, whatever a table says (:func:`profile_fit.fit.check_bounds`).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
GEMM = tuple[int, int]
"""``(n, k)``: outputs and inputs of one weight matrix; ``m`` is the number of tokens."""


@dataclass(frozen=True)
class Architecture:
    """A transformer. ``gated``: SwiGLU (three MLP matrices) instead of GELU (two).

    With ``experts``, each layer has that many MLPs of ``intermediate``, of which a token uses ``experts_per_token``.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int
    decoder: bool
    gated: bool
    experts: int = 0
    experts_per_token: int = 0

    def layer_gemms(self, tp: int) -> list[GEMM]:
        """Weight matrices of one layer on one of ``tp`` ranks: QKV, output, MLP up (gate and up fused), MLP down. A
        model with experts has the last two once for each of them."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim // tp
        up = self.intermediate * (2 if self.gated else 1) // tp
        return [
            (qkv, self.hidden),
            (self.hidden, self.heads * self.head_dim // tp),
            (up, self.hidden),
            (self.hidden, self.intermediate // tp),
        ]

    def head_gemm(self, tp: int) -> GEMM:
        """The LM head on one rank."""
        return (self.vocab // tp, self.hidden)

    def experts_hit(self, tokens: float) -> float:
        """Different experts that ``tokens`` tokens use in a layer when a gate spreads them evenly: E (1 - (1 - k/E)^T)."""
        missed = (1 - self.experts_per_token / self.experts) ** tokens
        return float(self.experts * (1 - missed))

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers, all experts among them; without embeddings and LM head."""
        return self._layers_of(max(1, self.experts))

    @property
    def active_parameters(self) -> int:
        """Those of them that a token is multiplied with."""
        return self._layers_of(max(1, self.experts_per_token))

    @property
    def parameters(self) -> int:
        """All weights: a decoder has untied input and output embeddings, an encoder word and position tables."""
        tables = 2 * self.vocab if self.decoder else self.vocab + self.positions
        return self.linear_parameters + tables * self.hidden + (2 * self.layers + 1) * self.hidden

    def _layers_of(self, mlps: int) -> int:
        qkv, output, *mlp = (n * k for n, k in self.layer_gemms(1))
        gate = self.experts * self.hidden
        return self.layers * (qkv + output + gate + mlps * sum(mlp))

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Keys and values of one token over all layers and ranks."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value if self.decoder else 0

    @property
    def flops_per_token(self) -> int:
        """Of the linear layers: a multiply and an add per weight."""
        return 2 * self.active_parameters

    @property
    def flops_per_pair(self) -> int:
        """Of attention per unit of A = sum p (ctx + p/2): QK and PV over one query-key pair, 2 FLOPs a multiply-add.

        A causal prompt of p tokens has p^2/2 pairs, so a pair counts once; an encoder attends both ways, so twice.
        """
        return 4 * self.layers * self.heads * self.head_dim * (1 if self.decoder else 2)


@dataclass(frozen=True)
class Precision:
    """Bytes per weight and per cached value, and which peak the matrix units reach."""

    name: str
    weight_bytes: int
    kv_bytes: int
    fp8_peak: bool = False


@dataclass(frozen=True)
class Device:
    """One accelerator from its data sheet. ``tflops`` is dense, at the precision used."""

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    tflops: float
    tdp_w: float


BF16 = Precision("bf16", 2, 2)
FP16 = Precision("fp16", 2, 2)
FP32 = Precision("fp32", 4, 4)
FP8 = Precision("fp8", 1, 2, fp8_peak=True)
"""FP8 weights and matrix multiplications; the KV cache stays in 16 bits, as engines do unless told otherwise."""

QWEN3_32B = Architecture("Qwen/Qwen3-32B", 64, 5120, 64, 8, 128, 25600, 151936, 40960, True, True)
QWEN3_30B_A3B = Architecture(
    "Qwen/Qwen3-30B-A3B-Instruct-2507", 48, 2048, 32, 4, 128, 768, 151936, 262144, True, True, 128, 8
)
LLAMA_31_8B = Architecture("meta-llama/Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256, 131072, True, True)
LLAMA_2_70B = Architecture("meta-llama/Llama-2-70b-hf", 80, 8192, 64, 8, 128, 28672, 32000, 4096, True, True)
BGE_LARGE = Architecture("BAAI/bge-large-en-v1.5", 24, 1024, 16, 16, 64, 4096, 30522, 512, False, False)
BGE_SMALL = Architecture("BAAI/bge-small-en-v1.5", 12, 384, 12, 12, 32, 1536, 30522, 512, False, False)

RTX4090 = Device("rtx4090", memory_gib=24.0, bandwidth_gb_s=1008.0, tflops=165.2, tdp_w=450.0)
"""GeForce RTX 4090, from NVIDIA's Ada white paper (bf16 with FP32 accumulate); hardware_specs.csv has no such row."""


def read_device(data: Path, name: str, precision: Precision) -> Device:
    """``name`` from ``hardware_specs.csv``; KeyError when the row is absent or lacks a number that a bound needs."""
    if name == RTX4090.name:
        return RTX4090
    with (data / "hardware_specs.csv").open(newline="") as file:
        row = next((row for row in csv.DictReader(file) if row["device"] == name), None)
    if row is None:
        raise KeyError(f"hardware_specs.csv: no device {name!r}")
    peak = row["fp8_dense_tflops" if precision.fp8_peak else "bf16_dense_tflops"]
    return Device(name, float(row["mem_gib"]), float(row["mem_bw_gb_s"]), float(peak), float(row["tdp_w"]))
