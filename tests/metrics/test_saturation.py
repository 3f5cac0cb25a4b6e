"""The saturation rule finds the capacity of queues whose capacity is known."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sage_bench.metrics.saturation import Flow, flow, saturation
from sage_bench.results.reader import load_runs
from sage_core.errors import DataError


@pytest.mark.parametrize(("servers", "queue_max"), [(1, None), (4, None), (1, 60)])
def test_capacity_of_a_poisson_queue_is_bracketed(
    tmp_path: Path, queueing: ModuleType, servers: int, queue_max: int | None
) -> None:
    capacity = 100.0
    flows = {}
    for rate in (50.0, 80.0, 95.0, 110.0, 130.0):
        for seed in (1, 2):
            folder = tmp_path / f"{rate}-{seed}"
            queueing.run(folder, queueing.Queue(rate, servers / capacity, 8000, seed, servers, queue_max=queue_max))
            flows.setdefault(rate, []).append(flow(load_runs(folder)[0]))
    point = saturation(flows)
    assert point.rate_rps <= capacity < point.next_rps
    assert (point.rate_rps, point.next_rps) == (95.0, 110.0)
    assert point.throughput_rps == pytest.approx(capacity, rel=0.03)
    over = flows[130.0][0]
    assert over.balance == pytest.approx(capacity / 130, rel=0.05), "beyond saturation: capacity over offered"


@pytest.mark.parametrize("deterministic", [False, True], ids=["M/M/1", "M/D/1"])
def test_the_queue_below_saturation_is_that_of_theory_and_above_it_grows(
    tmp_path: Path, queueing: ModuleType, deterministic: bool
) -> None:
    """Pollaczek and Khinchine: the mean wait is rho / (mu (1 - rho)), half of that where service takes equally long. The rule
    finds the same capacity in both, since it is the mean service alone that decides it."""
    mu = 100.0

    class Equal(queueing.Queue):  # type: ignore[misc]
        def _requests(self) -> list[Any]:
            return [(arrived, each, round(self.service_s * 1e9)) for arrived, each, _ in super()._requests()]

    kind = Equal if deterministic else queueing.Queue
    flows: dict[float, list[Flow]] = {}
    waits = []
    for rate in (70.0, 92.0, 115.0):
        for seed in (1, 2):
            folder = tmp_path / f"{rate}-{seed}"
            queueing.run(folder, kind(rate, 1 / mu, 6000, seed))
            run = load_runs(folder)[0]
            flows.setdefault(rate, []).append(flow(run))
            if rate == 70.0:
                waits.append(run.frame("requests", ("queue_ns",))["queue_ns"].mean() / 1e9)
    rho = 0.7
    theory = rho / (mu * (1 - rho)) / (2 if deterministic else 1)
    assert sum(waits) / len(waits) == pytest.approx(theory, rel=0.12)
    assert saturation(flows)[:2] == (92.0, 115.0)
    assert flows[115.0][0].balance == pytest.approx(mu / 115, rel=0.04)


def test_long_requests_do_not_look_like_saturation(tmp_path: Path, queueing: ModuleType) -> None:
    """A tenth of the run is spent filling the system; flow balance in its steady part is still one."""
    queueing.run(tmp_path, queueing.Queue(rate=40, service_s=5.0, requests=2000, servers=400))
    assert flow(load_runs(tmp_path)[0]).balance > 0.95


def test_all_and_none_sustained() -> None:
    good, bad = Flow(10, 10, 1.0), Flow(20, 10, 0.5)
    above, below = saturation({10.0: [good]}), saturation({20.0: [bad], 30.0: [bad]})
    assert above.rate_rps == 10.0 and math.isnan(above.next_rps)
    assert math.isnan(below.rate_rps) and below.next_rps == 20.0


def test_the_first_failure_ends_it() -> None:
    """A lucky rate above an unsustained one does not move the point."""
    good, bad = Flow(1, 1, 1.0), Flow(1, 1, 0.9)
    assert saturation({1.0: [good], 2.0: [bad], 3.0: [good]})[:2] == (1.0, 2.0)


def test_a_single_request_has_no_flow(tmp_path: Path, queueing: ModuleType) -> None:
    queueing.run(tmp_path, queueing.Queue(rate=40, service_s=0.1, requests=1))
    with pytest.raises(DataError, match="span no time"):
        flow(load_runs(tmp_path)[0])
