"""The law of iteration time, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from sage_core.errors import ConfigError
from sage_sim.iteration import COEFFICIENT_MAX, IterationTime, IterationWork

LAW = IterationTime(
    decode_base=1_000,
    decode_seq=10,
    decode_kv=3,
    prefill_floor=5_000,
    prefill_base=100,
    prefill_token=20,
    prefill_attn=5,
    mixed_permille=1_500,
    overhead=7,
)


def test_phases() -> None:
    assert LAW.iteration_ps(IterationWork(2, 30)) == 7 + 1_000 + 20 + 90
    assert LAW.iteration_ps(IterationWork(0, 0, prefill_tokens=100, attention2=100 * 100)) == 7 + 100 + 2_000 + 25_000
    assert (
        LAW.iteration_ps(IterationWork(0, 0, prefill_tokens=3, attention2=9)) == 7 + 5_000
    )  # on the floor; 100 + 60 + 45 // 2 below it
    assert (
        LAW.iteration_ps(IterationWork(2, 30, prefill_tokens=100, attention2=100 * 100))
        == 7 + 100 + 2_000 + 25_000 + (20 + 90) * 3 // 2
    )
    assert LAW.batch_ps(100, 100 * 100) == 7 + 100 + 2_000 + 25_000


def test_nothing_takes_no_time() -> None:
    assert IterationTime().iteration_ps(IterationWork(0, 0, prefill_tokens=5, attention2=25)) == 1
    assert IterationTime().batch_ps(5, 25) == 1


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", COEFFICIENT_MAX + 1])
def test_coefficients_are_checked(value: Any) -> None:
    with pytest.raises(ConfigError, match="decode_seq: expected a whole number from 0 to"):
        IterationTime(decode_seq=value)
    with pytest.raises(ConfigError, match="decode_base: expected a whole number from 1 to"):
        IterationTime(decode_base=0)
