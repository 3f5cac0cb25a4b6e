"""Whether the replicas of a device fit in its memory."""

from __future__ import annotations

import pytest

from sage_core.errors import ConfigError
from sage_sim.memory import ReplicaMemory, check_memory, llm_memory

GIB = 2**30


def test_what_an_llm_needs_on_each_of_its_devices() -> None:
    one = llm_memory("llm", weights=16 * GIB, kv_bytes_per_token=131_072, kv_tokens=41_408, reserve=GIB)
    assert one == ReplicaMemory("llm", 16 * GIB, 131_072 * 41_408, GIB)
    two = llm_memory("llm", weights=16 * GIB, kv_bytes_per_token=131_072, kv_tokens=41_408, reserve=GIB, devices=2)
    assert (two.weights, two.kv_cache, two.reserve) == (8 * GIB, 131_072 * 41_408 // 2, GIB)


def test_what_fits_to_the_byte_fits_and_one_more_does_not() -> None:
    replicas = [ReplicaMemory("llm", 10 * GIB, 5 * GIB, GIB), ReplicaMemory("embed", 2 * GIB, 0, GIB)]
    check_memory("gpu0", 19 * GIB, replicas)
    with pytest.raises(
        ConfigError,
        match=r"gpu0: its replicas need 19.00 GiB and it has 19.00 GiB \(llm: 10.00 weights \+ 5.00 KV cache \+ 1.00 "
        r"reserve; embed: 2.00 weights",
    ):
        check_memory("gpu0", 19 * GIB - 1, replicas)
