"""``e2e_rag``: the stages add up to the latency, and a loss is told like a win."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from sage_bench.figures.stage_shares import stage_shares
from sage_bench.figures.stage_waterfall import stage_waterfall
from sage_bench.made_up_index import KEPT, WORDS, passages
from sage_bench.metrics.statistics import Interval, Paired
from sage_bench.results.manifest import NAME
from sage_bench.studies import e2e_rag
from sage_bench.studies.e2e_rag import E2E_RAG
from sage_bench.studies.findings import Findings
from sage_bench.studies.points import Ratio
from sage_bench.studies.study import experiments_in
from sage_core.errors import DataError


@pytest.fixture(scope="module")
def results(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("e2e")
    small.sweep(
        folder,
        "e2e_rag",
        ["load.duration_s=25", "warmup_s=1", "cooldown_s=1", "record.steps=false"],
        {
            "arm": ["e2e_rag/hybrid", "e2e_rag/hybrid_no_path"],
            "load.classes.question.share": ["0.1"],
            "load.rate": ["20", "90"],
            "seed": ["1", "2"],
        },
    )
    return folder


@pytest.fixture(scope="module")
def findings(results: Path) -> Findings:
    return E2E_RAG.findings(experiments_in(results, E2E_RAG))


def rows_of(findings: Findings, name: str) -> list[list[str]]:
    (table,) = (each for each in findings.tables if each.name == name)
    assert all(len(row) == len(table.sheet.columns) for row in table.sheet.rows)
    return table.sheet.rows


def test_stages_are_the_latency_of_the_questions(results: Path, findings: Findings) -> None:
    rows = [row for row in rows_of(findings, "stages_10") if row[0] == "hybrid"]
    assert [row[1] for row in rows] == ["question", "found", "best", "answer", "gaps"]
    told_ms = sum(float(cell.replace(",", "")) for row in rows for cell in row[3:5])
    (rate,) = {
        sentence.split(" at ")[1].split(" ")[0] for sentence in findings.sentences if sentence.startswith("Of the time")
    }
    means = []
    for path in (results / "e2e_rag").glob("hybrid-*"):
        if f'"load.rate={rate}"' in (path / "manifest.json").read_text(encoding="utf-8"):
            chat = pq.read_table(path / "requests.parquet").to_pandas()
            chat = chat[(chat["kind"] == "chat") & ~chat["warmup"] & (chat["outcome"] == "responded")]
            means.append(float(chat["e2e_ns"].mean()) / 1e6)
    assert len(means) == 2
    assert told_ms == pytest.approx(np.mean(means), rel=0.01)


def test_a_loss_is_told_like_a_win(results: Path, findings: Findings, small: ModuleType, tmp_path: Path) -> None:
    names = {"hybrid": "hybrid_no_path", "hybrid_no_path": "hybrid"}
    other = E2E_RAG.findings(small.relabelled(results, tmp_path / "swapped", E2E_RAG, names))
    here = {tuple(row[1:3]): row[3] for row in rows_of(findings, "latency")}
    there = {tuple(row[1:3]): row[3] for row in rows_of(other, "latency")}
    assert here["90", "hybrid"] == there["90", "hybrid_no_path"] != there["90", "hybrid"]
    signs = [
        sentence.split("with hybrid_no_path (")[1][0]
        for each in (findings, other)
        for sentence in each.sentences
        if sentence.startswith("At 90 ")
    ]
    assert sorted(signs) == ["+", "-"]


def test_figures_are_drawn_and_refuse_nothing(findings: Findings) -> None:
    for drawing in findings.figures:
        assert drawing.draw().axes, drawing.name
    with pytest.raises(DataError, match="nothing to decompose"):
        stage_shares({}, "simulated")
    with pytest.raises(DataError, match="nothing to draw"):
        stage_waterfall({"median": pd.DataFrame()}, "simulated")


def test_a_comparison_needs_two_arms(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "one")
    for path in (tmp_path / "one" / "e2e_rag").glob("hybrid_no_path-*"):
        shutil.rmtree(path)
    with pytest.raises(DataError, match="another"):
        E2E_RAG.findings(experiments_in(tmp_path / "one", E2E_RAG))


def test_a_close_look_needs_a_rate_that_all_arms_have(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "apart")
    for path in list((tmp_path / "apart" / "e2e_rag").iterdir()):
        lacks = '"load.rate=20"' if path.name.startswith("hybrid_no_path") else '"load.rate=90"'
        if lacks in (path / NAME).read_text(encoding="utf-8"):
            shutil.rmtree(path)
    with pytest.raises(DataError, match="no rate has runs of all of hybrid, hybrid_no_path"):
        E2E_RAG.findings(experiments_in(tmp_path / "apart", E2E_RAG))


def test_claims_are_adjusted_for_how_many_there_are(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attainment, p95 and p99 against one arm: three at once."""
    monkeypatch.setattr(e2e_rag, "against", lambda *_: Paired(Interval(0.1, 0.05, 0.15, 5), 0.02))
    monkeypatch.setattr(e2e_rag, "ratio", lambda *_: Ratio(Interval(0.9, 0.8, 1.0, 5), 0.02))
    claims = E2E_RAG.findings(experiments_in(results, E2E_RAG)).claims
    compared = {each.id: each.outcome for each in claims if each.id.endswith("-hybrid_no_path")}
    assert len(compared) == 3
    assert set(compared.values()) == {"no significant difference"}


def test_figures_of_a_benchmark_are_told_apart_and_read_whole(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "results" / "bench" / "retrieval.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"search": {"1000": {"recall_at_10": 0.93}}}), encoding="utf-8")
    (note,) = E2E_RAG.findings(experiments_in(results, E2E_RAG)).notes
    assert note.startswith("Not from these runs: ")
    assert "0.93 of 1,000 vectors" in note
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"retrieval\.json"):
        E2E_RAG.findings(experiments_in(results, E2E_RAG))


def test_the_made_up_index_searches_and_ranks() -> None:
    vector = np.random.default_rng(3).standard_normal(384).astype(np.float32)
    found = passages(vector, "word7 word8").split("\n\n")
    assert len(found) == KEPT
    assert all(len(text.split()) == WORDS for text in found)
    assert passages(-vector, "word7 word8").split("\n\n") != found
