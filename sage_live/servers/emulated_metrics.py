"""What an emulated engine counts, and how it tells: vLLM's names where vLLM has them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sage_core.events import ReplicaReported
from sage_live.servers.prometheus import SECONDS, Exposition, Histogram
from sage_live.servers.realtime import Usage


@dataclass(frozen=True, slots=True)
class KvCache:
    """Of the LLM engine."""

    kv_blocks: int
    block_size: int
    prefix_caching: bool


class Statistics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generation_tokens = 0
        self.ended = {"stop": 0, "length": 0, "abort": 0}
        self.embedded = 0  # texts
        self.failed = 0  # on request
        self.ttft, self.e2e = Histogram(SECONDS), Histogram(SECONDS)

    def exposition(
        self,
        model: str,
        kv_cache: KvCache | None,
        reports: Sequence[ReplicaReported],
        usage: Sequence[Usage],
        lateness: Histogram,
    ) -> bytes:
        """The text of ``/metrics``. ``reports`` and ``usage``: of each replica, that of the LLM first where there is one."""
        out = Exposition({"engine": "0", "model_name": model})
        running, waiting = sum(r.running for r in reports), sum(r.waiting for r in reports)
        out.sample("vllm:num_requests_running", "gauge", "Sequences or texts in the running batch.", running)
        out.sample("vllm:num_requests_waiting", "gauge", "Those that wait to be scheduled.", waiting)
        if kv_cache is not None:
            used = 1 - reports[0].kv_blocks_free / kv_cache.kv_blocks
            out.sample("vllm:kv_cache_usage_perc", "gauge", "KV cache in use; 1 is all of it.", used)
            config = {
                "block_size": str(kv_cache.block_size),
                "cache_dtype": "auto",
                "enable_prefix_caching": str(kv_cache.prefix_caching),
                "num_gpu_blocks": str(kv_cache.kv_blocks + 1),  # vLLM keeps one back
            }
            out.samples("vllm:cache_config_info", "gauge", "The KV cache.", [(1, config)])
            out.sample("vllm:num_preemptions_total", "counter", "Preemptions.", usage[0].preemptions)
            out.sample("vllm:prefix_cache_queries_total", "counter", "Tokens looked up.", usage[0].prefix_queries)
            out.sample("vllm:prefix_cache_hits_total", "counter", "Tokens found.", usage[0].prefix_hits)
        out.sample("vllm:prompt_tokens_total", "counter", "Prompt tokens of ended requests.", self.prompt_tokens)
        out.sample("vllm:generation_tokens_total", "counter", "Tokens of ended requests.", self.generation_tokens)
        ended = [(count, {"finished_reason": reason}) for reason, count in self.ended.items()]
        out.samples("vllm:request_success_total", "counter", "Requests that ended, by why.", ended)
        out.histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", self.ttft)
        out.histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", self.e2e)
        out.sample("sage_emulated_embedded_texts_total", "counter", "Texts embedded.", self.embedded)
        out.sample("sage_emulated_failures_total", "counter", "Failures that were asked for.", self.failed)
        iterations, busy_s = sum(u.iterations for u in usage), sum(u.busy_ns for u in usage) / 1e9
        out.sample("sage_emulated_iterations_total", "counter", "Iterations and batches that have ended.", iterations)
        out.sample("sage_emulated_busy_seconds_total", "counter", "Time on the model's clock in them.", busy_s)
        what = "From the instant of an event in the model until the event loop told it."
        out.histogram("sage_emulated_lateness_seconds", what, lateness)
        out.sample("process_cpu_seconds_total", "counter", "CPU time of the process.", time.process_time())
        return out.text()
