"""The closed loop: never more requests than users, and each user's story independent of the system's speed."""

from __future__ import annotations

import heapq
from collections import defaultdict
from typing import Any

import pytest

from sage_bench.loads import ClosedLoop, ConstantThink, ExponentialThink, Fixed, Gamma, Lognormal, RequestClass, Uniform
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.load import Arrival
from sage_core.rng import Streams
from sage_core.slo import Slo, SloTable
from sage_core.units import SECOND


def classes() -> dict[str, RequestClass]:
    return {
        "chat": RequestClass(
            "chat",
            None,
            {"a": 0.5, "b": 0.5},
            input_tokens=Lognormal(500, 1.0),
            output_tokens=Lognormal(100, 1.0),
            output_tokens_max=512,
        ),
        "embedding": RequestClass("embedding", 0.3, input_tokens=Uniform(1, 20)),
    }


def load(users: int = 5, *, seed: int = 1, **changes: Any) -> ClosedLoop:
    given: dict[str, Any] = {"think": ExponentialThink(0.5), "requests": 400, **changes}
    return ClosedLoop(users, classes(), streams=Streams(seed), slo=SloTable({"chat": Slo(e2e_s=2.0)}), **given)


def run(load: ClosedLoop, service_ns: dict[int, int] | int) -> tuple[list[Arrival], int]:
    """Serve every request in ``service_ns`` (of its id modulo the table); arrivals in order of issue, most in flight."""
    sent: list[Arrival] = []
    waiting: list[tuple[int, int]] = []  # (instant it ends, request)
    future = [(arrival.at, arrival.request.request, arrival) for arrival in load.arrivals()]
    heapq.heapify(future)
    in_flight = most = 0
    while future or waiting:
        if future and (not waiting or future[0][0] <= waiting[0][0]):
            at, request, arrival = heapq.heappop(future)
            sent.append(arrival)
            in_flight += 1
            most = max(most, in_flight)
            took = service_ns if isinstance(service_ns, int) else service_ns[request % len(service_ns)]
            heapq.heappush(waiting, (at + took, request))
        else:
            now, request = heapq.heappop(waiting)
            in_flight -= 1
            following = load.ended(now, request)
            if following is not None:
                assert following.at >= now
                heapq.heappush(future, (following.at, following.request.request, following))
    return sent, most


def test_never_more_in_flight_than_users() -> None:
    for users in (1, 5, 50):
        sent, most = run(load(users), SECOND)
        assert most <= users
        assert len(sent) == 400
        assert sorted(a.request.request for a in sent) == list(range(400))
    assert run(load(5, think=ConstantThink(0.0)), SECOND)[1] == 5


def test_a_user_tells_the_same_story_to_a_fast_and_a_slow_system() -> None:
    def stories(service: dict[int, int] | int) -> dict[int, list[tuple[object, ...]]]:
        tried = load(4, requests=None, requests_per_user=40)
        told: dict[int, list[tuple[object, ...]]] = defaultdict(list)
        of: dict[int, int] = {}
        original = tried.ended

        def ended(now: int, request: int) -> Arrival | None:
            user = of[request]
            following = original(now, request)
            if following is not None:
                of[following.request.request] = user
                told[user].append(fact(following, following.at - now))
            return following

        def fact(arrival: Arrival, think: int) -> tuple[object, ...]:
            request = arrival.request
            return request.kind, request.tenant, request.input_tokens, arrival.output_tokens, think

        of.update({user: user for user in range(4)})
        tried.ended = ended  # type: ignore[method-assign]
        assert len(run(tried, service)[0]) == 160
        return told

    slow, uneven = stories(SECOND), stories({0: SECOND, 1: 1000, 2: SECOND // 7})
    assert slow == uneven
    assert all(len(story) == 39 for story in slow.values())
    assert slow[0] != slow[1]


def test_starting_again_starts_the_same_run() -> None:
    once = load()
    assert run(once, SECOND) == run(once, SECOND) == run(load(), SECOND)
    assert run(load(seed=2), SECOND) != run(load(), SECOND)


def test_mix_and_think_time() -> None:
    sent, _ = run(load(1, requests=4000, think=ExponentialThink(2.0)), 1000)
    assert sum(a.request.kind == 2 for a in sent) / 4000 == pytest.approx(0.3, abs=0.03)
    assert sent[-1].at / 4000 / SECOND == pytest.approx(2.0, rel=0.05)


def test_ramp_and_duration() -> None:
    first = [a.at for a in load(4, ramp_s=2.0).arrivals()]
    assert first == [0, SECOND // 2, SECOND, 3 * SECOND // 2]
    sent, _ = run(load(3, requests=None, duration_s=20.0, think=ConstantThink(0.5)), SECOND // 2)
    assert max(a.at for a in sent) == 19 * SECOND
    assert len(sent) == 60


def test_in_flight_counts_waiting_users() -> None:
    tried = load(3)
    arrivals = tried.arrivals()
    assert tried.in_flight == 0
    first = next(arrivals)
    assert tried.in_flight == 1
    tried.ended(first.at, first.request.request)
    assert tried.in_flight == 1  # the same user thinks, and the next request is already fixed


def test_an_answer_nobody_waits_for_is_a_defect_of_the_driver() -> None:
    tried = load()
    list(tried.arrivals())
    tried.ended(5, 0)
    with pytest.raises(IllegalEvent, match="request 0 ended at 6 ns"):
        tried.ended(6, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"requests": None}, r"load\.requests, load\.duration_s"),
        ({"requests": None, "duration_s": 5.0, "think": ConstantThink(0.0)}, "would ask forever"),
        ({"requests_per_user": 0}, r"load\.requests_per_user"),
        ({"ramp_s": -1.0}, r"load\.ramp_s"),
    ],
)
def test_bad_arguments_name_the_key(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(**changes)


def test_a_closed_loop_has_no_arrival_process() -> None:
    of = {"e": RequestClass("embedding", 1.0, input_tokens=Fixed(3), arrivals=Gamma(2.0))}
    with pytest.raises(ConfigError, match=r"load\.classes\.e\.arrivals"):
        ClosedLoop(1, of, requests=1, streams=Streams(1), slo=SloTable())
    with pytest.raises(ConfigError, match=r"load\.users"):
        ClosedLoop(0, classes(), requests=1, streams=Streams(1), slo=SloTable())
