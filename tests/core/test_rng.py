"""Streams: the name alone says which numbers come, and no stream moves another."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.rng import Streams

GOLDEN = [6720, 6624, 247, 3245]
"""The first numbers below 10,000 of Streams(1).stream("arrivals"): results on disk depend on them."""

PROGRAM = """
from sage_core.rng import Streams
print(Streams(1).stream("arrivals").integers(0, 10_000, 4).tolist())
"""


def numbers(seed: int, name: str, count: int = 64) -> list[int]:
    drawn: list[int] = Streams(seed).stream(name).integers(0, 2**62, count).tolist()
    return drawn


@given(seed=st.integers(0, 2**64), name=st.text(max_size=20))
def test_the_same_name_gives_the_same_numbers(seed: int, name: str) -> None:
    assert numbers(seed, name) == numbers(seed, name)


@given(seed=st.integers(0, 1000), names=st.lists(st.text(max_size=8), min_size=2, max_size=2, unique=True))
def test_another_name_gives_other_numbers(seed: int, names: list[str]) -> None:
    assert not set(numbers(seed, names[0])) & set(numbers(seed, names[1]))


@given(seed=st.integers(0, 1000), other=st.integers(0, 1000))
def test_another_seed_gives_other_numbers(seed: int, other: int) -> None:
    assert (numbers(seed, "x") == numbers(other, "x")) == (seed == other)


def test_using_one_stream_does_not_move_another() -> None:
    streams = Streams(5)
    streams.stream("noise").random(1000)
    used = streams.stream("noise")
    used.random(10)
    assert streams.stream("arrivals").random(8).tolist() == Streams(5).stream("arrivals").random(8).tolist()


def test_a_stream_starts_afresh_each_time_it_is_asked_for() -> None:
    streams = Streams(5)
    assert streams.stream("a").random(8).tolist() == streams.stream("a").random(8).tolist()


def test_streams_of_different_names_are_uncorrelated() -> None:
    count = 20_000
    columns = [Streams(9).stream(f"s{i}").standard_normal(count) for i in range(6)]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / np.sqrt(count)  # 5 standard errors


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242"])
def test_the_numbers_do_not_depend_on_the_process(hash_seed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(GOLDEN)


@pytest.mark.parametrize("seed", [-1, True, 1.0, "1", None])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed: expected a whole number from 0, got"):
        Streams(seed)
