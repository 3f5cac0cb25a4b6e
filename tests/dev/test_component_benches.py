"""The benchmarks of components compare what they say they compare, and leave what they measure as it was."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import AsyncIterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sage_bench.loads.arrivals import Poisson
from sage_core.rng import Streams
from sage_live.retrieval import index as shipped
from sage_live.retrieval.chunk import Chunk
from sage_live.retrieval.index import VectorIndex
from sage_policies.presets import PRESETS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_branches_at_once_are_faster_and_within_the_bound(tmp_path: Path) -> None:
    parallelism = bench("parallelism")
    for form in parallelism.FORMS:
        made = parallelism.pipeline(4, chain=form == "chain")
        (tmp_path / f"{form}-4.yaml").write_text(yaml.safe_dump(made))
    row = parallelism.compared("simulated", 4, "idle", 0.05, 1, 40.0, tmp_path)
    assert 1.8 < row["speedup"] <= 1.001 * row["bound"] < 4
    assert row["chain_s"] > row["declared_s"] > 0 and row["difference_s"] < 0


def test_every_form_of_the_rag_is_asked_the_same_at_the_same_instants() -> None:
    orchestration = bench("orchestration")
    streams = [Streams(seed) for seed in (3, 3, 4)]
    first, again, other = ([*orchestration.instants(Poisson(), 20.0, 5.0, each, "questions")] for each in streams)
    assert first == again != other and 50 < len(first) < 150 and max(first) < 5.0
    first, again = ([ask(20) for _ in range(5)] for ask in (orchestration.texts(3), orchestration.texts(3)))
    assert first == again and all(10 <= len(text.split()) <= 30 for text in first)


def test_differences_are_of_the_declared_form_repetition_by_repetition() -> None:
    orchestration = bench("orchestration")
    noise = (0.0, 0.4, -0.3, 0.2, 0.1)  # shared by the forms of a repetition, as the load is

    def runs(mean_s: float) -> list[dict[str, float]]:
        return [dict.fromkeys(orchestration.BETTER, mean_s + each) | {"failures": 0.0} for each in noise]

    loads = {"busy": orchestration.judged({"declared": runs(1.0), "script": runs(1.2), "microservices": runs(1.0)})}
    orchestration.adjust(loads)
    gained = loads["busy"]["declared - script"]
    assert gained["p95_s"]["mean"] == pytest.approx(-0.2) and gained["p95_s"]["verdict"] == "better"
    assert gained["slo_attainment"]["verdict"] == "worse", "less of it is worse"
    assert loads["busy"]["declared - microservices"]["p95_s"]["verdict"] == "no significant difference"
    orchestration.table_of("busy", loads["busy"])


def test_a_run_without_answers_is_told_and_loses_no_other(tmp_path: Path) -> None:
    orchestration = bench("orchestration")
    answered = orchestration.Outcome([0.1, 0.3], [0.2], cpu_s=1.0, span_s=2.0, asked=2).figures()
    silent = orchestration.Outcome([float("nan")] * 2, [float("nan")], cpu_s=1.0, span_s=2.0, asked=2).figures()
    assert answered.keys() == silent.keys()
    assert (silent["questions"], silent["failures"], silent["slo_attainment"], silent["answered_rps"]) == (2, 2, 0, 0)
    assert np.isnan([silent[name] for name in ("mean_s", "p50_s", "p99_s", "documents_p95_s")]).all()
    assert np.isnan(orchestration.Outcome(span_s=2.0).figures()["slo_attainment"]), "nothing was asked"

    runs = {"busy": {form: [answered, answered] for form in orchestration.FORMS} | {"script": [answered, silent]}}
    figures: dict[str, Any] = {}
    orchestration.write(tmp_path / "new" / "o.json", figures, runs)
    script = json.loads((tmp_path / "new" / "o.json").read_text())["loads"]["busy"]["script"]
    assert script["mean_s"]["mean"] == pytest.approx(0.2) and script["failures"]["mean"] == 1.0
    orchestration.table_of("busy", figures["loads"]["busy"])


def test_what_was_measured_is_written_after_each_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orchestration = bench("orchestration")
    out = tmp_path / "o.json"

    @contextlib.asynccontextmanager
    async def forms(folder: Path, policy: str) -> AsyncIterator[dict[str, str]]:
        yield dict.fromkeys(orchestration.FORMS, "")

    async def one(form: str, load: Any, seconds: float, seed: int) -> Any:
        if seed == 3:
            raise TimeoutError
        return orchestration.Outcome([0.1 * seed], cpu_s=1.0, span_s=1.0, asked=1)

    monkeypatch.setattr(orchestration, "forms", forms)
    monkeypatch.setattr(orchestration, "one", one)
    monkeypatch.setattr(sys, "argv", ["orchestration", "--loads", "busy", "--repetitions", "4", "--out", str(out)])
    with pytest.raises(TimeoutError):
        orchestration.main()
    kept = json.loads(out.read_text())
    assert kept["repetitions"] == 2 and kept["loads"]["busy"]["declared"]["mean_s"]["mean"] == pytest.approx(0.15)


def bench(name: str) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    "series",
    [
        {},
        {"per_window": 10},
        {"per_window": 1000},
        {"overlap": 4},
        {"keys": 7},
        {"per_window": 40, "overlap": 8, "keys": 3},
    ],
    ids=str,
)
def test_the_stream_and_pandas_find_the_same_windows(series: dict[str, int]) -> None:
    timeseries = bench("timeseries")
    of = timeseries.Series(**{"items": 400, "per_window": 100, **series})
    rows = timeseries.drawn(of)
    found = timeseries.as_frame(timeseries.streamed(rows, of))
    assert len(found) >= of.items // of.per_window
    assert timeseries.agree(found, timeseries.by_pandas(rows, of))


def test_canary_a_wrong_window_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    timeseries = bench("timeseries")
    of = timeseries.Series(400, 100)
    right = timeseries.by_pandas
    monkeypatch.setattr(timeseries, "by_pandas", lambda rows, series: right(rows[1:], series))
    with pytest.raises(SystemExit, match="found different windows"):
        timeseries.measured(of, 1)


def test_more_effort_finds_more_and_the_index_is_as_before() -> None:
    retrieval = bench("retrieval")
    vectors, queries = retrieval.drawn(2000)
    chunks = [Chunk(f"chunk {i}", "source", i, i) for i in range(len(vectors))]
    index = VectorIndex.build(vectors, chunks)
    before = shipped.PROPOSALS_MIN, shipped.PROPOSALS_PER_HIT, index._graph.expansion_search
    rows = retrieval.by_effort(index, queries[:20])
    assert (shipped.PROPOSALS_MIN, shipped.PROPOSALS_PER_HIT, index._graph.expansion_search) == before
    least, most = rows[0], rows[-2]
    assert least["effort"] < most["effort"]
    assert least["recall_at_10"] < most["recall_at_10"] <= 1
    assert least["search_s"] < most["search_s"]
    assert [row["shipped"] for row in rows] == [False] * len(retrieval.EFFORTS) + [True]
    assert rows[-1]["effort"] == before[0]


def test_recall_is_counted_against_exact_search() -> None:
    retrieval = bench("retrieval")
    vectors = np.eye(4, dtype=np.float32)
    index = VectorIndex.build(vectors, [Chunk(str(i), "source", i, i) for i in range(4)])
    rows = retrieval.by_effort(index, np.asarray([[1, 0.5, 0.2, 0.1]], np.float32))
    # Four chunks in all: of the ten nearest there are four, and all of them are found.
    assert all(row["recall_at_1"] == 1.0 and row["recall_at_10"] == 0.4 for row in rows)


def test_the_optimum_is_that_of_every_permutation() -> None:
    scheduling = bench("scheduling")
    for seed in range(30):
        of = scheduling.instance(6, (0.7, 1.0, 1.5, 3.0)[seed % 4], seed)
        best = 0
        for way in permutations(range(6)):
            ends = np.cumsum(of.work[list(way)])
            best = max(best, int((ends <= of.due[list(way)]).sum()))
        assert scheduling.optimum(of) == best


def test_no_order_beats_the_optimum_and_the_earliest_deadline_meets_all_that_can_be_met() -> None:
    scheduling = bench("scheduling")
    met_all = 0
    for seed in range(20):
        of = scheduling.instance(8, (0.5, 1.5)[seed % 2], seed)
        most = scheduling.optimum(of)
        found = {name: scheduling.met(make().order, of) for name, make in PRESETS.items()}
        assert max(found.values()) <= most
        if most == 8:  # Jackson's rule
            assert found["slo_aware"] == 8
            met_all += 1
    assert met_all
