"""What fits on a device: weights, KV cache and reserve of its replicas against its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sage_core.errors import ConfigError


class ReplicaMemory(NamedTuple):
    """Bytes on each of the devices that a replica runs on. reserve: CUDA context, graphs, activations."""

    name: str
    weights: int
    kv_cache: int
    reserve: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.reserve


def llm_memory(
    name: str, *, weights: int, kv_bytes_per_token: int, kv_tokens: int, reserve: int, devices: int = 1
) -> ReplicaMemory:
    """Of an LLM replica whose ``weights`` and KV cache (``kv_tokens``) are spread evenly over ``devices``."""
    return ReplicaMemory(name, -(-weights // devices), -(-kv_bytes_per_token * kv_tokens // devices), reserve)


def check_memory(device: str, memory_bytes: int, replicas: Sequence[ReplicaMemory]) -> None:
    """ConfigError where ``replicas`` do not fit on ``device`` together, with what each needs."""
    needed = sum(replica.total for replica in replicas)
    if needed <= memory_bytes:
        return
    parts = "; ".join(
        f"{r.name}: {_gib(r.weights)} weights + {_gib(r.kv_cache)} KV cache + {_gib(r.reserve)} reserve"
        for r in replicas
    )
    raise ConfigError(
        f"{device}: its replicas need {_gib(needed)} GiB and it has {_gib(memory_bytes)} GiB ({parts}); lower kv_tokens "
        f"or gpu_memory_utilization, or place them apart"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"
