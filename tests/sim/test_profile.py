"""Shipped profiles load and convert; broken ones are one clear error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sage_core.errors import ConfigError, DataError
from sage_sim.iteration import IterationTime, IterationWork
from sage_sim.profile import PROFILES, Attention, Curve, Prefill, TimeModel, load_profile, profile_names

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
    "llama-3.1-8b-rtx4090-tp1",
    *(f"{model}-rtxpro6000-tp{tp}" for model in ("llama-3.1-8b", "qwen3-32b", "qwen3-30b-a3b") for tp in (1, 2)),
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
    if profile.source.kind == "roofline":
        # Nothing of it was measured: no error of its own, but the prior's on GPUs that were.
        assert not profile.errors
        assert sum("left out of the prior" in check.against for check in profile.checks) >= 3
    if profile.kind == "llm":
        assert profile.source.kind == "roofline" or {"decode", "prefill"} <= profile.errors.keys()
        assert profile.bound_share is not None and 0 < profile.bound_share <= 1
        assert profile.kv_tokens_max > 10_000
        assert profile.valid.decode_context is not None
    # A file stays readable: knots, not the table they were fitted to.
    assert sum(type(leaf) is float for leaf in _leaves(_tree(name)["time"])) < 250


def test_needed_profiles_are_shipped() -> None:
    assert set(profile_names()) >= NEEDED


def test_picoseconds_are_those_of_the_keys() -> None:
    time = TimeModel(
        token=Curve([1, 3], [1.5, 2.000001]),
        head=Curve([1], [0.25]),
        prefill=Prefill(Curve([4], [8.0]), per_pair_ns=0.003, per_context_token_ns=5.0),
        attention=Attention([1, 2], [16], [[3.0], [4.0]], [[5.0], [7.0]], mixed_per_seq_token_ns=0.5),
        overhead_us=0.5,
    )
    assert time.law() == IterationTime(
        token_knots=(1, 3),
        token_ps=(1_500_000, 2_000_001),
        head_knots=(1,),
        head_ps=(250_000,),
        attention_seqs=(1, 2),
        attention_context=(16,),
        decode_ps=(3_000_000, 4_000_000),
        mixed_ps=(5_000_000, 7_000_000),
        mixed_token=500,
        prefill_knots=(4,),
        prefill_ps=(8_000_000,),
        prefill_pair=3,
        prefill_context=5_000,
        overhead=500_000,
    )


@pytest.mark.parametrize("name", profile_names())
def test_more_work_takes_no_less_time(name: str) -> None:
    profile = load_profile(name)
    law = profile.iteration_time()
    if profile.kind == "embedding":
        batches = [law.batch_ps(n * 256, n * 256**2) for n in (1, 8, 64, 512)]
        assert batches == sorted(batches)
        return
    contexts = [law.iteration_ps(IterationWork(16, 16 * context)) for context in range(0, 200_000, 777)]
    assert contexts == sorted(contexts)
    batches = [law.iteration_ps(IterationWork(seqs, seqs * 1_000)) for seqs in (1, 4, 16, 64, 256, 1024)]
    assert batches == sorted(batches)
    alone = law.iteration_ps(IterationWork(0, 0, 1, 1024, 0, 1024**2))
    beside = law.iteration_ps(IterationWork(32, 32_000, 1, 1024, 0, 1024**2))
    assert beside > max(alone, law.iteration_ps(IterationWork(32, 32_000)))


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


def test_embedding_time_reproduces_the_measured_rate() -> None:
    law, tokens = load_profile(EMBEDDING).iteration_time(), 256 * 449
    assert tokens / law.batch_ps(tokens, tokens * 449) * 1e12 == pytest.approx(62192.4, rel=1e-3)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("llama-9")
    assert "'llama-9'" in str(caught.value)
    assert all(name in str(caught.value) for name in profile_names())


def test_warns_outside_the_fitted_range() -> None:
    profile = load_profile(LLM)
    assert profile.warn_outside(seqs=64, kv_tokens=100_000, prefill_tokens=8192, prompt_tokens=512) == []
    messages = profile.warn_outside(seqs=1024, prompt_tokens=9, context=100_000)
    assert len(messages) == 3
    assert messages[0] == f"profile {LLM}: decode_seqs = 1024 is extrapolated; the profile was fitted for 1 to 256"
    assert "decode_context = 100000 is extrapolated" in messages[1]
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


def _attention(**changes: object) -> dict[str, Any]:
    tree = _tree()
    table = {"seqs": [1, 2], "context": [16, 32], "decode_us": [[1.0, 2.0]] * 2, "mixed_us": [[1.0, 2.0]] * 2}
    tree["time"]["attention"] = table | changes
    return tree


def _curve(at: object, us: object) -> dict[str, Any]:
    return _set(_tree(), "time", "token", {"at": at, "us": us})


def _leaves(tree: object) -> Iterator[object]:
    if isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(item)
    else:
        yield tree


BROKEN: dict[str, tuple[Any, str]] = {
    "missing key": (_without(_tree(), "time", "prefill"), r"at time: .*prefill"),
    "unknown key": (_set(_tree(), "time", "token_ms", 11.0), r"at time: .*token_ms"),
    "wrong type": (_set(_tree(), "time", "overhead_us", "fast"), r"at time\.overhead_us: Expected `float`"),
    "negative": (_set(_tree(), "time", "overhead_us", -1.0), r"at time: overhead_us: expected .* from 0"),
    "nan": (_set(_tree(), "time", "overhead_us", math.nan), r"at time: overhead_us: expected a finite"),
    "no head": (_without(_tree(), "time", "head"), r"time\.head: an llm profile needs it"),
    "no attention": (_without(_tree(), "time", "attention"), r"time\.attention: an llm profile needs it"),
    "knots that fall": (_curve([2, 1], [1.0, 1.0]), r"at time\.token: at: expected whole numbers from 0 that rise"),
    "no knots": (_curve([], []), r"at time\.token: at: expected whole numbers from 0 that rise"),
    "times missing": (_curve([1, 2], [1.0]), r"at time\.token: us: expected 2 times, one for each knot"),
    "time below 0": (_curve([1, 2], [-1.0, 1.0]), r"at time\.token: us: expected finite numbers from 0"),
    "no time": (_curve([1, 2], [0.0, 1.0]), r"at time: token\.us: expected more than 0"),
    "falls at the end": (_curve([1, 2, 3], [1.0, 3.0, 2.0]), r"at time\.token: us: the last time is below"),
    "row missing": (_attention(decode_us=[[1.0, 2.0]]), r"attention: decode_us: expected 2 rows of 2 times"),
    "row falls": (_attention(mixed_us=[[1.0, 2.0], [2.0, 1.0]]), r"attention: mixed_us: expected times that never"),
    "column falls": (
        _attention(decode_us=[[2.0, 2.0], [1.0, 2.0]]),
        r"attention: decode_us: expected times that never",
    ),
    "no memory": (_without(_tree(), "hardware", "memory_gib"), r"hardware\.memory_gib: an llm profile needs"),
    "no such kind": ({**_tree(), "kind": "gpt"}, r"at kind: Invalid enum value 'gpt'"),
    "unknown source": (_set(_tree(), "source", "kind", "guessed"), r"at source\.kind: Invalid enum value"),
    "embedding that decodes": (
        _set(_tree(EMBEDDING), "time", "head", {"at": [1], "us": [5.0]}),
        r"an embedding profile has no time\.head",
    ),
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
    [(b"name: [unclosed", r"not valid YAML at line [12]"), (b"\xff\xfe\x00", r"not UTF-8"), (None, r"No such file")],
)
def test_unreadable_file(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_profile(path)
