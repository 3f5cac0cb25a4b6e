"""From measured GPU kernels to the parts of an iteration: the sum of a transformer's kernels over its layers.

Rules kept:

* Matrix multiplications and attention are looked up at measured shapes; where a weight shape was not measured, time is
  interpolated linearly between the neighbouring widths (log-space interpolation over-predicts), and ``m`` likewise.
* Token counts are taken on both sides of a tile edge: 256 tokens are a tenth cheaper than 257.
* A kernel may not be faster than reading its weights or its KV cache from memory. Tables taken with operands that stay
  in the L2 cache show such times; in a real step the other layers have evicted them. They are raised to the bound.
* Norms, rotary embedding, activation and sampling are not in the tables; they cost the larger of a launch floor and
  their bytes over the bandwidth. Floors and the sampler's passes come from vLLM 0.19 kernel measurements.
* All-reduce: CUDA-graph times up to 512 tokens (what vLLM captures), eager times above. Message sizes count elements.
* No CPU time is added: what the scheduler hides behind the GPU stays hidden.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from profile_fit.architecture import Architecture, Device, Precision
from profile_fit.fit import Parts
from profile_fit.steps import Floats, Points, Step, Steps, decode, prefill

OPS = "ops_aiconfigurator_vllm.parquet"
SMALL_OPS = "ops_llmservingsim_vllm019.parquet"
GRAPH_TOKENS_MAX = 512
DECODE_SEQS_MAX = 256
DECODE_CONTEXTS = (64, 16384)
PROMPTS = (16, 24, 40, 64, 100, 128, 200, 256, 400, 512, 700, 1024, 1400, 2048, 2700, 4096, 5400, 8192, 16384)
TILE = 16
TOKENS = (*range(1, 17), *(edge + over for edge in range(32, 257, TILE) for over in (0, 1)))
LARGE_TOKENS = (*(edge + over for edge in range(512, 4353, 256) for over in (0, 1)), 6144, 8192, 12288, 16384)
HEADS = (1, 2, 4, 8, 16, 17, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 257, 384, 512)


@dataclass(frozen=True)
class SmallKernels:
    """What vLLM 0.19's elementwise kernels and sampler cost, from profiles of two GPUs; times in us."""

    norm_us: float
    rotary_us: float
    activation_us: float
    sampler_us: float
    sampler_passes: float
    mixed_attention: float
    """Time of decode attention inside a mixed batch over its time alone (median)."""

    @classmethod
    def read(cls, data: Path) -> SmallKernels:
        """Medians over both GPUs of ``ops_llmservingsim_vllm019``, Llama-3.1-8B, TP 1."""
        ops = pd.read_parquet(data / SMALL_OPS)
        ops = ops[(ops.model == "meta-llama/Llama-3.1-8B") & (ops.tensor_parallel == 1)]
        small = ops[ops.tokens <= 64].groupby("op").time_us.median()
        sampler = ops[ops.op == "sampler"]
        bandwidth = {"RTX4090": 1008e9, "RTXPRO6000": 1792e9}
        base = float(sampler[sampler.sequences == 1].time_us.median())
        logits = 256 * 128256 * 4
        full = sampler[sampler.sequences == 256].groupby("gpu").time_us.median()
        passes = [(float(full[gpu]) - base) * 1e-6 * rate / logits for gpu, rate in bandwidth.items()]
        return cls(
            norm_us=float(small["layernorm"]),
            rotary_us=float(small["rotary_emb"]),
            activation_us=float(small["act_fn"]),
            sampler_us=base,
            sampler_passes=float(np.mean(passes)),
            mixed_attention=_mixed_attention(ops[ops.op == "attention"]),
        )


class Kernels:
    """The measured kernels of one GPU, and steps composed from them; all times in us."""

    def __init__(self, data: Path, model: Architecture, device: Device, precision: Precision, tp: int) -> None:
        self.model, self.device, self.precision, self.tp = model, device, precision, tp
        self.small = SmallKernels.read(data)
        kernel = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8"}[precision.name]
        self._bandwidth = device.bandwidth_gb_s * 1e3  # bytes per us
        rows = pd.read_parquet(data / OPS, filters=[("system", "=", device.name)])
        self.version = str(rows[rows.op_name == "gemm"].vllm_version.iloc[0])
        self._gemm = _gemm_table(rows[(rows.op_name == "gemm") & (rows.gemm_dtype == kernel)])
        heads, kv_heads = model.heads // tp, max(1, model.kv_heads // tp)
        attention = rows[(rows.num_heads == heads) & (rows.head_dim == model.head_dim)]
        attention = attention[
            (attention.window_size.fillna(0) == 0) & (attention.kernel_source != "vllm_flash_attn_fa4")
        ]
        cache = "fp8" if precision.kv_bytes == 1 else "bfloat16"
        cached = attention[(attention.kv_cache_dtype == cache) & (attention.num_key_value_heads == kv_heads)]
        self._context = _by_batch(_median(cached[cached.op_name == "context_attention"], ["batch_size", "isl"]))
        self.generation = _median(cached[cached.op_name == "generation_attention"], ["batch_size", "step"])
        if not model.decoder:
            both_ways = attention[attention.op_name == "encoder_attention"]
            self._context = _by_batch(_median(both_ways, ["batch_size", "isl"]))
        reduces = rows[(rows.op_name == "all_reduce") & (rows.num_gpus == tp)]
        self._reduce = {
            backend: (group.message_size.to_numpy(np.float64), group.latency_ms.to_numpy(np.float64) * 1e3)
            for backend, group in reduces.sort_values("message_size").groupby("backend")
        }

    def gemm_table(self) -> GemmTable:
        """The measured matrix multiplications."""
        return self._gemm

    def gemm_us(self, m: int, n: int, k: int) -> float:
        """One matrix multiplication, ``[m, k] x [k, n]``."""
        weights_us = n * k * self.precision.weight_bytes / self._bandwidth
        return max(_across_n(self._gemm, m, n, k), weights_us)

    def linear_us(self, tokens: int) -> float:
        """Everything in one layer but attention: GEMMs, norms, rotary, activation, all-reduces."""
        model, tp = self.model, self.tp
        gemms = sum(self.gemm_us(tokens, n, k) for n, k in model.layer_gemms(tp))
        rotary = (model.heads + model.kv_heads) * model.head_dim // tp * 2
        activation = model.intermediate // tp * (3 if model.gated else 2)
        small = 2 * self._elementwise_us(self.small.norm_us, tokens * model.hidden * 4)
        small += self._elementwise_us(self.small.activation_us, tokens * activation)
        if model.decoder:
            small += self._elementwise_us(self.small.rotary_us, tokens * rotary)
        return gemms + small + (2 * self._all_reduce_us(tokens) if tp > 1 else 0.0)

    def finish_us(self, seqs: int) -> float:
        """Embedding and final norm, then LM head and sampler on the last token of ``seqs`` sequences."""
        once = 2 * self.small.norm_us
        if not self.model.decoder:
            return once
        n, k = self.model.head_gemm(self.tp)
        logits = seqs * self.model.vocab * 4 * self.small.sampler_passes / self._bandwidth
        return once + self.gemm_us(seqs, n, k) + self.small.sampler_us + logits

    def generation_us(self, seqs: int, context: int) -> float:
        """Decode attention of one layer, not faster than reading the KV cache."""
        per_layer = self.model.kv_bytes_per_token(self.precision.kv_bytes) / self.model.layers / self.tp
        return max(self.generation[seqs, context], seqs * context * per_layer / self._bandwidth)

    def prompts_us(self, batch: int, prompt: int) -> float:
        """Attention of one layer over ``batch`` prompts; time per token grows linearly, so that is interpolated."""
        prompts, per_token = self._context[batch]
        return float(np.interp(prompt, prompts, per_token)) * prompt

    def parts(self, kv_tokens_max: int, tokens_max: int) -> Parts:
        """What fits ``kv_tokens_max`` cached tokens and ``tokens_max`` new ones; nothing of mixed attention was measured."""
        layers, decoder = self.model.layers, self.model.decoder
        tokens = np.array(
            [size for size in (*TOKENS, *LARGE_TOKENS) if size <= tokens_max + DECODE_SEQS_MAX], np.float64
        )
        once_us = 0.0 if decoder else self.finish_us(1)
        prompts = (PROMPTS[0], min(PROMPTS[-1], self.model.positions, int(self._context[1][0][-1])))
        return Parts(
            token=Points(tokens, np.array([layers * self.linear_us(int(size)) + once_us for size in tokens])),
            head=Points(np.array(HEADS, np.float64), np.array([self.finish_us(n) for n in HEADS])) if decoder else None,
            decode=Steps.of(self._decode_attention(kv_tokens_max)) if decoder else Steps.of([]),
            prefill=Steps.of(self._prefill_attention(tokens_max)),
            mixed=self.small.mixed_attention,
            prompts=prompts,
        )

    def _decode_attention(self, kv_tokens_max: int) -> Iterator[Step]:
        """Every measured ``(sequences, context)`` that fits the KV cache; the tables count the tokens before this one."""
        for seqs, cached in sorted(self.generation):
            context = cached + 1
            inside = DECODE_CONTEXTS[0] <= context <= DECODE_CONTEXTS[1] and seqs <= DECODE_SEQS_MAX
            if inside and seqs * context <= kv_tokens_max:
                yield decode(seqs, seqs * context, self.model.layers * self.generation_us(seqs, cached))

    def _prefill_attention(self, tokens_max: int) -> Iterator[Step]:
        """Equal prompts within a token budget and the model's positions; no cached context was measured."""
        for batch in sorted(self._context):
            longest = min(tokens_max // batch, self.model.positions, int(self._context[batch][0][-1]))
            for prompt in PROMPTS:
                if prompt <= longest:
                    yield prefill(batch, prompt, 0, self.model.layers * self.prompts_us(batch, prompt))

    def _elementwise_us(self, floor_us: float, values: int) -> float:
        return max(floor_us, values * 2 / self._bandwidth)

    def _all_reduce_us(self, tokens: int) -> float:
        sizes, times = self._reduce["vllm_graph" if tokens <= GRAPH_TOKENS_MAX else "vllm_eager"]
        return float(np.interp(tokens * self.model.hidden, sizes, times))


class LayerProfile:
    """vLLM 0.19's per-layer profile of one model on one GPU, where mixed attention is measured.

    Two things are not in it. All-reduce (TP 2): the two-GPU times of another GPU on PCIe, an L40S (PCIe 4), at half the
    message size, because the RTX PRO 6000 has PCIe 5. Experts at TP 2: half of their time at TP 1; they are bound by
    reading their weights, of which each rank has half.
    """

    def __init__(self, data: Path, gpu: str, model: Architecture, tp: int) -> None:
        ops = pd.read_parquet(data / SMALL_OPS, filters=[("gpu", "=", gpu), ("model", "=", model.name)])
        self.model, self.tp = model, tp
        self._experts = _expert_curves(ops[(ops.op == "moe") & (ops.tensor_parallel == 1)])
        ops = ops[ops.tensor_parallel == tp]
        by_tokens = ops[ops.tokens.notna() & (ops.op != "moe")]
        self._by_tokens = {op: _curve(rows, "tokens") for op, rows in by_tokens.groupby("op")}
        self._by_seqs = {op: _curve(rows, "sequences") for op, rows in ops[ops.sequences.notna()].groupby("op")}
        self._attention = ops[ops.op == "attention"]
        self._reduce = _pcie_all_reduce(data) if tp > 1 else None

    def parts(self) -> Parts:
        """Every profiled shape: up to 256 sequences and 2,048 new tokens."""
        layers = self.model.layers
        columns = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode"]
        shapes = self._attention.groupby(columns, as_index=False).time_us.median()
        rows: dict[str, list[Step]] = {"decode": [], "prefill": [], "mixed": []}
        for chunk, cached, seqs, context, time_us in shapes.itertuples(index=False):
            phase = "decode" if not chunk else "mixed" if seqs else "prefill"
            pairs = chunk * (cached + chunk / 2)
            rows[phase].append(Step(int(chunk > 0), chunk, cached, pairs, seqs, seqs * context, layers * time_us))
        longest = int((shapes.prefill_chunk + shapes.kv_prefill).max())
        attention = {phase: Steps.of(steps) for phase, steps in rows.items()}
        return Parts(token=self._token(), head=self._head(), **attention, prompts=(int(TILE), longest))

    def _token(self) -> Points:
        sizes, _ = self._by_tokens["qkv_proj"]
        twice = ("layernorm",)
        once = ("embedding", "final_layernorm")
        each = np.array([self._experts_us(size) + self._all_reduce_us(size) for size in sizes])
        for op, curve in sorted(self._by_tokens.items()):
            if op not in once:
                each += (2 if op in twice else 1) * np.interp(sizes, *curve)
        all_layers = self.model.layers * each
        return Points(sizes, all_layers + np.sum([np.interp(sizes, *self._by_tokens[op]) for op in once], axis=0))

    def _head(self) -> Points:
        sizes, _ = self._by_seqs["lm_head"]
        return Points(sizes, np.sum([np.interp(sizes, *self._by_seqs[op]) for op in ("lm_head", "sampler")], axis=0))

    def _experts_us(self, tokens: float) -> float:
        """At the number of experts that ``tokens`` tokens hit: linear across experts, then across tokens."""
        if not self._experts:
            return 0.0
        hit, sizes = self.model.experts_hit(tokens), np.array(sorted(self._experts))
        return float(np.interp(tokens, sizes, [np.interp(hit, *self._experts[size]) for size in sizes])) / self.tp

    def _all_reduce_us(self, tokens: float) -> float:
        """Two of them in a layer."""
        if self._reduce is None:
            return 0.0
        sizes, times = self._reduce
        return 2 * float(np.interp(tokens * self.model.hidden / 2, sizes, times))


GemmTable = dict[int, dict[int, tuple[np.ndarray, np.ndarray]]]
"""``table[k][n]`` -> (m, us), ``m`` increasing."""


def _gemm_table(rows: pd.DataFrame) -> GemmTable:
    # FP8 has several kernels per shape; the fastest is the one an engine's dispatcher picks.
    best = rows.groupby(["k", "n", "m"], as_index=False).latency_ms.min()
    curves: dict[int, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for k, n, m, time_ms in best[["k", "n", "m", "latency_ms"]].itertuples(index=False):
        curves[int(k)][int(n)].append((m, time_ms * 1e3))
    return {
        k: {n: (np.array([m for m, _ in curve]), np.array([us for _, us in curve])) for n, curve in by_width.items()}
        for k, by_width in curves.items()
    }


def _across_n(table: GemmTable, m: int, n: int, k: int) -> float:
    """Time at width ``n``: measured, or linear between (beyond the last: through the last two) measured widths."""

    def at(width: int) -> float:
        return _across_k(table, m, width, k)

    widths = sorted(table[max(table, key=lambda depth: len(table[depth]))])
    low, high = _neighbours(widths, n)
    return at(low) if low == high else at(low) + (at(high) - at(low)) * (n - low) / (high - low)


def _across_k(table: GemmTable, m: int, n: int, k: int) -> float:
    depths = sorted(depth for depth in table if n in table[depth])
    low, high = _neighbours(depths, k)
    times = [float(np.interp(m, *table[depth][n])) for depth in (low, high)]
    return times[0] if low == high else times[0] + (times[1] - times[0]) * (k - low) / (high - low)


def _neighbours(grid: list[int], value: int) -> tuple[int, int]:
    """Grid points around ``value`` (equal when on the grid); the last two when it lies beyond."""
    at = bisect_left(grid, value)
    if at < len(grid) and grid[at] == value:
        return value, value
    at = min(max(at, 1), len(grid) - 1)
    return grid[at - 1], grid[at]


def _median(rows: pd.DataFrame, by: list[str]) -> dict[tuple[int, int], float]:
    medians = rows.groupby(by, as_index=False).latency_ms.median()
    return {(int(a), int(b)): time_ms * 1e3 for a, b, time_ms in medians.itertuples(index=False)}


def _by_batch(times: dict[tuple[int, int], float]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """``batch -> (prompt tokens, us per prompt token)``, prompts increasing."""
    batches: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for (batch, prompt), time in sorted(times.items()):
        batches[batch].append((prompt, time / prompt))
    return {batch: (np.array([p for p, _ in rows]), np.array([t for _, t in rows])) for batch, rows in batches.items()}


def _curve(rows: pd.DataFrame, by: str) -> tuple[Floats, Floats]:
    medians = rows.groupby(by).time_us.median()
    return medians.index.to_numpy(np.float64), medians.to_numpy(np.float64)


def _expert_curves(rows: pd.DataFrame) -> dict[int, tuple[Floats, Floats]]:
    """``tokens -> (activated experts, us)``."""
    sizes = sorted({int(tokens) for tokens in rows.tokens})
    return {tokens: _curve(rows[rows.tokens == tokens], "activated_experts") for tokens in sizes}


def _pcie_all_reduce(data: Path) -> tuple[Floats, Floats]:
    """``(elements, us)`` of an all-reduce over two L40S within a CUDA graph."""
    rows = pd.read_parquet(data / OPS, filters=[("system", "=", "l40s"), ("op_name", "=", "all_reduce")])
    rows = rows[(rows.num_gpus == 2) & (rows.backend == "vllm_graph")].sort_values("message_size")
    return rows.message_size.to_numpy(np.float64), rows.latency_ms.to_numpy(np.float64) * 1e3


def _mixed_attention(attention: pd.DataFrame) -> float:
    """Median of (mixed - prefill alone) / decode alone, where decode is at least a quarter of the sum."""
    ratios = []
    for _, rows in attention.groupby("gpu"):
        alone = rows[rows.n_decode == 0].set_index(["prefill_chunk", "kv_prefill"]).time_us.to_dict()
        decoding = rows[rows.prefill_chunk == 0].set_index(["n_decode", "kv_decode"]).time_us.to_dict()
        mixed = rows[(rows.n_decode > 0) & (rows.prefill_chunk > 0)]
        before = np.array([alone[key] for key in zip(mixed.prefill_chunk, mixed.kv_prefill, strict=True)])
        beside = np.array([decoding[key] for key in zip(mixed.n_decode, mixed.kv_decode, strict=True)])
        ratio = (mixed.time_us.to_numpy(np.float64) - before) / beside
        ratios.append(ratio[beside >= 0.25 * (before + beside)])
    return float(np.median(np.concatenate(ratios)))
