"""``sage report RESULTS``: tables and figures of the runs below a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def command(
    results: Annotated[Path, typer.Argument(help="A folder with runs in it or below it, or one run's folder.")],
    out: Annotated[Path | None, typer.Option(help="Where the files go; by default RESULTS/report.")] = None,
    figures: Annotated[bool, typer.Option(help="Draw the figures too, as PDF and PNG.")] = True,
    baseline: Annotated[
        str | None, typer.Option(help="The policy others are held against; by default fifo, else hybrid.")
    ] = None,
    hosts_differ: Annotated[
        bool, typer.Option("--hosts-differ", help="Compare arms although they ran on different machines.")
    ] = False,
    mlflow: Annotated[
        str | None, typer.Option(metavar="URI", help="Log every run to this MLflow store too, as in sqlite:///runs.db.")
    ] = None,
) -> None:
    """Compare policies: tables with confidence intervals over seeds, verdicts, saturation points and figures, printed and
    as one HTML page."""
    # pandas, scipy and matplotlib take a second and 100 MB, which no other command should pay for.
    from sage_bench.metrics.summary import summarise
    from sage_bench.report import WIDTH, show, write
    from sage_bench.results.reader import load_runs

    console = Console(highlight=False, width=WIDTH)
    summary = summarise(load_runs(results), baseline)
    folder = out or results / "report"
    with console.status("drawing"):
        written = write(summary, folder, figures=figures, root=results, hosts_differ=hosts_differ)
    show(summary, console)  # after the files: whoever pipes this into `head` has them all the same
    names = ", ".join(path.name for path in written if path.parent == folder and path.suffix == ".csv")
    drawn = sum(path.suffix in (".pdf", ".png") for path in written)
    console.print(f"\nPage: {folder / 'report.html'}", soft_wrap=True, markup=False)
    console.print(f"Tables: {folder}: {names}, report.md, figures.tex", soft_wrap=True, markup=False)
    if drawn:
        console.print(f"Figures: {folder}/<experiment>: {drawn} files (PDF and PNG)", soft_wrap=True, markup=False)
    if mlflow is not None:
        from sage_bench.publish.mlflow_log import log_runs

        logged, before = log_runs(summary, mlflow)
        console.print(f"MLflow: {logged} runs logged to {mlflow}, {before} were there", soft_wrap=True, markup=False)
