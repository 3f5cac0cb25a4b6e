"""`sage trace`: what a user types and reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sage_bench.cli.trace import app
from sage_bench.traces.reader import Trace
from sage_core.errors import ConfigError, DataError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:47.68,0,44\n"


def sage_trace(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})


def test_import_then_inspect(tmp_path: Path) -> None:
    source, destination = tmp_path / "azure.csv", tmp_path / "trace.parquet"
    source.write_text(AZURE)
    failed = sage_trace("import", "azure2023", source, destination)
    assert isinstance(failed.exception, DataError)
    assert "line 3: prompt tokens" in str(failed.exception)
    done = sage_trace("import", "azure2023", source, destination, "--skip-bad")
    assert done.exit_code == 0, done.output
    assert "1 requests; broken lines skipped: 1; out of order and sorted: 0" in done.output
    assert "skipped line 3" in done.output
    shown = sage_trace("inspect", destination)
    assert shown.exit_code == 0, shown.output
    assert "azure.csv" in shown.output
    assert Trace(destination).sha256() in shown.output.replace("\n", "")


def test_csv_columns(tmp_path: Path) -> None:
    source, destination = tmp_path / "own.csv", tmp_path / "trace.parquet"
    source.write_text("t,n\n0,5\n10,7\n")
    words = ("import", "csv", source, destination, "--kind", "embedding", "--time-unit", "ms")
    assert sage_trace(*words, "--columns", "arrival_s=t,prompt_tokens=n").exit_code == 0
    assert Trace(destination).scan().last_s == 0.01
    for columns, says in (
        ("arrival_s", "name=column"),
        ("arrival_s=t,arrival_s=n", "each name once"),
        ("arrival_s=t", "missing prompt_tokens"),
    ):
        failed = sage_trace(*words, "--columns", columns, "--force")
        assert isinstance(failed.exception, ConfigError)
        assert says in str(failed.exception)
    assert "--columns: the format csv" in str(sage_trace(*words).exception)


def test_synth_needs_no_file(tmp_path: Path) -> None:
    destination = tmp_path / "synth.parquet"
    done = sage_trace(
        "synth", destination, "--requests", "3000", "--embedding-share", "0.3", "--rate", "20", "--seed", "4"
    )
    assert done.exit_code == 0, done.output
    trace = Trace(destination)
    assert trace.scan().rows == 3000
    assert trace.metadata["seed"] == "4"
    assert trace.metadata["license"] == "CC-BY-4.0"
    shown = sage_trace("inspect", destination)
    assert "prompt embedding" in shown.output
    assert "set at least one" in str(sage_trace("synth", tmp_path / "endless.parquet").exception)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("import", "vidur", "a", "b"), "FORMAT: expected one of azure2023, mooncake, burstgpt, csv"),
        (("import", "mooncake", "a", "b", "--time-unit", "ms"), "only the format csv"),
        (("import", "burstgpt", "a", "b", "--kind", "chat"), "leave --kind out"),
        (("import", "azure2023", "a", "b", "--kind", "code"), "--kind: expected one of"),
        (("synth", "a.parquet", "--requests", "1", "--fit", "nope"), "unknown fit 'nope'"),
    ],
)
def test_wrong_words_are_configuration_errors(words: tuple[str, ...], says: str) -> None:
    failed = sage_trace(*words)
    assert isinstance(failed.exception, ConfigError)
    assert says in str(failed.exception)
