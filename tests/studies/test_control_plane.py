"""``control_plane``: on queues whose capacity is known, the study finds it, the best split, and the sign, whichever it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import msgspec
import pandas as pd
import pytest

from sage_bench.metrics.statistics import paired
from sage_bench.results.manifest import NAME, DeviceFact, read_manifest
from sage_bench.results.reader import Runs, load_runs
from sage_bench.studies.control_plane import CONTROL_PLANE, UNIFIED, differences, live_claims, stranded
from sage_bench.studies.findings import Claim, Findings
from sage_bench.studies.study import experiments_in
from sage_bench.studies.twins import Sides
from sage_core.errors import DataError
from sage_core.slo import Slo, SloTable
from sage_core.units import RequestKind

SPEED = {"unified": 110.0, "split_1": 62.0, "split_2": 80.0, "split_3": 20.0, "vllm_only": 80.0}
"""Requests/s that an arm's one server serves; it attains 95 % up to about 30/s less (M/M/1, due in 0.1 s)."""

CLASSES = {"share": 0.3, "prefill": 1.0}, {"kind": RequestKind.EMBEDDING, "share": 0.7, "output_tokens": 0}

SLO = SloTable({"chat": Slo(ttft_s=0.1), "embedding": Slo(e2e_s=0.1)})


def made(results: Path, queueing: ModuleType, speed: dict[str, float], rates: tuple[int, ...], seeds: int) -> Path:
    """Runs of both experiments, as sweeps would leave them."""
    classes = tuple(queueing.Class(**each) for each in CLASSES)
    for arm, mu in speed.items():
        experiment = "control_plane_vllm_only" if arm == "vllm_only" else "control_plane"
        for rate in rates:
            for seed in range(1, seeds + 1):
                queueing.run(
                    results / experiment / f"{arm}-{rate}-{seed}",
                    queueing.Queue(rate, 1 / mu, 1000, seed, classes=classes, slo=SLO, report_s=0.5),
                    experiment=experiment,
                    config={"arm": {"name": arm, "differs_in": ["cluster"]}, "cluster": {"name": arm}},
                    overrides=("load=control_plane/varying", f"arm=control_plane/{arm}", f"load.rate={rate}"),
                )
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, queueing: ModuleType) -> Path:
    return made(tmp_path_factory.mktemp("control_plane"), queueing, SPEED, (20, 40, 60, 95), 3)


@pytest.fixture(scope="module")
def findings(results: Path) -> Findings:
    return CONTROL_PLANE.findings(experiments_in(results, CONTROL_PLANE))


def rewritten(results: Path, tmp_path: Path, change: Callable[[str], str]) -> Path:
    for path in results.rglob(NAME):
        to = tmp_path / path.parent.relative_to(results)
        to.mkdir(parents=True)
        for file in path.parent.glob("*.parquet"):
            (to / file.name).symlink_to(file)
        (to / NAME).write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    return tmp_path


def claim(findings: Findings, id: str) -> Claim:
    return next(each for each in findings.claims if each.id == id)


def test_the_best_split_is_found_and_the_ratio_is_that_of_the_queues(findings: Findings) -> None:
    told = claim(findings, "capacity-varying")
    assert "of split_2, 3 seeds" in told.text
    assert float(told.text.split("x")[0]) == pytest.approx((110 - 30) / (80 - 30), rel=0.15)
    assert claim(findings, "more-load").requirement == 270
    (table,) = (each for each in findings.tables if each.name == "capacity")
    cells = {row[0]: row[2] for row in table.sheet.rows}
    assert cells["split_3"] == "below the grid (3 seeds)"
    assert cells["vllm_only"] != "–", "of the other experiment, in the same table"


def test_every_split_at_every_rate_is_in_the_tuning_log(findings: Findings) -> None:
    (table,) = (each for each in findings.tables if each.name == "tuning")
    assert [row[1] for row in table.sheet.rows] == ["split_1", "split_2 (best)", "split_3"]
    assert table.sheet.columns[2:] == ["20", "40", "60", "95"]
    assert all("–" not in row for row in table.sheet.rows)


def test_a_loss_is_told_like_a_win(results: Path, tmp_path: Path) -> None:
    """The same rows with the names of the two arms exchanged."""

    def exchange(text: str) -> str:
        return text.replace("unified", "?").replace("split_2", "unified").replace("?", "split_2")

    found = CONTROL_PLANE.findings(experiments_in(rewritten(results, tmp_path, exchange), CONTROL_PLANE))
    told = claim(found, "capacity-varying")
    assert float(told.text.split("x")[0]) < 0.8 and told.outcome == "does not hold"
    assert "the split is better there" in found.sentences[0]
    assert claim(found, "slo-mixed").outcome == "does not hold"
    assert claim(found, "p99-mixed").outcome == "not measured", "300 chats have no p99"


def test_unequal_hardware_is_refused(results: Path, tmp_path: Path) -> None:
    device = msgspec.to_builtins(DeviceFact(0, "n", "h100_sxm", 1, None, "unknown", None))

    def more(text: str) -> str:
        manifest = msgspec.json.decode(text)
        if manifest["config"]["arm"]["name"] == "unified":
            manifest["devices"] = [device]
        return str(msgspec.json.encode(manifest), "utf-8")

    with pytest.raises(DataError, match=r"not the same hardware.*1 h100_sxm"):
        CONTROL_PLANE.findings(experiments_in(rewritten(results, tmp_path, more), CONTROL_PLANE))


def test_a_grid_that_ends_too_early_measures_nothing(tmp_path: Path, queueing: ModuleType) -> None:
    speed = {name: (1000.0 if name != "split_1" else 62.0) for name in SPEED}
    found = CONTROL_PLANE.findings(experiments_in(made(tmp_path, queueing, speed, (20, 60), 2), CONTROL_PLANE))
    assert claim(found, "capacity-varying").outcome == "not measured"
    assert "above the grid (2 seeds)" in found.sentences[0], (
        "a split whose end was not found is not beaten by one whose was"
    )


def test_without_the_unified_arm_there_is_nothing_to_say(results: Path, tmp_path: Path) -> None:
    folder = rewritten(results, tmp_path, lambda text: text.replace('"unified"', '"other"'))
    with pytest.raises(DataError, match="no run of unified"):
        CONTROL_PLANE.findings(experiments_in(folder, CONTROL_PLANE))


def test_a_seed_that_was_cut_off_is_left_out_and_told(results: Path, findings: Findings, tmp_path: Path) -> None:
    """split_1 attains 95 % at the lowest rate; with that alone it would seem to be above the grid, and so the best split."""
    folder = rewritten(results, tmp_path, lambda text: text)
    for rate in (40, 60, 95):
        shutil.rmtree(folder / "control_plane" / f"split_1-{rate}-3")
    found = CONTROL_PLANE.findings(experiments_in(folder, CONTROL_PLANE))
    assert claim(found, "capacity-varying") == claim(findings, "capacity-varying")
    assert "split_1 under varying, seed 3: ran at 1 of 4 rates, left out." in found.notes


def test_two_configurations_of_a_point_are_refused(results: Path, tmp_path: Path) -> None:
    folder = rewritten(results, tmp_path, lambda text: text)
    shutil.copytree(folder / "control_plane" / "split_3-40-1", folder / "control_plane" / "z", symlinks=True)
    with pytest.raises(DataError, match=r"split_3-40-1 and .*z: two configurations of one point"):
        CONTROL_PLANE.findings(experiments_in(folder, CONTROL_PLANE))


def test_without_the_varying_load_there_is_nothing_to_say(results: Path, tmp_path: Path) -> None:
    folder = rewritten(results, tmp_path, lambda text: text.replace("control_plane/varying", "control_plane/constant"))
    with pytest.raises(DataError, match="load=control_plane/varying; run the whole experiment"):
        CONTROL_PLANE.findings(experiments_in(folder, CONTROL_PLANE))


def test_arms_without_a_common_seed_are_not_compared(results: Path, tmp_path: Path) -> None:
    folder = rewritten(results, tmp_path, lambda text: text)
    for path in (folder / "control_plane").iterdir():
        arm, seed = path.name.partition("-")[0], path.name.rpartition("-")[2]
        if (seed == "1") != (arm == UNIFIED):
            shutil.rmtree(path)
    with pytest.raises(DataError, match="unified and split_2 share no seed"):
        CONTROL_PLANE.findings(experiments_in(folder, CONTROL_PLANE))


def test_a_difference_is_adjusted_for_every_rate_and_mix_it_was_looked_for_at() -> None:
    gained = {20: (0.0, 0.01, -0.01, 0.0, 0.01), 40: (0.01, 0.05, 0.02, 0.06, 0.01), 60: (0.0, -0.01, 0.0, 0.01, 0.0)}
    rows = [
        {"rate": float(rate), "arm": arm, "seed": seed, "attainment": 0.9 + (more if arm == UNIFIED else 0.0)}
        for rate, gains in gained.items()
        for seed, more in enumerate(gains)
        for arm in (UNIFIED, "split_2", "split_1")
    ]
    frame = pd.DataFrame(rows)
    found = differences({"varying": frame, "constant": frame}, {"varying": "split_2", "constant": "split_1"})
    raw = paired([0.0] * 5, gained[40]).p
    (row,) = found[(found["mix"] == "varying") & (found["rate"] == 40)].to_dict("records")
    assert raw < 0.05 and row["p_adjusted"] == pytest.approx(6 * raw)
    assert row["verdict"] == "no significant difference" and row["other"] == "split_2" and len(found) == 6


PAIR_SPEEDS = {"faster": 80.0, "slower": 62.0, "even": 70.0}
"""Of the pair's unified arm; the split's is "even". At 45 requests/s."""


@pytest.mark.parametrize(
    ("twins", "live", "outcome"),
    [
        ("123", {1: "faster", 2: "faster", 3: "faster"}, "holds"),
        ("123", {1: "slower", 2: "slower", 3: "slower"}, "does not hold"),
        ("123", {1: "faster", 2: "slower", 3: "faster"}, "no significant difference"),
        ("123", {1: "faster"}, "no significant difference"),
        ("12", {3: "faster"}, "not measured"),
    ],
)
def test_the_sign_live(tmp_path: Path, queueing: ModuleType, twins: str, live: Mapping[int, str], outcome: str) -> None:
    """Two means of one sign are no evidence; neither are seeds that ran on one side only."""
    for source, unified in [("simulation", {int(seed): "faster" for seed in twins}), ("emulated", live)]:
        for seed, speed in unified.items():
            for arm, mu in (("pair_unified", PAIR_SPEEDS[speed]), ("pair_split", PAIR_SPEEDS["even"])):
                queueing.run(
                    tmp_path / f"{source}-{arm}-{seed}",
                    queueing.Queue(
                        45, 1 / mu, 600, seed, classes=tuple(queueing.Class(**each) for each in CLASSES), slo=SLO
                    ),
                    experiment="control_plane",
                    source=source,
                    config={"arm": {"name": arm}},
                    overrides=("load=control_plane/varying",),
                )
    runs = load_runs(tmp_path).by(lambda m: m.source)
    (told,) = live_claims(Sides(Runs([]), runs["simulation"], runs["emulated"]))
    assert told.outcome == outcome, told.text


def test_figures_draw(findings: Findings) -> None:
    for drawing in findings.figures[:1]:
        assert drawing.draw().axes


def test_stranded_capacity_is_what_the_samples_say(small: ModuleType, tmp_path: Path) -> None:
    """A split in the peak of chats: some miss their objectives, and half of the embedding devices' time is idle."""
    small.sweep(
        tmp_path,
        "control_plane",
        ["load.duration_s=30", "warmup_s=0"],
        {"arm": ["control_plane/split_2"], "load": ["control_plane/varying"], "load.rate": ["320"], "seed": ["1"]},
    )
    run = load_runs(tmp_path)[0]
    chat, embedding = stranded(run)
    assert 0 < chat[0] <= 1 and 0 < chat[1] < 1
    rows = run.frame("requests", ("kind", "scheduled_ns", "good"))
    rows["stretch"] = (rows["scheduled_ns"] - rows["scheduled_ns"].min()) // 5_000_000_000
    mean = rows[rows["kind"] == "chat"].groupby("stretch")["good"].mean()
    assert chat[0] == pytest.approx((mean < 0.95).mean())
    assert read_manifest(run.folder).config["arm"]["name"] == "split_2" and 0 <= embedding[0] <= 1
