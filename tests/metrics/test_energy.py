"""Energy, cost, idle time: against sums made by hand, and never 0 for what is not known."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.config import checked, composed
from sage_bench.metrics.devices import PARTS, node_series
from sage_bench.metrics.energy import energy
from sage_bench.metrics.measure import measure
from sage_bench.metrics.queueing import busy_ns, gaps_ns
from sage_bench.metrics.summary import summarise
from sage_bench.report import write
from sage_bench.results.devices import device_facts
from sage_bench.results.manifest import DeviceFact, Manifest, PowerFact, ReplicaFact, UsageFact
from sage_bench.results.reader import load_runs
from sage_core.units import SECOND
from sage_sim.profile import load_profile

WATTS = PowerFact(idle_w=100.0, prefill_w=400.0, decode_w=250.0, measured=True, source="test")


def manifest(folder: Path, queueing: ModuleType, **changes: Any) -> Manifest:
    """That of a small run of two servers, with ``changes``."""
    queueing.run(folder, queueing.Queue(20, 0.02, 60, servers=2))
    return msgspec.structs.replace(load_runs(folder)[0].manifest, **changes)


def device(number: int = 0, **changes: Any) -> DeviceFact:
    facts: dict[str, Any] = {
        "device": number, "node": f"n{number}", "hardware": "gpu", "count": 1, "power": WATTS, "no_power": None, "price_per_h": 1.0,
    }  # fmt: skip
    return DeviceFact(**(facts | changes))


def replica(
    number: int = 0, device: int = 0, joined_s: float = 0, left_s: float | None = None, **usage: float
) -> ReplicaFact:
    """usage: busy_s and prefill_s; without them it is not known."""
    left_ns = None if left_s is None else round(left_s * SECOND)
    fact = None
    if usage:
        prefill_s = usage.get("prefill_s")
        prefill_ns = None if prefill_s is None else round(prefill_s * SECOND)
        fact = UsageFact(round(usage["busy_s"] * SECOND), 1, 0, prefill_ns)
    return ReplicaFact(number, "llm", 0, f"n{device}", device, round(joined_s * SECOND), left_ns, fact)


@pytest.fixture
def base(tmp_path: Path, queueing: ModuleType) -> Manifest:
    return manifest(tmp_path, queueing, duration_ns=100 * SECOND)


def joules(base: Manifest, devices: list[DeviceFact], replicas: list[ReplicaFact]) -> float:
    return energy(msgspec.structs.replace(base, devices=tuple(devices), replicas=tuple(replicas))).joules


def test_an_idle_device_draws_its_idle_power(base: Manifest) -> None:
    assert joules(base, [device()], [replica(busy_s=0, prefill_s=0)]) == pytest.approx(100 * 100)


def test_work_adds_to_it_by_phase(base: Manifest) -> None:
    # 60 s busy, 10 of them prefilling: 100 W * 100 s + 300 W * 10 s + 150 W * 50 s.
    assert joules(base, [device()], [replica(busy_s=60, prefill_s=10)]) == pytest.approx(10_000 + 3_000 + 7_500)


def test_a_device_that_leaves_and_comes_back_is_off_in_between(base: Manifest) -> None:
    lives = [replica(0, left_s=30, busy_s=30, prefill_s=0), replica(1, joined_s=80, busy_s=0, prefill_s=0)]
    assert joules(base, [device()], lives) == pytest.approx(250 * 30 + 100 * 20)


def test_two_engines_on_one_device_share_its_idle_power_and_its_limit(base: Manifest) -> None:
    both = [replica(0, busy_s=40, prefill_s=40), replica(1, busy_s=10, prefill_s=10)]
    assert joules(base, [device()], both) == pytest.approx(10_000 + 300 * 50)
    over = [replica(0, busy_s=90, prefill_s=90), replica(1, busy_s=90, prefill_s=90)]
    assert joules(base, [device()], over) == pytest.approx(400 * 100)


def test_devices_add_up(base: Manifest) -> None:
    one = joules(base, [device(0)], [replica(0, 0, busy_s=10, prefill_s=1)])
    two = joules(base, [device(1)], [replica(1, 1, busy_s=50, prefill_s=5)])
    both = [replica(0, 0, busy_s=10, prefill_s=1), replica(1, 1, busy_s=50, prefill_s=5)]
    assert joules(base, [device(0), device(1)], both) == pytest.approx(one + two)


@given(busy=st.floats(0, 100), share=st.floats(0, 1))
def test_power_stays_between_idle_and_highest(busy: float, share: float) -> None:
    empty = msgspec.convert(_PLAIN, Manifest)
    found = joules(empty, [device()], [replica(busy_s=busy, prefill_s=busy * share)])
    assert 100 * 100 - 1e-6 <= found <= 400 * 100 + 1e-6


_PLAIN: dict[str, Any] = {
    "experiment": "e", "run_id": "r", "source": "simulation", "status": "complete", "policy": {"name": "fifo"}, "seed": 0,
    "load": {}, "config_hash": "", "config": {}, "duration_ns": 100 * SECOND, "digest": "", "steps": 0, "control_s": 0.0,
    "timing": {"started_at": "", "wall_s": 0.0, "cpu_s": 0.0},
    "hardware": {"cpu": "", "cores": 1, "memory_bytes": 1, "gpus": [], "network": ""},
    "software": {
        "os": "", "python": "", "sage": "", "native_build": "", "cuda": "", "packages": {}, "packages_sha256": "",
        "git_commit": "", "git_dirty": None,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "replicas", "why"),
    [
        ([], [replica(busy_s=1, prefill_s=1)], "does not say what the devices are"),
        ([device(power=None, no_power="nobody measured it")], [replica(busy_s=1, prefill_s=1)], "nobody measured it"),
        ([device()], [replica()], "did not record what its engines did"),
        ([device()], [replica(busy_s=1)], "does not tell prefill from decode"),
        (
            [device(0), device(1, power=None, no_power="no")],
            [replica(busy_s=1, prefill_s=1), replica(1, 1)],
            "node n1: no",
        ),
    ],
)
def test_what_is_not_known_is_not_a_number(
    base: Manifest, devices: list[DeviceFact], replicas: list[ReplicaFact], why: str
) -> None:
    found = energy(msgspec.structs.replace(base, devices=tuple(devices), replicas=tuple(replicas)))
    assert math.isnan(found.joules)
    assert len(found.unknown) == 1 and why in found.unknown[0]


def test_energy_and_cost_per_work(tmp_path: Path, queueing: ModuleType) -> None:
    queueing.run(tmp_path, queueing.Queue(20, 0.02, 60, servers=2), warmup_s=0.5, price_per_h=7.2)
    run = load_runs(tmp_path)[0]
    known = tuple(
        msgspec.structs.replace(each, usage=UsageFact(SECOND, 1, 0, SECOND // 2)) for each in run.manifest.replicas
    )
    devices = tuple(device(each.device) for each in known)
    run.manifest = msgspec.structs.replace(run.manifest, replicas=known, devices=devices)
    row = measure(run).iloc[0]
    total = energy(run.manifest).joules
    everyone = run.frame("requests")
    counted = everyone[~everyone["warmup"]]
    assert 0 < len(counted) < len(everyone) == 60
    assert row["power_w"] == pytest.approx(total / (run.manifest.duration_ns / SECOND))
    assert row["energy_j_per_1k"] == pytest.approx(total / 60 * 1e3)
    assert row["energy_j_per_1m_tokens"] == pytest.approx(total / (60 * (512 + 128)) * 1e6)
    assert row["energy_j_per_1m_output_tokens"] == pytest.approx(total / (60 * 128) * 1e6)
    assert row["cost_per_1m_output_tokens"] == pytest.approx(row["cost_per_1k"] / 128 * 1e3)
    assert row["cost_per_1m_tokens"] == pytest.approx(row["cost_per_1k"] / (512 + 128) * 1e3)


def test_unknown_energy_and_cost_are_empty_and_a_note_says_why(tmp_path: Path, queueing: ModuleType) -> None:
    queueing.run(tmp_path / "run", queueing.Queue(20, 0.02, 60))
    summary = summarise(load_runs(tmp_path))
    row = summary.rows.iloc[0]
    assert math.isnan(row["energy_j_per_1k"]) and math.isnan(row["cost_per_1m_tokens"])
    assert any(note.startswith("energy is not known: ") for note in summary.notes)
    assert any(note.startswith("cost is not known: ") for note in summary.notes)
    write(summary, tmp_path / "report", figures=False)
    runs = pd.read_csv(tmp_path / "report" / "runs.csv")
    assert runs["power_w"].isna().all()


def test_the_facts_are_those_of_the_profiles_devices() -> None:
    config, _ = checked(composed(["cluster=large_model"]))
    names = {e.profile for g in config.cluster.devices for e in (g.llm, g.embed) if e is not None}
    facts = device_facts(config, {name: load_profile(name) for name in names})
    assert [(each.device, each.node, each.hardware, each.count) for each in facts] == [
        (0, "h100", "h100_sxm", 4),
        (1, "h100", "h100_sxm", 4),
        (2, "l4", "l4", 1),
    ]
    first, last = facts[0].power, facts[2].power
    assert first is not None and last is not None
    assert 4 * 700 >= first.prefill_w > first.decode_w > first.idle_w > 0
    assert first.idle_w > last.idle_w
    assert facts[0].price_per_h == 27.52
    assert not first.measured and "A100" in first.source


# --- idle time --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(-5, 60), st.integers(0, 20)), max_size=12), st.integers(0, 50), st.integers(0, 50)
)
def test_gaps_are_what_no_task_covers(tasks: list[tuple[int, int]], a: int, b: int) -> None:
    start, end = min(a, b), max(a, b)
    began = np.array([at for at, _ in tasks], np.int64)
    ended = began + np.array([span for _, span in tasks], np.int64)
    covered = [any(x <= at < y for x, y in zip(began, ended, strict=True)) for at in range(start, end)]
    found = gaps_ns(began, ended, start, end).tolist()
    runs, length = [], 0
    for busy in [*covered, True]:
        if busy and length:
            runs.append(length)
        length = 0 if busy else length + 1
    assert found == runs
    assert busy_ns(began, ended, start, end) == sum(covered)


def test_idle_time_and_spread_of_a_run(tmp_path: Path, queueing: ModuleType) -> None:
    queueing.run(tmp_path, queueing.Queue(30, 0.02, 400, servers=2))
    run = load_runs(tmp_path)[0]
    row = measure(run).iloc[0]
    requests = run.frame("requests")
    start, end = requests["scheduled_ns"].min(), requests["scheduled_ns"].max()
    devices = {each.device for each in run.manifest.replicas}
    assert len(devices) == 2
    # Each device has one replica here, so idle time and utilisation are two sides of the same tasks.
    assert row["idle_ns"] == pytest.approx((1 - row["utilisation"]) * 2 * (end - start))
    assert row["idle_ns"] / row["idle_gaps"] <= row["idle_gap_ns_max"] <= row["idle_ns"]
    series = node_series(run, int(start), int(end))
    assert len(series) == PARTS * series["node"].nunique()
    assert series["utilisation"].between(0, 1).all()
    assert series["utilisation"].mean() == pytest.approx(row["utilisation"], abs=1e-6)
    by_node = series.groupby("node")["utilisation"].mean()
    if len(by_node) > 1:
        assert row["utilisation_sd"] == pytest.approx(by_node.std(ddof=0), abs=1e-6)
