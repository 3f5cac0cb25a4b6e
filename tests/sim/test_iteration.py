"""The law of iteration time: worked cases, native against Python, and what it refuses."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core import _native
from sage_core.errors import ConfigError
from sage_sim.iteration import TIME_MAX, IterationTime, IterationWork

LAW = IterationTime(
    token_knots=(1, 10, 100),
    token_ps=(1_000, 1_090, 10_000),
    head_knots=(1, 4),
    head_ps=(50, 80),
    attention_seqs=(1, 3),
    attention_context=(10, 20, 40),
    decode_ps=(30, 40, 100, 60, 90, 300),
    mixed_ps=(60, 80, 200, 120, 180, 600),
    mixed_token=2,
    prefill_knots=(10, 20),
    prefill_ps=(500, 600),
    prefill_pair=3,
    prefill_context=40,
    overhead=7,
)


def decode_ps(seqs: int, kv_tokens: int) -> int:
    return LAW.iteration_ps(IterationWork(seqs, kv_tokens))


def prefill_ps(chunk: int, context: int, seqs: int = 0, kv_tokens: int = 0) -> int:
    return LAW.iteration_ps(IterationWork(seqs, kv_tokens, 1, chunk, context, chunk * (2 * context + chunk)))


def test_decode_between_and_beyond_knots() -> None:
    # Two sequences: halfway between the rows (45, 65, 200); 1,010 ps for two tokens, 60 for two rows of the head.
    assert decode_ps(2, 2 * 10) == 7 + 1_010 + 60 + 45
    assert decode_ps(2, 2 * 15) == 7 + 1_010 + 60 + 45 + 2 * 5
    assert decode_ps(2, 2 * 15 + 1) == 7 + 1_010 + 60 + 45 + 2 * 11 // 2  # a mean context of 15 and a half
    assert decode_ps(2, 2 * 3) == decode_ps(2, 2 * 10)  # below the first knot
    assert decode_ps(2, 2 * 50) == 7 + 1_010 + 60 + 65 + (200 - 65) // 20 * 30  # beyond the last
    assert decode_ps(5, 5 * 10) == 7 + 1_040 + 90 + 90  # more sequences than the last row: 30 to 60, then 90
    assert decode_ps(0, 0) == 7 + 1_000 + 50  # everybody was preempted


def test_prefill_is_bound_by_pairs_or_by_the_context() -> None:
    # 15 tokens: 1,585 ps, a head of one row, a base of 550; 15 * 15 / 2 pairs at 3 ps, or nothing read.
    assert prefill_ps(15, 0) == 7 + 1_090 + 8_910 * 5 // 90 + 50 + 550 + 3 * 225 // 2
    assert prefill_ps(10, 1_000) == 7 + 1_090 + 50 + 500 + 1_000 * 40  # 10,050 pairs would take 30,150
    assert prefill_ps(20, 1_000) == 7 + 1_090 + 990 + 50 + 600 + 3 * 20_200
    two = IterationWork(0, 0, 2, 20, 2_000, 2 * 10 * 2_010)
    assert LAW.iteration_ps(two) == 7 + 1_090 + 990 + 60 + 600 + 3 * 20_100  # side by side: 1,000 each, not 2,000


def test_mixed_iteration() -> None:
    alone, tokens = prefill_ps(20, 0), 990 * 2 // 10  # two tokens more in the iteration
    head = 20  # from one row to three
    assert prefill_ps(20, 0, seqs=2, kv_tokens=30) == alone + tokens + head + 90 + 4 * 5 + 2 * 2 * 20
    halves = IterationWork(2, 30, 2, 20, 0, 200)
    assert LAW.iteration_ps(halves) == LAW.iteration_ps(IterationWork(0, 0, 2, 20, 0, 200)) + tokens + head + 110 + 40


def test_embedding_batch() -> None:
    assert LAW.batch_ps(20, 200) == 7 + 1_090 + 990 + 600 + 300


def test_default_is_the_least() -> None:
    assert IterationTime().iteration_ps(IterationWork(3, 99)) == 1
    assert IterationTime().batch_ps(5, 25) == 1


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", TIME_MAX + 1])
@pytest.mark.parametrize("name", ["head_ps", "overhead"])
def test_times_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected whole numbers from 0 to"):
        IterationTime(**{name: value if name == "overhead" else (value,)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_knots": (1, 1), "token_ps": (1, 1)}, "token_knots: expected rising knots"),
        ({"head_knots": (), "head_ps": ()}, "head_knots: expected whole numbers from 0 to .* got 'none'"),
        ({"prefill_ps": (1, 2)}, "prefill_ps: expected 1 times, one for each knot, got 2"),
        ({"token_knots": (1, 2, 3), "token_ps": (1, 3, 2)}, "token_ps: falls at the end"),
        ({"token_knots": (1, 2, 3), "token_ps": (1, 0, 2)}, "token_ps: expected at least 1 ps"),
        ({"attention_seqs": (1, 2), "decode_ps": (1, 2)}, "mixed_ps: expected 2 times"),
        ({"attention_seqs": (1, 2), "decode_ps": (2, 1), "mixed_ps": (0, 0)}, "decode_ps: expected times that never"),
        ({"attention_context": (1, 2), "decode_ps": (0, 0), "mixed_ps": (2, 1)}, "mixed_ps: expected times that never"),
    ],
)
def test_tables_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IterationTime(**changes)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(IterationTime)])
def test_native_law_refuses_what_it_would_read_past(name: str) -> None:
    numbers = LAW.numbers()
    with pytest.raises(ValueError, match=f"engine: .*{name}"):
        _native.IterationTime({key: value for key, value in numbers.items() if key != name})
    if isinstance(numbers[name], tuple):
        with pytest.raises(ValueError, match="engine: "):
            _native.IterationTime(numbers | {name: (*numbers[name], 10**6)})


# --- native against Python -------------------------------------------------------------------------------------------

_KNOTS = st.lists(st.integers(0, 5_000), min_size=1, max_size=6, unique=True).map(sorted).map(tuple)
_STEP = st.sampled_from([0, 1, 7, 1_000, 123_457, 10**9])


@st.composite
def curves(draw: st.DrawFn, least: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    knots = draw(_KNOTS)
    times = [least + draw(_STEP) for _ in knots]
    times[-1] = max(times[-2:])
    return knots, tuple(times)


@st.composite
def tables(draw: st.DrawFn, rows: int, columns: int) -> tuple[int, ...]:
    """Non-negative steps summed along both axes, then loosened: rows need not grow further apart."""
    table = [_sums([draw(_STEP) for _ in range(columns)]) for _ in range(rows)]
    for below, row in pairwise(table):
        row[:] = [max(pair) for pair in zip(below, row, strict=True)]
    return tuple(value for row in table for value in row)


@st.composite
def laws(draw: st.DrawFn) -> IterationTime:
    token, head, prefill = draw(curves(least=1)), draw(curves()), draw(curves())
    seqs, context = draw(_KNOTS), draw(_KNOTS)
    return IterationTime(
        token_knots=token[0],
        token_ps=token[1],
        head_knots=head[0],
        head_ps=head[1],
        attention_seqs=seqs,
        attention_context=context,
        decode_ps=draw(tables(len(seqs), len(context))),
        mixed_ps=draw(tables(len(seqs), len(context))),
        mixed_token=draw(_STEP),
        prefill_knots=prefill[0],
        prefill_ps=prefill[1],
        prefill_pair=draw(_STEP),
        prefill_context=draw(_STEP),
        overhead=draw(_STEP),
    )


@st.composite
def works(draw: st.DrawFn) -> IterationWork:
    contexts = draw(st.lists(st.integers(1, 20_000), max_size=8))
    chunks = draw(st.lists(st.tuples(st.integers(1, 3_000), st.integers(0, 20_000)), max_size=4))
    return IterationWork(
        len(contexts),
        sum(contexts),
        len(chunks),
        sum(p for p, _ in chunks),
        sum(context for _, context in chunks),
        sum(p * (2 * context + p) for p, context in chunks),
    )


@settings(max_examples=300, deadline=None)
@given(laws(), works())
def test_native_law_is_the_same(law: IterationTime, work: IterationWork) -> None:
    native = _native.IterationTime(law.numbers())
    assert native.iteration_ps(*work) == law.iteration_ps(work) >= 1
    tokens = work.prefill_tokens + work.seqs
    assert native.batch_ps(tokens, tokens**2) == law.batch_ps(tokens, tokens**2) >= 1


@settings(max_examples=300, deadline=None)
@given(laws(), st.integers(0, 300), st.integers(0, 6_000), st.integers(0, 299), st.integers(1, 5_000))
def test_series_is_what_successive_iterations_take(
    law: IterationTime, seqs: int, context: int, odd: int, terms_max: int
) -> None:
    kv_tokens = seqs * context + (odd % seqs if seqs else 0)
    first, growth, terms = _native.IterationTime(law.numbers()).decode_series(seqs, kv_tokens, terms_max)
    assert 1 <= terms <= terms_max
    assert growth >= 0
    for k in {0, 1, terms // 2, terms - 1} & set(range(terms)):
        assert first + k * growth == law.iteration_ps(IterationWork(seqs, kv_tokens + k * seqs))
    at_a_knot = any(context < knot <= context + terms + 1 for knot in law.attention_context)
    assert terms == terms_max or at_a_knot  # a series is not cut short for nothing


def test_products_past_64_bits() -> None:
    law = IterationTime(token_knots=(1, 2**31 - 1), token_ps=(1, 10**15), overhead=3)
    work = IterationWork(0, 0, 1, 2**31 - 2, 0, 0)
    assert _native.IterationTime(law.numbers()).iteration_ps(*work) == law.iteration_ps(work)
    endless = IterationTime(prefill_pair=10**15)
    with pytest.raises(OverflowError, match="2\\^63 ps"):
        _native.IterationTime(endless.numbers()).iteration_ps(0, 0, 1, 10**6, 0, 10**12)


def _sums(values: list[int]) -> list[int]:
    total, sums = 0, []
    for value in values:
        total += value
        sums.append(total)
    return sums
