"""``e2e_rag``: the stages add up to the latency, and a loss is told like a win."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from sage_bench.figures.stage_shares import stage_shares
from sage_bench.figures.stage_waterfall import stage_waterfall
from sage_bench.made_up_index import KEPT, WORDS, passages
from sage_bench.studies.e2e_rag import E2E_RAG
from sage_bench.studies.findings import Findings
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
    import shutil

    shutil.copytree(results, tmp_path / "one")
    for path in (tmp_path / "one" / "e2e_rag").glob("hybrid_no_path-*"):
        shutil.rmtree(path)
    with pytest.raises(DataError, match="another"):
        E2E_RAG.findings(experiments_in(tmp_path / "one", E2E_RAG))


def test_the_made_up_index_searches_and_ranks() -> None:
    vector = np.random.default_rng(3).standard_normal(384).astype(np.float32)
    found = passages(vector, "word7 word8").split("\n\n")
    assert len(found) == KEPT
    assert all(len(text.split()) == WORDS for text in found)
    assert passages(-vector, "word7 word8").split("\n\n") != found
