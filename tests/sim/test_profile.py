"""Shipped profiles load and convert; broken ones are one clear error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sage_core.errors import ConfigError, DataError
from sage_sim.iteration import IterationWork
from sage_sim.profile import PROFILES, load_profile, profile_names

LLM = "llama-3.1-8b-a100-tp1"
EMBEDDING = "bge-large-en-v1.5-l4"
NEEDED = {
    LLM,
    "llama-3.1-8b-h100-tp1",
    "llama-2-70b-a100-tp4",
    "llama-2-70b-a100-tp8",
    "llama-2-70b-h100-tp4",
    "llama-2-70b-h100-tp8",
    EMBEDDING,
    "bge-small-en-v1.5-cpu",
}


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profile_is_complete(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source.origin and profile.source.files and profile.source.licence and profile.source.method
    assert profile.assumptions
    for error in profile.errors.values():
        assert error.train > 0 and error.held_out >= 10
        assert abs(error.bias_pct) <= error.mape_pct <= error.ape_pct_p95
    if profile.kind == "llm":
        assert {"decode", "prefill"} <= profile.errors.keys()
        assert profile.bound_share is not None and 0 < profile.bound_share <= 1
        assert profile.kv_tokens_max > 10_000
        # Some kernel sums hold a mixed phase; a measured engine without one must not claim a factor.
        assert ("mixed" in profile.errors) or profile.time.mixed_permille == 1000


def test_needed_profiles_are_shipped() -> None:
    assert set(profile_names()) >= NEEDED


@pytest.mark.parametrize("name", profile_names())
def test_picoseconds_agree_with_the_human_units(name: str) -> None:
    profile = load_profile(name)
    law, time = profile.iteration_time(), profile.time
    cases = [(0, 0, 1, 100), (0, 0, 64, 70_000), (16, 128, 0, 0), (700, 245_000, 0, 0), (2048, 2_097_152, 32, 50_000)]
    for tokens, pairs, seqs, kv in cases:
        if profile.kind == "embedding" and seqs:
            continue
        exact_us = float(time.step_us(tokens, pairs, seqs, kv))
        assert law.iteration_ps(IterationWork(seqs, kv, prefill_tokens=tokens, attention2=2 * pairs)) == pytest.approx(
            exact_us * 1e6, rel=1e-6, abs=2
        )


def test_kv_tokens_by_hand() -> None:
    profile = load_profile(LLM)
    # Llama-3.1-8B: 32 layers x 8 KV heads x 128 x 2 (K, V) x 2 bytes = 128 KiB a token; 8,030,261,248 weights.
    reserve = 2**30 + 8192 * (3 * 14336 + 4 * 4096) * 2 + 256 * 128256 * 4 * 2
    expected = math.floor((0.9 * 80 * 2**30 - reserve - 2 * 8_030_261_248) / (32 * 8 * 128 * 2 * 2))
    assert profile.kv_tokens_max == expected
    assert profile.kv_tokens(0.5) < expected < profile.kv_tokens(1.0)


def test_kv_tokens_refuses_what_cannot_be() -> None:
    profile = load_profile("llama-2-70b-a100-tp4")
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization: expected above 0 and at most 1, got 90"):
        profile.kv_tokens(90)
    with pytest.raises(ConfigError, match=r"weights of meta-llama/Llama-2-70b-hf .* leave no room .* 4 x a100_sxm"):
        profile.kv_tokens(0.4)


def test_embedding_profile_has_no_kv_cache() -> None:
    assert load_profile(EMBEDDING).kv_tokens_max == 0
    assert load_profile(EMBEDDING).iteration_time().decode_base == 1


def test_embedding_time_reproduces_the_measured_rate() -> None:
    time = load_profile(EMBEDDING).time
    tokens = 256 * 449
    assert tokens / float(time.prefill_us(tokens, tokens * 449 / 2)) * 1e6 == pytest.approx(62192.4, rel=1e-3)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("llama-9")
    assert "'llama-9'" in str(caught.value)
    assert all(name in str(caught.value) for name in profile_names())


def test_warns_outside_the_fitted_range() -> None:
    profile = load_profile(LLM)
    assert profile.warn_outside(seqs=64, kv_tokens=100_000, prefill_tokens=8192, prompt_tokens=512) == []
    messages = profile.warn_outside(seqs=1024, prompt_tokens=9)
    assert len(messages) == 2
    assert messages[0] == f"profile {LLM}: decode_seqs = 1024 is extrapolated; the profile was fitted for 1 to 256"
    assert "was not fitted" in load_profile(EMBEDDING).warn_outside(seqs=1)[0]


def _tree(name: str = LLM) -> dict[str, Any]:
    tree = yaml.safe_load((PROFILES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(tree, dict)
    return tree


def _set(tree: dict[str, Any], section: str, key: str, value: object) -> dict[str, Any]:
    tree[section][key] = value
    return tree


def _without(tree: dict[str, Any], section: str, key: str) -> dict[str, Any]:
    del tree[section][key]
    return tree


BROKEN: dict[str, tuple[Any, str]] = {
    "missing key": (_without(_tree(), "time", "prefill_base_us"), r"at time: .*prefill_base_us"),
    "unknown key": (_set(_tree(), "time", "decode_base_ms", 11.0), r"at time: .*decode_base_ms"),
    "wrong type": (_set(_tree(), "time", "decode_base_us", "fast"), r"at time\.decode_base_us: Expected `float`"),
    "negative": (_set(_tree(), "time", "decode_per_seq_us", -1.0), r"at time: decode_per_seq_us: expected .* from 0"),
    "nan": (_set(_tree(), "time", "prefill_floor_us", math.nan), r"at time: prefill_floor_us: expected a finite"),
    "no decode": (_set(_tree(), "time", "decode_base_us", 0.0), r"time\.decode_base_us: an llm profile needs"),
    "no cost per token": (_set(_tree(), "time", "prefill_per_token_us", 0.0), r"prefill_per_token_us: expected more"),
    "no memory": (_without(_tree(), "hardware", "memory_gib"), r"hardware\.memory_gib: an llm profile needs"),
    "no such kind": ({**_tree(), "kind": "gpt"}, r"at kind: Invalid enum value 'gpt'"),
    "unknown source": (_set(_tree(), "source", "kind", "guessed"), r"at source\.kind: Invalid enum value"),
    "embedding that decodes": (_set(_tree(EMBEDDING), "time", "decode_base_us", 5.0), r"no decode_\* times"),
    "a list": ([1, 2], r"at the top level: Expected `object`, got `array`"),
    "nothing": (None, r"at the top level: Expected `object`, got `null`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_names_file_and_key(case: str, tmp_path: Path) -> None:
    tree, message = BROKEN[case]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)


def test_a_copy_of_a_shipped_file_loads_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(_tree()), encoding="utf-8")
    assert load_profile(str(path)) == load_profile(LLM)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"name: [unclosed", r"not valid YAML at line 1"), (b"\xff\xfe\x00", r"not UTF-8"), (None, r"No such file")],
)
def test_unreadable_file(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_profile(path)


def test_columns_broadcast() -> None:
    time = load_profile(LLM).time
    many = time.step_us(np.array([0, 512]), np.array([0, 131_072]), np.array([8, 8]), np.array([4096, 4096]))
    assert many.tolist() == [float(time.step_us(0, 0, 8, 4096)), float(time.step_us(512, 131_072, 8, 4096))]
    assert many[1] > float(time.step_us(512, 131_072, 0, 0))
