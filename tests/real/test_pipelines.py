"""The shipped pipelines on real engines: one file, as in simulation, with real text, real vectors, and its replay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from live_engines import Engine

from sage_bench.metrics.stage_spans import stage_spans
from sage_bench.results.manifest import read_manifest
from sage_bench.results.reader import Run

pytestmark = pytest.mark.live

ROOT = Path(__file__).resolve().parents[2]


def sage(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sage_bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture(scope="module")
def index(minilm: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "docs"
    # MiniLM takes 256 tokens.
    done = sage("index", "build", "docs", "--engine", minilm.url, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_question_is_answered_from_documents_and_the_decisions_replay(
    smollm2: Engine, minilm: Engine, index: Path, tmp_path: Path
) -> None:
    record = tmp_path / "run"
    done = sage(
        "app", "rag", "--ask", "How do I make an index of documents?", "--engine", smollm2.url,
        "--engine", f"{minilm.url},kind=embedding", "--index", f"docs={index}", "--max-tokens", "32",
        "--record", str(record),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3
    assert "sources: " in done.stderr and ".md" in done.stderr
    spans = stage_spans(Run(record))
    assert [*spans.spans["name"]] == ["question", "found", "best", "answer"]
    assert spans.unexplained < 0.1  # a millisecond of two seconds, and what a busy machine adds to one question
    assert sage("replay", str(record)).returncode == 0


@pytest.mark.parametrize(
    ("pipeline", "question"), [("agent", "What is 12 * 7? Write CALC 12 * 7"), ("summarize", "word " * 200)]
)
def test_loops_and_fan_outs_end_with_an_answer(pipeline: str, question: str, smollm2: Engine) -> None:
    done = sage("app", pipeline, "--ask", question, "--engine", smollm2.url, "--max-tokens", "16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_experiment_of_the_simulation_on_real_engines(
    smollm2: Engine, minilm: Engine, index: Path, tmp_path: Path
) -> None:
    common = ["run", "experiment=rag", "cluster.devices.0.count=1", "warmup_s=0", f"results={tmp_path}"]
    live = [
        *("driver=live", f"driver.engines=[{smollm2.url},{minilm.url}]", "+driver.models.llm=smollm2-135m"),
        *("+driver.models.embed=minilm", f"+driver.indexes.docs={index}", "driver.exact_output=false"),
        *("load.rate=0.3", "load.duration_s=12", "load.classes.question.output_tokens_max=16"),
    ]
    real, simulated = sage(*common, *live), sage(*common, "load.duration_s=20")
    assert real.returncode == 0, real.stderr
    assert simulated.returncode == 0, simulated.stderr
    for manifest in tmp_path.rglob("manifest.json"):
        told = read_manifest(manifest.parent)
        assert told.counts["responded"] == told.counts["arrived"] > 0
        totals = stage_spans(Run(manifest.parent)).totals
        # Of most: latency counts from the schedule, so on a busy machine the gap of one is that it was sent late.
        assert (totals["gaps_ns"] / totals["e2e_ns"]).median() < 0.01
