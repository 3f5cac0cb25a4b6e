"""The native engine jumps, the reference walks; both must say the same things at the same nanoseconds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_core import _native
from sage_core.units import NEVER
from sage_sim import engine_reference
from sage_sim.engine import LlmReplica
from sage_sim.engine_reference import FAILED, FINISHED, FIRST_TOKEN
from sage_sim.iteration import IterationTime, Numbers

Op = tuple[Any, ...]

COUNTERS = (
    "running",
    "waiting",
    "kv_blocks_free",
    "iterations",
    "preemptions",
    "prefix_queries",
    "prefix_hits",
    "seen",
    "busy_ns",
    "prefill_busy_ns",
    "itl_count",
    "itl_sum_ns",
    "embed_running",
    "embed_waiting",
    "embed_batches",
    "embed_tokens",
    "embed_padded_tokens",
    "embed_seen",
    "embed_busy_ns",
)

LLAMA_8B_A100: Numbers = IterationTime(
    token_knots=(1, 17, 64, 200, 1_000),
    token_ps=(11_600_000_003, 12_100_000_007, 12_000_000_001, 17_500_000_001, 61_000_000_123),
    head_knots=(1, 4, 128),
    head_ps=(500_000_001, 520_000_003, 900_000_001),
    attention_seqs=(1, 3, 64),
    attention_context=(16, 100, 400, 4_000),
    decode_ps=tuple(82_001 * n * c + 90_000_001 for n in (1, 3, 64) for c in (30, 100, 400, 3_900)),
    mixed_ps=tuple(131_003 * n * c + 10_000_001 for n in (1, 3, 64) for c in (30, 100, 400, 3_900)),
    mixed_token=50_001,
    prefill_knots=(16, 100, 1_000),
    prefill_ps=(200_000_001, 230_000_001, 900_000_007),
    prefill_pair=3_101,
    prefill_context=900_001,
    overhead=200_000_001,
).numbers()


_LAW = set(IterationTime().numbers())

VLLM: Numbers = {
    name: value
    for name, value in LlmReplica(0, "llm", IterationTime(), 1, 1, 1, 1).numbers().items()
    if name
    not in {*_LAW, "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_blocks", "ingress_ns", "egress_ns"}
}
"""How a replica is scheduled where nothing is said about it."""


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

    def both(self, name: str, *args: Any) -> Any:
        native, reference = (getattr(engine, name) for engine in (self.native, self.reference))
        if args or callable(native):
            native, reference = native(*args), reference(*args)
        assert native == reference, f"{name}{args} at {self.now}: native {native}, reference {reference}"
        return native

    def submit(
        self,
        task: int,
        tokens: int,
        output_tokens: int | None,
        priority: int,
        contents: Sequence[int] = (),
        prefilled: bool = False,
    ) -> None:
        self.due.add(task)
        if output_tokens is None:
            self.both("submit_embed", self.now, task, tokens)
        else:
            self.both("submit_llm", self.now, task, tokens, output_tokens, priority, contents, prefilled)

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
        self.both("boundary_at")
        self.both("generated", [-1, *range(max(self.due | self.ends.keys(), default=0) + 1)])
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
                for tokens, output_tokens, priority, contents, prefilled in sizes:
                    tasks.append(len(tasks))
                    pair.submit(tasks[-1], tokens, output_tokens, priority, contents, prefilled)
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
    # A law of whole nanoseconds has iterations that end on them, where commands meet boundaries.
    scale = draw(st.sampled_from([1, 1_000]))
    time = st.sampled_from([0, 3, 500, 54_801]).map(lambda ps: ps * scale)
    seqs, context = draw(st.sampled_from([(0, 1), (1, 2, 5)])), draw(st.sampled_from([(0, 1), (2, 9, 10, 30)]))
    decode, mixed = (
        tuple(n * (c * per_token + per_seq) for n in seqs for c in context)
        for per_token, per_seq in draw(st.tuples(st.tuples(time, time), st.tuples(time, time)))
    )
    knees = draw(st.sampled_from([(1,), (0, 1), (3, 7, 20)]))

    def curve(least: int) -> tuple[int, ...]:
        times = [least * scale + draw(time) for _ in knees]
        return (*times[:-1], max(times[-2:]))

    return IterationTime(
        token_knots=knees,
        token_ps=curve(draw(st.sampled_from([1, 11_600_123]))),
        head_knots=knees,
        head_ps=curve(0),
        attention_seqs=seqs,
        attention_context=context,
        decode_ps=decode,
        mixed_ps=mixed,
        mixed_token=draw(time),
        prefill_knots=knees,
        prefill_ps=curve(0),
        prefill_pair=draw(time),
        prefill_context=draw(time),
        overhead=draw(time),
    ).numbers()


_FLAG = st.integers(0, 1)
_SELDOM = st.sampled_from([0, 0, 0, 0, 1])
_DELAY = st.sampled_from([0, 3, 20_000])


@st.composite
def llm_engines(draw: st.DrawFn) -> Numbers:
    max_num_seqs = draw(st.integers(1, 8))
    law = draw(laws())
    drafts = draw(st.sampled_from([0, 0, 0, 0, 1, 3]))
    base = law["token_ps"][0] // 1_000
    cpu = st.sampled_from([0, 0, 1, base, base + base // 8 + 1])
    return law | {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(max_num_seqs, 40)),
        "block_size": draw(st.sampled_from([1, 2, 3, 4, 16])),
        "kv_blocks": draw(st.integers(4, 60)),
        "chunked_prefill": draw(st.sampled_from([1, 1, 1, 0])),
        "priority_queue": draw(_FLAG),
        "prefix_caching": draw(_FLAG),
        "async_scheduling": draw(_FLAG),
        "scheduler_reserve_full_isl": draw(_FLAG),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 1, 5, 12])),
        "max_num_partial_prefills": draw(st.sampled_from([0, 0, 1, 2])),
        "max_model_len": draw(st.sampled_from([0, 0, 0, 50])),
        "watermark_blocks": draw(st.sampled_from([0, 0, 3])),
        "draft_tokens": drafts,
        "draft_yield_ppm": draw(st.integers(1_000_000, 1_000_000 * (1 + drafts))),
        "draft_ns": draw(st.integers(0, 3)) if drafts else 0,
        "scheduler_ns": draw(cpu),
        "scheduler_seq_ns": draw(st.sampled_from([0, 0, 1])),
        "api_server_ns": draw(st.sampled_from([0, 0, 7])),
        "api_server_token_ns": draw(st.sampled_from([0, 0, 1])),
        "ingress_ns": draw(_DELAY),
        "egress_ns": draw(_DELAY),
        "detokenizer_token_ns": draw(st.sampled_from([0, 0, 2, 900])),
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
def llm_tasks(draw: st.DrawFn) -> tuple[int, int, int, list[int], bool]:
    tokens = draw(st.integers(1, 60))
    output_tokens = draw(st.integers(1, 40) | st.integers(1, 200))
    # One of three texts, as far as it is shared: equal contents mean equal prefixes.
    text, blocks = draw(st.integers(0, 2)), draw(st.sampled_from([0, 0, 1, 3, 8, 60]))
    return tokens, output_tokens, draw(st.integers(0, 2)), [text * 100 + n for n in range(blocks)], draw(_SELDOM) == 1


@st.composite
def scripts(draw: st.DrawFn) -> tuple[Numbers | None, Numbers | None, list[Op]]:
    llm = draw(st.none() | llm_engines())
    embed = draw(embed_engines() if llm is None else st.none() | embed_engines())
    span = st.integers(0, draw(st.sampled_from([10, 2_000, 30_000, 2_000_000])))
    kinds: list[st.SearchStrategy[tuple[Any, ...]]] = []
    if llm is not None:
        kinds.append(llm_tasks())
    if embed is not None:
        kinds.append(st.tuples(st.integers(1, 30), st.none(), st.just(0), st.just([]), st.just(False)))
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


def crowd(rng: random.Random) -> tuple[Numbers, Numbers | None, list[Op]]:
    """A script with more work than blocks: what Hypothesis seldom draws, preemptions of all kinds, is the rule here."""
    block_size = rng.choice([1, 2, 3, 4])
    longest = rng.choice([20, 60])
    drafts = rng.choice([0, 0, 0, 2])
    per_context = rng.choice([0, 1])
    law = IterationTime(
        token_knots=(0, 1),
        token_ps=(base := rng.choice([1_000, 1_003]), base + rng.choice([0, 7])),
        attention_seqs=(0, 1),
        attention_context=(0, 1),
        decode_ps=(0, 0, 0, per_context),
        mixed_ps=(0, 0, 0, per_context),
        prefill_ps=(1_000,),
    ).numbers()
    max_num_seqs = rng.randint(2, 8)
    llm = law | {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": rng.randint(max_num_seqs, 30),
        "block_size": block_size,
        "kv_blocks": (longest + drafts) // block_size + rng.randint(1, 12),
        "chunked_prefill": 1,
        "priority_queue": rng.randint(0, 1),
        "prefix_caching": rng.randint(0, 1),
        "async_scheduling": rng.randint(0, 1),
        "scheduler_reserve_full_isl": rng.randint(0, 1),
        "long_prefill_token_threshold": rng.choice([0, 0, 3, 7]),
        "max_num_partial_prefills": rng.choice([0, 0, 1]),
        "max_model_len": 0,
        "watermark_blocks": rng.choice([0, 0, 2]),
        "draft_tokens": drafts,
        "draft_yield_ppm": rng.randint(1_000_000, 1_000_000 * (1 + drafts)),
        "draft_ns": 0,
        "scheduler_ns": rng.choice([0, 1]),
        "scheduler_seq_ns": 0,
        "api_server_ns": 0,
        "api_server_token_ns": 0,
        "ingress_ns": 0,
        "egress_ns": rng.choice([0, 3]),
        "detokenizer_token_ns": rng.choice([0, 1]),
    }
    embed = None
    if rng.random() < 0.2:
        embed = law | {"max_batch_tasks": 2, "max_batch_tokens": 9, "padding": 1, "ingress_ns": 0, "egress_ns": 1}

    def task() -> tuple[Any, ...]:
        if embed is not None and rng.random() < 0.2:
            return rng.randint(1, 9), None, 0, [], False
        tokens = rng.randint(1, longest - 1)
        output_tokens = rng.randint(1, longest - tokens + 1)
        text, blocks = rng.randint(0, 1), rng.choice([0, 0, 2, tokens // block_size, 60])
        contents = [text * 100 + n for n in range(blocks)]
        return tokens, output_tokens, rng.randint(0, 2), contents, rng.random() < 0.1

    ops: list[Op] = []
    for _ in range(rng.randint(5, 40)):
        span = rng.randint(0, 30)
        ops.append(
            rng.choice(
                [
                    ("submit", span, [task() for _ in range(rng.randint(1, 4))]),
                    ("submit", span, [task()]),
                    ("pass", span),
                    ("wake",),
                    ("cancel", span, rng.randint(0, 200)),
                    ("counters",),
                ]
            )
        )
    return llm, embed, ops


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**32))
def test_native_says_what_the_reference_says_where_blocks_are_short(seed: int) -> None:
    llm, embed, ops = crowd(random.Random(seed))
    play(Pair(llm, embed), ops)


def test_the_crowds_do_what_they_are_for() -> None:
    """Of 100 of them, how many preempt, hit the prefix cache, and do either with asynchronous scheduling."""
    preempted = hit = preempted_ahead = hit_ahead = 0
    for seed in range(100):
        llm, embed, ops = crowd(random.Random(seed))
        pair = Pair(llm, embed)
        play(pair, ops)
        preempts, hits = pair.native.preemptions > 0, pair.native.prefix_hits > 0
        preempted, hit = preempted + preempts, hit + hits
        if llm["async_scheduling"]:
            preempted_ahead, hit_ahead = preempted_ahead + preempts, hit_ahead + hits
    assert min(preempted, hit, preempted_ahead, hit_ahead) >= 10


# --- fixed scripts ---------------------------------------------------------------------------------------------------


def llama(**changes: int) -> Numbers:
    engine = {
        "max_num_seqs": 48,
        "max_num_batched_tokens": 1024,
        "block_size": 16,
        "kv_blocks": 4_000,
        "ingress_ns": 2_000_000,
        "egress_ns": 500_000,
    }
    return LLAMA_8B_A100 | VLLM | engine | changes


def poisson(pair: Pair, seed: int, requests: int, per_s: float, *, cancel_every: int = 10**9) -> None:
    """Arrivals at ``per_s``, each met with every event before it told at its own instant."""
    rng = random.Random(seed)
    at = 0
    for task in range(requests):
        at += round(rng.expovariate(per_s) * 1e9)
        while (wakeup := pair.both("wakeup_at")) <= at:
            assert pair.advance(wakeup) > 0
        pair.now = at
        tokens = rng.randint(1, 1_500)
        text = rng.randint(0, 5) * 1_000
        contents = [text + block for block in range(rng.randint(0, tokens // 16))]
        pair.submit(task, tokens, rng.randint(1, 300), rng.randint(0, 1), contents)
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
        ({"chunked_prefill": 0, "kv_blocks": 700, "max_num_batched_tokens": 2_048}, 13),
        ({"kv_blocks": 500, "prefix_caching": 1, "async_scheduling": 1}, 11),
        ({"kv_blocks": 500, "prefix_caching": 1, "long_prefill_token_threshold": 256, "scheduler_ns": 15_000_000}, 11),
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
    """A comparison that could not fail would prove nothing: one number off by one, or a row by a thousandth, is seen."""
    llm = llama(max_num_seqs=8, max_num_batched_tokens=256)
    was = llm[coefficient]
    off = llm | {coefficient: was + 1 if isinstance(was, int) else tuple(value + value // 1_000 + 1 for value in was)}

    def saturate(pair: Pair) -> None:
        rng = random.Random(3)
        for task in range(200):
            pair.submit(task, rng.choice([20, 20, 20, 400]), rng.randint(1, 60), 0)
        pair.drain()

    saturate(Pair(llm, None))
    with pytest.raises(AssertionError, match=r"native .*, reference"):
        saturate(Pair(llm, None, reference_llm=off))


@pytest.mark.parametrize("setting", sorted(VLLM))
def test_canary_every_setting_is_noticed(setting: str) -> None:
    """The same for the settings: one that is off in one of the two is seen by some crowd."""
    flag = VLLM[setting] == 1 or setting in ("priority_queue", "prefix_caching", "async_scheduling")
    for seed in range(100):
        llm, embed, ops = crowd(random.Random(seed))
        off = llm | {setting: 1 - llm[setting] if flag else llm[setting] + (300_000 if "ppm" in setting else 1)}
        try:
            play(Pair(llm, embed, reference_llm=off), ops)
        except AssertionError:
            return
    pytest.fail(f"nothing depends on {setting}")
