"""`sage report` from a folder of runs to tables, files and figures."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import ModuleType

import msgspec
import pandas as pd
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from sage_bench.cli.report import command
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.summary import Summary, summarise
from sage_bench.report import WIDTH, show, write
from sage_bench.results.manifest import read_manifest
from sage_bench.results.reader import load_runs
from sage_bench.tables import sheets
from sage_core.errors import DataError, OutputError
from sage_core.units import RequestKind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, queueing: ModuleType) -> Path:
    """One detailed experiment and one sweep of five rates."""
    path: Path = tmp_path_factory.mktemp("report")
    classes = (
        queueing.Class(share=0.6, tenant="chatty"),
        queueing.Class(kind=RequestKind.EMBEDDING, tenant="search", priority=1, share=0.4, output_tokens=0),
    )
    for experiment, rates in (("mixed", (45,)), ("rates", (20, 30, 40, 55, 70))):
        for rate in rates:
            for order in ("fifo", "a_policy_with_quite_a_long_name"):
                for seed in (1, 2, 3):
                    queueing.run(
                        path / experiment / f"{order}-{rate}-{seed}",
                        queueing.Queue(
                            rate, 0.02, 250, seed, order="fifo" if order == "fifo" else "priority", classes=classes
                        ),
                        experiment=experiment,
                        policy=order,
                        overrides=(f"load.rate={rate}",) if experiment == "rates" else (),
                        price_per_h=12.0,
                    )
    return path


@pytest.fixture(scope="module")
def summary(folder: Path) -> Summary:
    return summarise(load_runs(folder))


app = typer.Typer()
app.command()(command)


def printed(summary: Summary) -> str:
    out = io.StringIO()
    show(summary, Console(file=out, width=WIDTH, highlight=False))
    return out.getvalue()


def test_tables_fit_and_say_what_they_mean(summary: Summary) -> None:
    text = printed(summary)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "against fifo" in text and "saturation" in text
    assert "Jain index over tenants" in text and "Student's t" in text
    assert "p99 needs 662 samples" in text and "ran with 3 seeds; 5 or more are advised" in text


def test_no_cell_is_lost_in_print(summary: Summary) -> None:
    flat = re.sub(r"\s+", "", printed(summary))
    for sheet in sheets(summary):
        for row in sheet.rows:
            assert all(re.sub(r"\s+", "", cell) in flat for cell in row if len(cell) < 15), row


def test_printed_numbers_are_those_of_the_rows(folder: Path, summary: Summary) -> None:
    first = next(iter(sheets(summary)))
    rows = {row[0]: dict(zip(first.columns, row, strict=True)) for row in first.rows}
    for policy, cells in rows.items():
        runs = load_runs(folder / "mixed").where(lambda m, policy=policy: m.policy.name == policy)  # type: ignore[misc]
        share = pd.Series([100 * run.frame("requests")["good"].mean() for run in runs])
        half = 4.302653 * share.std() / 3**0.5
        assert cells["SLO\n(%)"] == f"{share.mean():.1f} ±{half:.1f}"
        assert cells["runs"] == "3"


def test_everything_is_written_and_readable(tmp_path: Path, summary: Summary) -> None:
    written = write(summary, tmp_path / "out", figures=True)
    assert all(path.stat().st_size > 0 for path in written)
    names = {path.name for path in written}
    assert {
        "runs.csv",
        "means.csv",
        "verdicts.csv",
        "saturation.csv",
        "report.md",
        "report.html",
        "figures.tex",
    } <= names
    there = {str(path.relative_to(tmp_path / "out")) for path in written}
    for stem in (
        "mixed/latency_cdf-chat",
        "mixed/slo_attainment",
        "mixed/timeline-a_policy_with_quite_a_long_name",
        "rates/latency_rate-chat",
    ):
        assert {f"{stem}.pdf", f"{stem}.png", f"{stem}_figure.tex"} <= there
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == sum(name.endswith(".png") for name in there)
    assert "against fifo: a_policy_with_quite_a_long_name" in page and "Jain index over tenants" in page
    runs = pd.read_csv(tmp_path / "out" / "runs.csv")
    assert runs[runs["kind"] == ALL]["run_id"].nunique() == 36
    assert set(pd.read_csv(tmp_path / "out" / "verdicts.csv")["experiment"]) == {"mixed", "rates"}
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    tables = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) == len(list(sheets(summary)))
    for table in tables:
        assert len({row.count("|") for row in table}) == 1, "a Markdown table with ragged rows"


def test_the_command_line_tells_where_things_are(tmp_path: Path, folder: Path) -> None:
    result = CliRunner().invoke(app, [str(folder / "mixed"), "--out", str(tmp_path / "o"), "--no-figures"])
    assert result.exit_code == 0, result.output
    assert f"Tables: {tmp_path / 'o'}: runs.csv, means.csv, verdicts.csv, nodes.csv, " in result.output
    assert f"Page: {tmp_path / 'o' / 'report.html'}" in result.output
    assert not list((tmp_path / "o").rglob("*.png"))
    assert "<img" not in (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    for name in ("report.md", "report.html", "runs.csv", "checklist.csv"):
        assert str(folder) not in (tmp_path / "o" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(["nowhere"], DataError), (["."], DataError)],
)
def test_mistakes_are_the_users_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: type[Exception]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, error) and arguments[0] in str(result.exception)


def test_an_output_folder_that_cannot_be_made(tmp_path: Path, summary: Summary) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file/report/runs\.csv: cannot be written"):
        write(summary, tmp_path / "file" / "report", figures=False)


def test_arms_of_two_machines_need_a_word(tmp_path: Path, queueing: ModuleType) -> None:
    for policy in ("fifo", "priority"):
        queueing.run(tmp_path / "r" / policy, queueing.Queue(20, 0.02, 50, 1, order=policy), policy=policy)
    victim = tmp_path / "r" / "fifo"
    manifest = read_manifest(victim)
    elsewhere = msgspec.structs.replace(manifest.hardware, cpu="another")
    (victim / "manifest.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, hardware=elsewhere)))
    refused = CliRunner().invoke(app, [str(tmp_path / "r"), "--no-figures"])
    assert isinstance(refused.exception, DataError) and "different machines (cpu: 'another'" in str(refused.exception)
    assert not (tmp_path / "r" / "report").exists()
    accepted = CliRunner().invoke(app, [str(tmp_path / "r"), "--no-figures", "--hosts-differ"])
    assert accepted.exit_code == 0
    assert "ran on different machines" in (tmp_path / "r" / "report" / "report.html").read_text(encoding="utf-8")
