"""The native engine jumps, the reference walks; both must say the same things at the same nanoseconds."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_core import _native
from sage_core.units import NEVER
from sage_sim import engine_reference
from sage_sim.engine_reference import FAILED, FINISHED, FIRST_TOKEN

Numbers = dict[str, int]
Op = tuple[Any, ...]

COUNTERS = (
    "running",
    "waiting",
    "kv_blocks_free",
    "iterations",
    "preemptions",
    "busy_ns",
    "itl_count",
    "itl_sum_ns",
    "embed_running",
    "embed_waiting",
    "embed_batches",
    "embed_busy_ns",
)

LLAMA_8B_A100: Numbers = {
    "decode_base": 11_600_000_003,
    "decode_seq": 32_000_001,
    "decode_kv": 82_001,
    "prefill_floor": 12_500_000_001,
    "prefill_base": 7_700_000_003,
    "prefill_token": 54_800_001,
    "prefill_attn": 3_101,
    "mixed_permille": 1_200,
    "overhead": 200_000_001,
}


class Pair:
    """Both engines, driven alike and compared at every turn. Also keeps the books: each task ends once at most."""

    def __init__(self, llm: Numbers | None, embed: Numbers | None, reference_llm: Numbers | None = None) -> None:
        self.native = _native.Engine(llm, embed)
        self.reference = engine_reference.Engine(llm if reference_llm is None else reference_llm, embed)
        self.kv_blocks = 0 if llm is None else llm["kv_blocks"]
        self.now = 0
        self.due: set[int] = set()
        self.ends: Counter[int] = Counter()
        self.first_tokens: Counter[int] = Counter()

    def both(self, name: str, *args: int) -> Any:
        native, reference = (getattr(engine, name) for engine in (self.native, self.reference))
        if args or callable(native):
            native, reference = native(*args), reference(*args)
        assert native == reference, f"{name}{args} at {self.now}: native {native}, reference {reference}"
        return native

    def submit(self, task: int, tokens: int, output_tokens: int | None, priority: int) -> None:
        self.due.add(task)
        if output_tokens is None:
            self.both("submit_embed", self.now, task, tokens)
        else:
            self.both("submit_llm", self.now, task, tokens, output_tokens, priority)

    def advance(self, now: int) -> int:
        self.now = now
        told = self.both("advance", now)
        for code, task, _ in told:
            assert task in self.due, f"task {task} was told of after its end"
            if code == FIRST_TOKEN:
                self.first_tokens[task] += 1
                assert self.first_tokens[task] == 1
            else:
                assert code in (FINISHED, FAILED)
                self.ends[task] += 1
                self.due.discard(task)
        return len(told)

    def wake(self) -> bool:
        """To the next event, which must exist: the driver is never woken for nothing."""
        at = self.both("wakeup_at")
        if at == NEVER:
            return False
        assert self.advance(max(at, self.now)) > 0
        return True

    def cancel(self, task: int) -> None:
        known = self.both("cancel", self.now, task)
        assert known == (task in self.due)
        self.due.discard(task)

    def clear(self) -> None:
        self.both("clear", self.now)
        self.due.clear()

    def compare_counters(self) -> None:
        for name in COUNTERS:
            self.both(name)
        assert 0 <= self.native.kv_blocks_free <= self.kv_blocks

    def drain(self) -> None:
        while self.wake():
            pass
        assert not self.due, f"never ended: {sorted(self.due)}"
        assert not self.ends or max(self.ends.values()) == 1
        assert self.native.running == self.native.waiting == 0
        assert self.native.kv_blocks_free == self.kv_blocks
        self.compare_counters()
        self.both("itl_samples")


def play(pair: Pair, ops: list[Op]) -> None:
    tasks: list[int] = []
    for op in ops:
        match op:
            case ("wake",):
                pair.wake()
            case ("pass", span):
                pair.advance(pair.now + span)
            case ("submit", span, sizes):
                pair.now += span
                for tokens, output_tokens, priority in sizes:
                    tasks.append(len(tasks))
                    pair.submit(tasks[-1], tokens, output_tokens, priority)
            case ("cancel", span, pick):
                pair.now += span
                if tasks:
                    pair.cancel(tasks[pick % len(tasks)])
            case ("counters",):
                pair.compare_counters()
            case ("clear",):
                pair.clear()
    pair.drain()


# --- random scripts --------------------------------------------------------------------------------------------------


@st.composite
def laws(draw: st.DrawFn) -> Numbers:
    law = {
        "decode_base": draw(st.sampled_from([1, 1_000, 11_600_123])),
        "decode_seq": draw(st.sampled_from([0, 3, 32_001])),
        "decode_kv": draw(st.sampled_from([0, 1, 82])),
        "prefill_floor": draw(st.sampled_from([0, 500, 12_500_000])),
        "prefill_base": draw(st.sampled_from([0, 7_700_001])),
        "prefill_token": draw(st.sampled_from([0, 54_801])),
        "prefill_attn": draw(st.sampled_from([0, 3])),
        "mixed_permille": draw(st.sampled_from([0, 1000, 1333])),
        "overhead": draw(st.sampled_from([0, 5, 1_000_000])),
    }
    if draw(st.booleans()):  # iterations that end on whole nanoseconds, where commands meet boundaries
        law = {name: value if name == "mixed_permille" else value * 1_000 for name, value in law.items()}
    return law


_FLAG = st.integers(0, 1)
_DELAY = st.sampled_from([0, 3, 20_000])


@st.composite
def llm_engines(draw: st.DrawFn) -> Numbers:
    max_num_seqs = draw(st.integers(1, 8))
    return draw(laws()) | {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(max_num_seqs, 40)),
        "block_size": draw(st.sampled_from([1, 2, 4, 16])),
        "kv_blocks": draw(st.integers(4, 60)),
        "chunked_prefill": draw(_FLAG),
        "priority_queue": draw(_FLAG),
        "ingress_ns": draw(_DELAY),
        "egress_ns": draw(_DELAY),
    }


@st.composite
def embed_engines(draw: st.DrawFn) -> Numbers:
    return draw(laws()) | {
        "max_batch_tasks": draw(st.integers(1, 4)),
        "max_batch_tokens": draw(st.integers(1, 60)),
        "padding": draw(_FLAG),
        "ingress_ns": draw(_DELAY),
        "egress_ns": draw(_DELAY),
    }


@st.composite
def scripts(draw: st.DrawFn) -> tuple[Numbers | None, Numbers | None, list[Op]]:
    llm = draw(st.none() | llm_engines())
    embed = draw(embed_engines() if llm is None else st.none() | embed_engines())
    span = st.integers(0, draw(st.sampled_from([10, 2_000, 30_000, 2_000_000])))
    kinds = []
    if llm is not None:
        kinds.append(st.tuples(st.integers(1, 60), st.integers(1, 40) | st.integers(1, 200), st.integers(0, 2)))
    if embed is not None:
        kinds.append(st.tuples(st.integers(1, 30), st.none(), st.just(0)))
    op = st.one_of(
        st.just(("wake",)),
        st.tuples(st.just("pass"), span),
        st.tuples(st.just("submit"), span, st.lists(st.one_of(kinds), min_size=1, max_size=4)),
        st.tuples(st.just("cancel"), span, st.integers(0, 200)),
        st.just(("counters",)),
    )
    ops = draw(st.lists(op, min_size=1, max_size=40))
    if draw(st.integers(0, 9)) == 0:
        ops.insert(draw(st.integers(0, len(ops))), ("clear",))
    return llm, embed, ops


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scripts())
def test_native_says_what_the_reference_says(script: tuple[Numbers | None, Numbers | None, list[Op]]) -> None:
    llm, embed, ops = script
    play(Pair(llm, embed), ops)


# --- fixed scripts ---------------------------------------------------------------------------------------------------


def llama(**changes: int) -> Numbers:
    engine = {
        "max_num_seqs": 48,
        "max_num_batched_tokens": 1024,
        "block_size": 16,
        "kv_blocks": 4_000,
        "chunked_prefill": 1,
        "priority_queue": 0,
        "ingress_ns": 2_000_000,
        "egress_ns": 500_000,
    }
    return LLAMA_8B_A100 | engine | changes


def poisson(pair: Pair, seed: int, requests: int, per_s: float, *, cancel_every: int = 10**9) -> None:
    """Arrivals at ``per_s``, each met with every event before it told at its own instant."""
    rng = random.Random(seed)
    at = 0
    for task in range(requests):
        at += round(rng.expovariate(per_s) * 1e9)
        while (wakeup := pair.both("wakeup_at")) <= at:
            assert pair.advance(wakeup) > 0
        pair.now = at
        pair.submit(task, rng.randint(1, 1_500), rng.randint(1, 300), rng.randint(0, 1))
        if task % cancel_every == cancel_every - 1 and pair.due:
            pair.cancel(rng.choice(sorted(pair.due)))
        if task % 10 == 0:
            pair.compare_counters()
    pair.drain()


@pytest.mark.parametrize(
    ("changes", "cancel_every"),
    [
        ({}, 7),
        ({"kv_blocks": 600}, 11),
        ({"kv_blocks": 400, "priority_queue": 1}, 10**9),
        ({"chunked_prefill": 0, "kv_blocks": 700}, 13),
    ],
)
def test_a_realistic_load(changes: Numbers, cancel_every: int) -> None:
    pair = Pair(llama(**changes), None)
    poisson(pair, seed=20, requests=600, per_s=6.0, cancel_every=cancel_every)
    assert pair.native.itl_count > 60_000
    if pair.kv_blocks < 1_000:
        assert pair.native.preemptions > 10


@pytest.mark.parametrize("coefficient", sorted(LLAMA_8B_A100))
def test_canary_one_picosecond_is_noticed(coefficient: str) -> None:
    """A comparison that could not fail would prove nothing: one coefficient off by one must be seen."""
    llm = llama(max_num_seqs=8, max_num_batched_tokens=256)
    off = llm | {coefficient: llm[coefficient] + 1}

    def saturate(pair: Pair) -> None:
        rng = random.Random(3)
        for task in range(200):
            pair.submit(task, rng.choice([20, 20, 20, 400]), rng.randint(1, 60), 0)
        pair.drain()

    saturate(Pair(llm, None))
    with pytest.raises(AssertionError, match=r"native .*, reference"):
        saturate(Pair(llm, None, reference_llm=off))
