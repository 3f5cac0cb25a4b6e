"""``sage hetero``: the arms see the same requests, crossovers are found where they are, and one command says it all."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sage_bench.cli.hetero import command
from sage_bench.hetero import ARMS, CHAT_RPS, SEEDS, Asked, crossings, hetero, simulated
from sage_bench.hetero import RATES as RATES_BY_DEFAULT
from sage_bench.results.reader import Run, load_runs
from sage_core.errors import ConfigError

RATES = (5.0, 10.0, 20.0, 40.0, 80.0)


def points_of(ratio: dict[str, list[list[float]]]) -> pd.DataFrame:
    """Points whose cost is exp of the given logs, (rates x seeds) of each arm; energy is the same everywhere."""
    rows = [
        {"arm": arm, "rate": RATES[i], "seed": seed, "cost": math.exp(value), "energy": 1.0, "slo_embedding": 1.0}
        for arm, table in ratio.items()
        for i, values in enumerate(table)
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


@given(
    at=st.floats(6.0, 75.0),
    slope=st.floats(0.001, 1.0),
    shifts=st.lists(st.floats(-0.9, 0.9), min_size=2, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_a_crossover_is_found_where_it_is(at: float, slope: float, shifts: list[float]) -> None:
    if any(abs(at - rate) < 1e-3 for rate in RATES) or any(abs(at + s - rate) < 1e-6 for s in shifts for rate in RATES):
        return  # exactly at a rate there is no change of sign to see
    cpu = [[slope * (rate - at - shift) for shift in shifts] for rate in RATES]
    flat = [[0.0 for _ in shifts] for _ in RATES]
    found = crossings(points_of({"gpu": flat, "cpu": cpu}))
    mean = at + float(np.mean(shifts))
    if any(abs(mean - rate) < 1e-6 for rate in RATES):
        return
    assert [(each.expense, each.below, each.above) for each in found] == [("cost", "cpu", "gpu")]
    (each,) = found
    assert each.rate == pytest.approx(mean, abs=1e-6)
    assert each.between[0] < each.rate < each.between[1]
    assert each.seeds == (len(shifts), len(shifts))
    assert each.low is not None
    assert each.high is not None
    middle = math.exp(float(np.mean([math.log(at + shift) for shift in shifts])))
    assert 0 < each.low <= middle + 1e-6
    assert each.high >= middle - 1e-6


def test_of_two_arms_that_cannot_serve_neither_is_a_choice() -> None:
    flat = [[0.0, 0.0] for _ in RATES]
    points = points_of({"gpu": flat, "cpu": [[rate - 30, rate - 31] for rate in RATES]})
    assert len(crossings(points)) == 1
    assert crossings(points.assign(slo_embedding=0.4)) == []


def test_no_crossover_where_the_order_stays() -> None:
    flat = [[0.0, 0.0] for _ in RATES]
    above = [[0.1, 0.2] for _ in RATES]
    assert crossings(points_of({"gpu": flat, "cpu": above})) == []


def test_arms_see_the_same_requests_and_chat_is_the_same_at_every_rate(tmp_path: Path) -> None:
    asked = [("gpu", 10.0), ("cpu", 10.0), ("gpu", 30.0)]
    loads = []
    for arm, rate in asked:
        simulated(Asked(arm, rate, 1, 6.0, str(tmp_path / f"{arm}{rate}"), ("load.duration_s=8", "warmup_s=0")))
        (run,) = list(load_runs(tmp_path / f"{arm}{rate}"))
        frame = run.frame("requests", ("kind", "scheduled_ns", "input_tokens", "output_tokens_max"))
        loads.append(frame.sort_values(["scheduled_ns", "input_tokens"], ignore_index=True))
    pd.testing.assert_frame_equal(loads[0], loads[1])
    chats = [load[load["kind"] == "chat"].reset_index(drop=True) for load in loads]
    assert len(chats[0]) > 20
    assert (chats[0]["input_tokens"] == chats[2]["input_tokens"]).all()
    assert np.abs(chats[0]["scheduled_ns"] - chats[2]["scheduled_ns"]).max() <= 2  # shares are rounded in the last bits


def test_one_command_says_latency_throughput_cost_energy_and_the_crossover(tmp_path: Path) -> None:
    arguments = ["load.duration_s=10", "warmup_s=1", "cooldown_s=1", "--rates", "5,60", "--arms", "gpu,cpu"]
    done = CliRunner().invoke(
        _app(), [*arguments, "--seeds", "2", "--chat", "4", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert done.exit_code == 0
    for heading in ("TTFT p95", "embedding", "served", "USD/1k", "kJ/1k"):
        assert heading in done.output
    facts = json.loads((tmp_path / "hetero" / "hetero.json").read_text())
    (cost,) = [each for each in facts["crossings"] if each["expense"] == "cost"]
    assert (cost["below"], cost["above"]) == ("cpu", "gpu")
    assert 5 < cost["rate"] < 60
    assert cost["between"][1] / cost["between"][0] < 12 ** (1 / 7)  # halved three times, on a log scale
    assert f"below {cost['rate']:.4g} documents/s" in done.output
    means = pd.DataFrame(facts["means"])
    assert means.notna().all(axis=None)
    assert {"hetero.png", "hetero.pdf", "points.csv"} <= {path.name for path in (tmp_path / "hetero").iterdir()}
    manifests = [run.manifest for run in load_runs(tmp_path / "hetero")]
    assert {each.price_per_h for each in manifests} == {2 * 6.88 + 0.714, 2 * 6.88 + 0.8048}
    assert all(
        Run(tmp_path / "hetero" / each.run_id).has("tasks") for each in manifests
    )  # `sage report` reads them too


def test_processes_find_the_same_as_one(tmp_path: Path) -> None:
    about = {"arms": ("gpu", "cpu"), "rates": (5.0,), "seeds": 1, "chat_rps": 2.0, "overrides": ("load.duration_s=4", "warmup_s=0", "cooldown_s=0")}  # fmt: skip
    alone = hetero(tmp_path / "one", **about)  # type: ignore[arg-type]
    together = hetero(tmp_path / "two", **about, jobs=2)  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(alone.points, together.points)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arms": ("gpu", "tpu")}, "arms: expected two or more of shared, gpu, mixed, cpu, got gpu, tpu"),
        ({"arms": ("gpu",)}, "arms: expected two or more"),
        ({"rates": (0.0,)}, "rates: expected requests a second above 0, got 0"),
        ({"chat_rps": math.nan}, "chat: expected"),
        ({"seeds": 0}, "seeds: expected 1 or more, got 0"),
        ({"rates": ()}, "rates: expected at least one"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(wrong: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        hetero(tmp_path, **wrong)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_command_does_by_default_what_the_bench_does() -> None:
    defaults = {name: each.default for name, each in inspect.signature(command).parameters.items()}
    assert defaults["rates"] == ",".join(f"{rate:g}" for rate in RATES_BY_DEFAULT)
    assert defaults["arms"] == ",".join(ARMS)
    assert (defaults["chat"], defaults["seeds"]) == (CHAT_RPS, SEEDS)


def test_rates_that_are_no_numbers_are_told() -> None:
    with pytest.raises(ConfigError, match="--rates: expected numbers with commas between them, got 'fast'"):
        CliRunner().invoke(_app(), ["--rates", "5,fast"], catch_exceptions=False)


def test_arms_are_the_clusters_that_there_are() -> None:
    conf = Path(__file__).parents[2] / "conf" / "cluster"
    assert {path.stem.removeprefix("hetero_") for path in conf.glob("hetero_*.yaml")} == set(ARMS)


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(command)
    return app
