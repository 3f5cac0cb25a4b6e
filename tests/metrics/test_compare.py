"""Which runs are compared with which, and what is said about them."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from sage_bench.metrics.compare import against, against_best, conditions, means, measured, verdicts
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.summary import summarise
from sage_bench.results.reader import load_runs
from sage_core.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, queueing: ModuleType) -> Path:
    """Two rates, two policies, four seeds; priorities differ, so the policies do."""
    path: Path = tmp_path_factory.mktemp("compare")
    classes = (queueing.Class(share=0.5), queueing.Class(priority=1, share=0.5))
    for rate in (40, 48):
        for order in ("priority", "fifo"):
            for seed in (1, 2, 3, 4):
                queueing.run(
                    path / f"{order}-{rate}-{seed}",
                    queueing.Queue(rate, 0.02, 700, seed, order=order, classes=classes),
                    overrides=(f"load.rate={rate}", f"policy={order}", f"seed={seed}"),
                )
    return path


def test_arms_share_everything_but_policy_and_seed(folder: Path) -> None:
    found = conditions(load_runs(folder))
    assert [(c.label, c.rate, c.sweep) for c in found] == [("load.rate=40", 40.0, ""), ("load.rate=48", 48.0, "")]
    for condition in found:
        assert {name: len(runs) for name, runs in condition.arms.items()} == {"fifo": 4, "priority": 4}
        assert next(iter(condition.arms)) == "fifo", "the baseline is first"


def test_the_baseline_can_be_chosen(folder: Path) -> None:
    assert all(next(iter(c.arms)) == "priority" for c in conditions(load_runs(folder), "priority"))
    with pytest.raises(ConfigError, match=r"'sjf'; expected one of fifo, priority"):
        conditions(load_runs(folder), "sjf")


def test_means_are_over_runs(folder: Path) -> None:
    rows = measured(conditions(load_runs(folder)))
    table = means(rows)
    mine = (rows["policy"] == "fifo") & (rows["rate"] == 40.0) & (rows["kind"] == ALL)
    entry = table[
        (table["policy"] == "fifo")
        & (table["rate"] == 40.0)
        & (table["kind"] == ALL)
        & (table["metric"] == "goodput_rps")
    ].iloc[0]
    assert entry["n"] == mine.sum() == 4
    assert entry["mean"] == pytest.approx(rows.loc[mine, "goodput_rps"].mean())
    assert entry["low"] < entry["mean"] < entry["high"]


def test_verdicts_pair_by_seed(folder: Path) -> None:
    rows = measured(conditions(load_runs(folder)))
    table = verdicts(rows)
    assert set(table["baseline"]) == {"fifo"} and set(table["policy"]) == {"priority"}
    assert set(table["seeds"]) == {4}
    entry = table[(table["metric"] == "slo_attainment") & (table["rate"] == 48.0)].iloc[0]
    whole = rows[(rows["kind"] == ALL) & (rows["rate"] == 48.0)].pivot(
        index="seed", columns="policy", values="slo_attainment"
    )
    assert entry["difference"] == pytest.approx((whole["priority"] - whole["fifo"]).mean())


def test_a_simulation_repeated_counts_once_and_a_live_run_each_time(tmp_path: Path, queueing: ModuleType) -> None:
    queue = queueing.Queue(rate=20, service_s=0.02, requests=30)
    for name in ("first", "again"):
        queueing.run(tmp_path / "s" / name, queue)
        queueing.run(tmp_path / "l" / name, queue, source="live")
    simulated = summarise(load_runs(tmp_path / "s"))
    assert len(simulated.rows["run_id"].unique()) == 1
    assert any("1 simulations repeat" in note for note in simulated.notes)
    assert len(summarise(load_runs(tmp_path / "l")).rows["run_id"].unique()) == 2


def test_partial_runs_are_left_out_unless_there_is_nothing_else(tmp_path: Path, queueing: ModuleType) -> None:
    queue = queueing.Queue(rate=20, service_s=0.02, requests=30)
    queueing.run(tmp_path / "cut", queue, status="interrupted")
    assert any("cut: interrupted, partial" in note for note in summarise(load_runs(tmp_path)).notes)
    queueing.run(tmp_path / "whole", queueing.Queue(rate=20, service_s=0.02, requests=30, seed=2))
    summary = summarise(load_runs(tmp_path))
    assert list(summary.rows["run_id"].unique()) == ["whole"]
    assert any("cut: interrupted, left out" in note for note in summary.notes)


def test_a_run_whose_generator_lagged_is_not_compared(tmp_path: Path, queueing: ModuleType) -> None:
    queue = queueing.Queue(rate=20, service_s=0.02, requests=30)
    queueing.run(tmp_path / "late", queue, source="live", invalid=("send lag p99 80.0 ms, above 5.0 ms",))
    alone = summarise(load_runs(tmp_path)).notes
    assert any("late: INVALID (send lag p99 80.0 ms, above 5.0 ms), its latencies are" in note for note in alone)
    queueing.run(tmp_path / "punctual", queueing.Queue(rate=20, service_s=0.02, requests=30, seed=2), source="live")
    summary = summarise(load_runs(tmp_path))
    assert list(summary.rows["run_id"].unique()) == ["punctual"]
    assert any("late: INVALID" in note and "left out" in note for note in summary.notes)


def test_one_seed_is_told_to_be_few(tmp_path: Path, queueing: ModuleType) -> None:
    for order in ("fifo", "priority"):
        queueing.run(tmp_path / order, queueing.Queue(rate=20, service_s=0.02, requests=30, order=order))
    summary = summarise(load_runs(tmp_path))
    assert set(summary.verdicts["verdict"]) == {"too few seeds"}
    assert any("ran with 1 seed;" in note for note in summary.notes)
    assert summary.means["low"].map(math.isnan).all()


def test_policies_of_one_name_and_different_parameters_are_different_arms(tmp_path: Path, queueing: ModuleType) -> None:
    queue = queueing.Queue(rate=20, service_s=0.02, requests=30)
    queueing.run(tmp_path / "a", queue, policy="hybrid")
    queueing.run(tmp_path / "b", queue, policy="hybrid", parameters={"laxity": False})
    queueing.run(
        tmp_path / "c", queue, policy="hybrid", parameters={"classes": False}, overrides=("policy.classes=false",)
    )
    (condition,) = conditions(load_runs(tmp_path))
    first, second, third = sorted(condition.arms, key=len)
    assert first.startswith("hybrid #") and second.startswith("hybrid #") and first != second
    assert third == "hybrid[classes=false]"


def test_conditions_that_overrides_do_not_tell_apart_get_a_digest(tmp_path: Path, queueing: ModuleType) -> None:
    queue = queueing.Queue(rate=20, service_s=0.02, requests=30)
    for warmup in (0.1, 0.2):
        queueing.run(tmp_path / str(warmup), queue, config={"warmup_s": warmup})
    labels = [condition.label for condition in conditions(load_runs(tmp_path))]
    assert len(set(labels)) == 2 and all(label.startswith("#") for label in labels)


def test_verdicts_say_how_large_an_effect_is(folder: Path) -> None:
    table = verdicts(measured(conditions(load_runs(folder))))
    told = table[table["difference"] != 0]
    assert len(told) and (told["effect"] * told["difference"] > 0).all()


ARM = {"differs_in": ["cluster", "load.rate"]}


def arm(name: str, size: int, **more: object) -> dict[str, object]:
    """The configuration of a run that is that arm of an experiment whose arms differ in their cluster."""
    return {"arm": {"name": name, **ARM}, "cluster": {"size": size}, **more}


def test_arms_have_names_and_may_differ_in_what_is_said(tmp_path: Path, queueing: ModuleType) -> None:
    queue = queueing.Queue(rate=20, service_s=0.02, requests=30)
    for name, size in (("one", 1), ("two", 2)):
        queueing.run(
            tmp_path / name,
            queue,
            policy="fifo",
            config=arm(name, size),
            overrides=(f"arm=x/{name}", f"cluster=size_{size}"),
        )
    (condition,) = conditions(load_runs(tmp_path))
    assert set(condition.arms) == {"one", "two"} and condition.label == ""


def test_two_arms_of_one_policy_are_no_repetition_of_each_other(tmp_path: Path, queueing: ModuleType) -> None:
    """Same policy, same seed, same condition: only the cluster tells them apart."""
    queue = queueing.Queue(rate=20, service_s=0.02, requests=30)
    for name, size in (("one", 1), ("two", 2)):
        queueing.run(tmp_path / name, queue, policy="fifo", config=arm(name, size))
    summary = summarise(load_runs(tmp_path))
    assert len(summary.rows["run_id"].unique()) == 2
    assert not any("simulations repeat" in note for note in summary.notes)


def test_what_is_not_said_makes_another_condition(tmp_path: Path, queueing: ModuleType) -> None:
    """Arms are never compared by accident: slo is not among what they differ in."""
    queue = queueing.Queue(rate=20, service_s=0.02, requests=30)
    queueing.run(tmp_path / "one", queue, config=arm("one", 1, slo="strict"))
    queueing.run(tmp_path / "two", queue, config=arm("two", 2, slo="none"))
    assert [len(condition.arms) for condition in conditions(load_runs(tmp_path))] == [1, 1]
    queueing.run(
        tmp_path / "three", queue, config={**arm("three", 3, slo="none"), "arm": {"name": "three", "differs_in": []}}
    )
    assert [len(condition.arms) for condition in conditions(load_runs(tmp_path))] == [1, 1, 1]


def test_a_key_within_a_group_may_be_what_differs(tmp_path: Path, queueing: ModuleType) -> None:
    """load.rate alone: the rest of the load is still held equal."""
    for name, rate in (("one", 20), ("two", 40)):
        queueing.run(tmp_path / name, queueing.Queue(rate, 0.02, 30), config=arm(name, 1))
    assert [len(condition.arms) for condition in conditions(load_runs(tmp_path))] == [2]
    queue = queueing.Queue(20, 0.02, 30)
    queueing.run(tmp_path / "three", queue, config=arm("three", 1, load={"rate": 20, "duration_s": 9}))
    assert sorted(len(condition.arms) for condition in conditions(load_runs(tmp_path))) == [1, 2]


def table(**arms: list[float]) -> pd.DataFrame:
    return pd.DataFrame(arms, index=range(1, 1 + len(next(iter(arms.values())))))


NOISE = [0.0, 0.01, -0.01, 0.02, -0.02, 0.005]


def cells() -> dict[str, pd.DataFrame]:
    """Three other arms: a is far below ours everywhere, b a little above it in the first cell, c missing from the second."""
    ours = [0.9 + each for each in NOISE]
    a = [each - 0.3 + 0.001 * i for i, each in enumerate(ours)]
    b = [each + 0.02 + 0.001 * i for i, each in enumerate(ours)]
    c = [each + 0.01 * (-1) ** i for i, each in enumerate(ours)]
    return {"one": table(ours=ours, a=a, b=b, c=c), "two": table(ours=ours, a=a)}


def test_against_every_other_arm_in_every_cell() -> None:
    found = against(cells(), "ours")
    assert list(found["verdict"]) == ["better", "worse", "no significant difference", "better"]
    row = found[(found["cell"] == "one") & (found["other"] == "b")].iloc[0]
    assert (
        row["difference"] == pytest.approx(row["ours"] - row["theirs"]) and row["low"] < row["difference"] < row["high"]
    )
    assert row["effect"] < 0 and row["seeds"] == 6


def test_against_the_best_other_of_each_cell() -> None:
    found = against_best(cells(), "ours").set_index("cell")
    assert dict(found["other"]) == {"one": "b", "two": "a"}
    assert dict(found["verdict"]) == {"one": "worse", "two": "better"}
    lower = against_best(cells(), "ours", "lower").set_index("cell")
    assert dict(lower["other"]) == {"one": "a", "two": "a"} and set(lower["verdict"]) == {"worse"}


def test_more_cells_make_each_less_certain() -> None:
    """Holm over all that is asked at once."""
    ours = [0.9 + each for each in NOISE]
    other = [each + shift for each, shift in zip(ours, [0.03, -0.01, 0.02, 0.03, 0.0, 0.02], strict=True)]
    alone = against({"one": table(ours=ours, a=other)}, "ours")
    among = against({str(i): table(ours=ours, a=other) for i in range(20)}, "ours")
    assert alone["p_adjusted"][0] < 0.2 and among["p_adjusted"][0] == min(1.0, 20 * alone["p_adjusted"][0])


def test_an_arm_that_is_not_there_is_held_against_nothing() -> None:
    assert against(cells(), "d").empty and against_best(cells(), "d").empty
    assert list(against_best({"one": table(ours=[1.0, 2.0])}, "ours")["cell"]) == []
