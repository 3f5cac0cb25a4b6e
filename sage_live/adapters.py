"""What differs between engines that speak OpenAI's protocol. docs/adapters.md says where each fact is from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sage_core.errors import ConfigError

COUNT_MAX: Final = 2**31 - 1
TOKENS_MAX: Final = 1 << 40
"""What the plane can hold: beyond it, what an engine says is a defect of the engine."""


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine's ``/metrics`` said about its load; None: it does not say."""

    running: int | None = None
    waiting: int | None = None
    kv_used: float | None = None  # fraction of the KV cache
    blocks: int | None = None  # its size
    kv_tokens: int | None = None  # the same in tokens


@dataclass(frozen=True, slots=True)
class Adapter:
    """One kind of engine.

    running, waiting, kv_used: metrics of its ``/metrics`` (Prometheus), "" where there is none; values of several label
    sets are summed, fractions averaged. cache_info: a metric whose labels say how large the KV cache is. usage: it
    sends ``usage`` at the end of a stream when asked with ``stream_options``. priority: of the ``priority``
    that it takes in the body where it schedules by it: 1, the smaller is served first, as here; -1, the larger; 0: none.
    """

    name: str
    health: str = "/health"
    metrics: str = "/metrics"
    embeddings: str = "/v1/embeddings"
    running: str = ""
    waiting: str = ""
    kv_used: str = ""
    cache_info: str = ""
    usage: bool = True
    priority: int = 0

    @property
    def reports(self) -> bool:
        """Whether its ``/metrics`` say anything about load."""
        return bool(self.running or self.waiting)

    def load(self, text: str) -> Load:
        """Read ``/metrics``. What cannot be read is absent: an engine may serve half of it."""
        if not self.reports:
            return Load()
        running, waiting = _total(text, self.running), _total(text, self.waiting)
        used = _values(text, self.kv_used)
        labels = _labels(text, self.cache_info)
        blocks: int | None
        tokens: int | None
        try:
            blocks = int(labels["num_gpu_blocks"])
            tokens = blocks * int(labels["block_size"])
        except (KeyError, ValueError):
            blocks = tokens = None
        if blocks is None or tokens is None or not (0 < blocks <= COUNT_MAX and 0 < tokens <= TOKENS_MAX):
            blocks = tokens = None
        return Load(
            _count(running),
            _count(waiting),
            min(max(sum(used) / len(used), 0.0), 1.0) if used else None,
            blocks,
            tokens,
        )


ADAPTERS: Final[Mapping[str, Adapter]] = {
    adapter.name: adapter
    for adapter in (
        Adapter(
            "vllm",
            running="vllm:num_requests_running",
            waiting="vllm:num_requests_waiting",
            kv_used="vllm:kv_cache_usage_perc",
            cache_info="vllm:cache_config_info",
            priority=1,
        ),
        Adapter(
            "sglang",
            running="sglang:num_running_reqs",
            waiting="sglang:num_queue_reqs",
            kv_used="sglang:token_usage",
            priority=-1,
        ),
        Adapter(
            "trtllm",
            metrics="/prometheus/metrics",  # its /metrics is JSON, one entry an iteration
            running="trtllm_num_requests_running",
            waiting="trtllm_num_requests_waiting",
            kv_used="trtllm_kv_cache_utilization",
            cache_info="trtllm_cache_config_info",
        ),
        Adapter(
            "llamacpp",
            running="llamacpp:requests_processing",
            waiting="llamacpp:requests_deferred",
        ),
        Adapter("tei", waiting="te_queue_size"),
        Adapter("infinity", embeddings="/embeddings"),
        Adapter("sage"),
        Adapter("openai", health="/v1/models", metrics="", usage=False),
    )
}
"""``sage``: our own embedding server. ``openai``: anything else; nothing is assumed."""


def adapter(name: str) -> Adapter:
    """ConfigError for an unknown one."""
    if name not in ADAPTERS:
        raise ConfigError(f"adapter: unknown adapter {name!r}; known: {', '.join(ADAPTERS)}")
    return ADAPTERS[name]


def _count(value: float | None) -> int | None:
    """What can be a number of requests; an engine that says anything else has said nothing."""
    return int(value) if value is not None and 0 <= value <= COUNT_MAX else None


def _values(text: str, metric: str) -> list[float]:
    found = []
    if metric:
        for line in text.splitlines():
            if line.startswith(metric) and line[len(metric) : len(metric) + 1] in ("{", " "):
                try:
                    value = float(line.rpartition(" ")[2])
                except ValueError:
                    continue
                if math.isfinite(value):
                    found.append(value)
    return found


def _total(text: str, metric: str) -> float | None:
    values = _values(text, metric)
    return sum(values) if values else None


def _labels(text: str, metric: str) -> dict[str, str]:
    if metric:
        for line in text.splitlines():
            if line.startswith(metric + "{"):
                pairs = line[len(metric) + 1 : line.rfind("}")].split(",")
                return {name: value.strip('"') for name, _, value in (pair.partition("=") for pair in pairs)}
    return {}
