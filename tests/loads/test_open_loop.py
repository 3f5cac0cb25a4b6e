"""The open loop: numbering, mix, coupling between runs, deadlines, limits, memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_bench.loads import (
    Constant,
    Fixed,
    Gamma,
    Lognormal,
    OnOff,
    OpenLoop,
    Poisson,
    RequestClass,
    Sinusoid,
    Uniform,
)
from sage_bench.loads import arrivals as arrivals_module
from sage_bench.loads.mix import Batch, empty_batch, merged
from sage_core.errors import ConfigError
from sage_core.load import Arrival
from sage_core.rng import Streams
from sage_core.slo import Slo, SloTable
from sage_core.units import NEVER, SECOND, RequestKind

SLO = SloTable({"chat": Slo(ttft_s=1.0, tpot_s=0.05), "chat/1": Slo(e2e_s=9.5), "embedding": Slo(e2e_s=0.3)})


def chat(share: float | None = None, **changes: Any) -> RequestClass:
    given: dict[str, Any] = {
        "tenants": {"a": 0.7, "b": None},
        "input_tokens": Lognormal(500, 1.0),
        "output_tokens": Lognormal(150, 0.8),
        "output_tokens_max": 1024,
    }
    return RequestClass("chat", share, **{**given, **changes})


def embedding(share: float | None = 0.3, **changes: Any) -> RequestClass:
    return RequestClass("embedding", share, **{"input_tokens": Uniform(5, 30), **changes})


def load(
    classes: dict[str, RequestClass] | None = None, *, seed: int = 1, rate: float = 10.0, **changes: Any
) -> OpenLoop:
    given: dict[str, Any] = {"requests": 20_000, **changes}
    if "duration_s" in changes and "requests" not in changes:
        given["requests"] = None
    mix = classes or {"chat": chat(), "embedding": embedding()}
    return OpenLoop(rate, mix, streams=Streams(seed), slo=SLO, **given)


def test_ids_are_dense_and_instants_in_order() -> None:
    arrivals = list(load().arrivals())
    assert [arrival.request.request for arrival in arrivals] == list(range(20_000))
    assert all(a.at <= b.at for a, b in pairwise(arrivals))
    assert all(arrival.request.scheduled_at == arrival.at for arrival in arrivals)
    assert all(type(value) is int for value in (arrivals[5].at, arrivals[5].output_tokens, arrivals[5].request.due_at))


def test_kinds_map_to_pipelines_and_tenants() -> None:
    seen = Counter((a.request.kind, a.request.pipeline, a.request.tenant) for a in load().arrivals())
    assert sorted(seen) == [
        (RequestKind.LLM_CHAT, "chat", "a"),
        (RequestKind.LLM_CHAT, "chat", "b"),
        (RequestKind.EMBEDDING, "embed", "default"),
    ]
    assert seen[RequestKind.LLM_CHAT, "chat", "a"] / 14_000 == pytest.approx(0.7, abs=0.02)


def test_realised_mix_is_within_one_percent() -> None:
    kinds = Counter(a.request.kind for a in load(requests=50_000).arrivals())
    assert kinds[RequestKind.EMBEDDING] / 50_000 == pytest.approx(0.3, abs=0.01)


def test_deadlines_are_those_of_the_table() -> None:
    classes = {
        "now": chat(0.4),
        "later": chat(0.3, priority=1),
        "embedding": embedding(None),
        "free": chat(0.1, priority=2),
    }
    for arrival in islice(load(classes).arrivals(), 2000):
        request = arrival.request
        slo = SLO.of(request.kind, request.priority)
        assert request.ttft_due_at == slo.ttft_due_at(arrival.at)
        assert request.due_at == slo.due_at(arrival.at, request.output_tokens_max)
    without = OpenLoop(1.0, {"chat": chat()}, requests=5, streams=Streams(1), slo=SloTable())
    assert all(a.request.due_at == a.request.ttft_due_at == NEVER for a in without.arrivals())


def test_the_cap_tells_nothing_about_the_length() -> None:
    of_chat = [a for a in load().arrivals() if a.request.kind == RequestKind.LLM_CHAT]
    assert {a.request.output_tokens_max for a in of_chat} == {1024}
    assert max(a.output_tokens for a in of_chat) == 1024  # the cap cuts, as an engine would
    assert min(a.output_tokens for a in of_chat) >= 1
    assert {(a.output_tokens, a.request.output_tokens_max) for a in load().arrivals() if a.request.kind == 2} == {
        (0, 0)
    }


def test_same_seed_same_load_other_seed_another() -> None:
    one, again, other = (list(load(seed=seed, requests=500).arrivals()) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    twice = load(requests=500)
    assert list(twice.arrivals()) == list(twice.arrivals())


def content(arrivals: Iterator[Arrival], kind: RequestKind) -> list[tuple[object, ...]]:
    of_kind = [a for a in arrivals if a.request.kind == kind]
    return [(a.request.tenant, a.request.input_tokens, a.output_tokens, a.request.prefix) for a in of_kind]


def test_a_further_class_moves_nobody_else() -> None:
    before = load({"chat": chat(0.7), "embedding": embedding(0.3)})
    after = load({"chat": chat(0.6), "embedding": embedding(0.3), "more": chat(0.1, tenants="more", priority=1)})
    n = 5000
    assert [a.at for a in before.arrivals()] == [a.at for a in after.arrivals()]
    assert content(before.arrivals(), RequestKind.EMBEDDING)[:n] == content(after.arrivals(), RequestKind.EMBEDDING)[:n]
    chats = [row for row in content(after.arrivals(), RequestKind.LLM_CHAT) if row[0] != "more"]
    assert content(before.arrivals(), RequestKind.LLM_CHAT)[:n] == chats[:n]


def test_a_class_with_a_process_of_its_own_leaves_the_others() -> None:
    plain = load({"chat": chat(None), "embedding": embedding(0.3)})
    flooded = load(
        {"chat": chat(None), "embedding": embedding(0.3), "flood": embedding(0.2, tenants="f", arrivals=OnOff(1, 9))}
    )
    assert (
        content(plain.arrivals(), RequestKind.LLM_CHAT)[:3000]
        == content(flooded.arrivals(), RequestKind.LLM_CHAT)[:3000]
    )
    shares = Counter(a.request.tenant for a in flooded.arrivals())
    assert shares["f"] / 20_000 == pytest.approx(0.2, abs=0.01)


def test_another_arrival_process_moves_no_content() -> None:
    poisson, bursty = (load(arrivals=process, requests=3000) for process in (Poisson(), Gamma(4.0)))
    for kind in (RequestKind.LLM_CHAT, RequestKind.EMBEDDING):
        assert content(poisson.arrivals(), kind) == content(bursty.arrivals(), kind)
    assert [a.at for a in poisson.arrivals()] != [a.at for a in bursty.arrivals()]


def test_another_rate_moves_no_content() -> None:
    slow, fast = list(load(rate=2.0, requests=3000).arrivals()), list(load(rate=8.0, requests=3000).arrivals())
    assert [a.request.input_tokens for a in slow] == [a.request.input_tokens for a in fast]
    assert max(abs(a.at - 4 * b.at) for a, b in zip(slow, fast, strict=True)) <= 4


def test_chunk_size_decides_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    large = list(load(requests=5000).arrivals())
    monkeypatch.setattr(arrivals_module, "CHUNK", 100)
    small = list(load(requests=5000).arrivals())
    assert [a.request.input_tokens for a in large] == [a.request.input_tokens for a in small]
    assert [a.output_tokens for a in large] == [a.output_tokens for a in small]
    assert max(abs(a.at - b.at) for a, b in zip(large, small, strict=True)) <= 1


def test_antiphase_mix_changes_over_time_and_keeps_its_means() -> None:
    classes = {
        "chat": chat(0.7, arrivals=Sinusoid(100.0, 0.8, phase=0.0)),
        "embedding": embedding(0.3, arrivals=Sinusoid(100.0, 0.8, phase=0.5)),
    }
    arrivals = list(load(classes, rate=100.0, duration_s=500.0).arrivals())
    assert len(arrivals) / 500.0 == pytest.approx(100.0, rel=0.02)
    halves = [[a for a in arrivals if (a.at // (50 * SECOND)) % 2 == half] for half in (0, 1)]
    share = [sum(a.request.kind == RequestKind.EMBEDDING for a in half) / len(half) for half in halves]
    assert share[0] < 0.15
    assert share[1] > 0.5
    assert sum(a.request.kind == RequestKind.EMBEDDING for a in arrivals) / len(arrivals) == pytest.approx(
        0.3, abs=0.01
    )


def test_limits() -> None:
    assert len(list(load(requests=1).arrivals())) == 1
    constant = load(arrivals=Constant(), duration_s=2.0)
    assert [a.at for a in constant.arrivals()] == [k * SECOND // 10 for k in range(20)]  # the end is not included
    assert len(list(load(arrivals=Constant(), duration_s=2.0, requests=7).arrivals())) == 7
    assert len(list(load(arrivals=Constant(), duration_s=0.7, requests=20).arrivals())) == 7


def test_nobody_waits_for_an_answer() -> None:
    assert load().ended(10, 0) is None


def test_prefixes_are_shared_within_a_class_only() -> None:
    classes = {"one": chat(0.5, prefixes=3), "two": chat(None, prefixes=2, tenants="t"), "none": embedding(0.1)}
    seen: dict[str, Counter[int]] = {}
    for arrival in load(classes).arrivals():
        name = "none" if arrival.request.kind == 2 else "two" if arrival.request.tenant == "t" else "one"
        seen.setdefault(name, Counter())[arrival.request.prefix] += 1
    assert sorted(seen["one"]) == [1, 2, 3]
    assert sorted(seen["two"]) == [4, 5]
    assert sorted(seen["none"]) == [0]
    assert seen["one"][1] / seen["one"].total() == pytest.approx(1 / (1 + 1 / 2 + 1 / 3), abs=0.02)


def test_a_long_load_is_not_held() -> None:
    long = load(requests=300_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in long.arrivals()) == 300_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16e6  # 300,000 arrivals held would be a hundred megabytes


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: load(rate=0.0), r"load\.rate: expected a number above 0"),
        (lambda: load(requests=None), r"load\.requests, load\.duration_s"),
        (lambda: load(requests=0), r"load\.requests"),
        (lambda: load(duration_s=-1.0), r"load\.duration_s"),
        (lambda: load({"chat": chat(0.5), "embedding": embedding(0.4)}), "shares must sum to 1, they sum to 0.9"),
        (lambda: load({"chat": chat(), "embedding": embedding(None)}), "only one share may be null"),
        (lambda: load({"chat": chat(-0.1)}), "share"),
        (lambda: load({"chat": RequestClass("chat")}), r"load\.classes\.chat\.input_tokens"),
        (lambda: load({"chat": RequestClass("chat", input_tokens=Fixed(1))}), "output_tokens_max"),
        (lambda: RequestClass("chats"), "kind"),
        (lambda: RequestClass("embedding", output_tokens=Fixed(1)), "generates nothing"),
        (lambda: chat(tenants={"a": 0.5}), "shares must sum to 1"),
        (lambda: chat(tenants={}), "at least one"),
        (lambda: chat(priority=-1), "priority"),
        (lambda: chat(output_tokens_max=0), "output_tokens_max"),
    ],
)
def test_bad_arguments_name_the_key(make: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()  # type: ignore[operator]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), max_size=4), min_size=1, max_size=4))
def test_merging_loses_nothing_and_keeps_order(flows: list[list[list[int]]]) -> None:
    def flow(c: int, chunks: list[list[int]]) -> Iterator[Batch]:
        ordered = sorted(at for chunk in chunks for at in chunk)
        for chunk in chunks:
            at = np.array([ordered.pop(0) for _ in chunk], np.int64)
            yield empty_batch(at, np.full(len(at), c, np.int64))

    rows = [
        row
        for batch in merged([flow(c, chunks) for c, chunks in enumerate(flows)])
        for row in zip(batch.at, batch.cls, strict=True)
    ]
    assert [at for at, _ in rows] == sorted(at for chunks in flows for chunk in chunks for at in chunk)
    for c, chunks in enumerate(flows):
        assert [at for at, cls in rows if cls == c] == sorted(at for chunk in chunks for at in chunk)
