"""The way between plane and replicas: delays within their bounds, first in first out, and drawn from a named stream."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sage_core.rng import Streams
from sage_core.units import SECOND
from sage_sim.network import NetworkConfig, Way

seconds = st.floats(0.0, 2.0)
gaps = st.lists(st.integers(0, SECOND), min_size=1, max_size=60)


def arrivals(config: NetworkConfig, sent: list[int], seed: int = 1, name: str = "way") -> list[int]:
    way = Way(config, Streams(seed).stream(name))
    return [way.arrives_at(now) for now in sent]


def instants(between: list[int]) -> list[int]:
    return [sum(between[: n + 1]) for n in range(len(between))]


@given(delay=seconds, gaps=gaps)
def test_without_jitter_every_message_takes_the_delay(delay: float, gaps: list[int]) -> None:
    sent = instants(gaps)
    assert arrivals(NetworkConfig(delay), sent) == [now + round(delay * SECOND) for now in sent]


@given(delay=seconds, jitter=seconds, gaps=gaps)
def test_messages_keep_their_order_and_none_is_faster_than_the_delay(
    delay: float, jitter: float, gaps: list[int]
) -> None:
    sent = instants(gaps)
    arrived = arrivals(NetworkConfig(delay, jitter), sent)
    assert arrived == sorted(arrived)
    least, most = round(delay * SECOND), round(delay * SECOND) + round(jitter * SECOND)
    assert all(least <= at - now <= most for now, at in zip(sent, arrived, strict=True))


def test_jitter_is_uniform_where_messages_do_not_wait_for_each_other() -> None:
    sent = [n * SECOND for n in range(10_000)]
    arrived = arrivals(NetworkConfig(0.001, 0.010), sent)
    extra_ms = [(at - now) / 1e6 - 1.0 for now, at in zip(sent, arrived, strict=True)]
    assert abs(sum(extra_ms) / len(extra_ms) - 5.0) < 0.12  # 4 standard errors of a uniform 0..10
    assert min(extra_ms) < 0.02
    assert max(extra_ms) > 9.98


def test_each_way_has_its_own_numbers() -> None:
    sent = [n * SECOND for n in range(50)]
    config = NetworkConfig(0.0, 0.01)
    assert arrivals(config, sent) == arrivals(config, sent)
    assert arrivals(config, sent, name="other") != arrivals(config, sent)
    assert arrivals(config, sent, seed=2) != arrivals(config, sent)
