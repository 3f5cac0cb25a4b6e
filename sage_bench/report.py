"""Tables and figures of a folder of runs: printed, and written as Markdown, CSV, PDF and PNG."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from sage_bench.figures.latency_cdf import Latency, latency_cdf
from sage_bench.figures.latency_rate import latency_rate
from sage_bench.figures.slo_attainment import slo_attainment
from sage_bench.figures.style import save
from sage_bench.figures.timeline import timeline
from sage_bench.metrics.devices import node_series
from sage_bench.metrics.measure import window_of
from sage_bench.metrics.saturation import Saturation
from sage_bench.metrics.summary import Summary
from sage_bench.results.schema import KINDS
from sage_bench.results.writer import output_error
from sage_bench.tables import DETAILED_MAX, definitions, has, part, sheets

WIDTH: Final = 100
"""Columns that the printed tables try to fit."""

NAME_WIDTH: Final = 15
"""What a policy's name gets at least; longer ones are folded."""

_WORDS: Final = ("condition", "policy", "metric", "verdict")


def show(summary: Summary, console: Console) -> None:
    """Print the tables, :data:`WIDTH` columns wide, then the definitions they use and the notes."""
    for sheet in sheets(summary):
        console.print(f"\n[bold]{_plain(sheet.title)}[/bold]", width=WIDTH)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for column in sheet.columns:
            words = column in _WORDS
            least = NAME_WIDTH if column in ("policy", "condition") else None
            table.add_column(
                column, justify="left" if words else "right", overflow="fold", no_wrap=not words, min_width=least
            )
        for row in sheet.rows:
            table.add_row(*(_plain(cell) for cell in row))
        # A table that needs more gets more: a terminal may wrap it, but no digit is cropped.
        needed = console.measure(table, options=console.options.update(max_width=400)).maximum
        console.print(table, width=max(WIDTH, needed), crop=False)
    console.print()
    for text in (*definitions(), *(f"Note: {note}" for note in summary.notes)):
        console.print(_plain(text), width=WIDTH, style="dim")


def write(summary: Summary, out: Path, *, figures: bool = True) -> list[Path]:
    """Write ``report.md``, the CSV files and, if asked, the figures below ``out``; the paths written.

    Raises :class:`OutputError`.
    """
    tables = {
        "runs": summary.rows,
        "means": summary.means,
        "verdicts": summary.verdicts,
        "saturation": _saturation_rows(summary),
        "nodes": _node_rows(summary),
    }
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            if not table.empty:
                table.to_csv(out / f"{name}.csv", index=False)
                written.append(out / f"{name}.csv")
        (out / "report.md").write_text(_markdown(summary), encoding="utf-8")
        written.append(out / "report.md")
    except OSError as error:
        raise output_error(out, error) from error
    return written + (draw(summary, out / "figures") if figures else [])


def draw(summary: Summary, folder: Path) -> list[Path]:
    """The figures of every detailed condition and of every sweep, as PDF and PNG; the paths written."""
    written = []
    counts: dict[tuple[str, str], int] = {}
    for each in summary.conditions:
        counts[each.experiment, each.source] = counts.get((each.experiment, each.source), 0) + 1
    for condition in summary.conditions:
        if counts[condition.experiment, condition.source] > DETAILED_MAX:
            continue
        stem = _stem(condition.experiment, condition.source, condition.label)
        of = part(summary.means, condition)
        written += save(slo_attainment(of), folder / f"{stem}-slo_attainment")
        for kind in KINDS:
            latencies: list[Latency] = [each for each in ("ttft_ns", "e2e_ns") if has(of, kind, f"{each}_p50")]
            if latencies:
                figure = latency_cdf(condition.arms, [(kind, each) for each in latencies])
                written += save(figure, folder / f"{stem}-latency_cdf-{kind}")
        baseline, *others = condition.arms
        for pair in [[baseline, other] for other in others] or [[baseline]]:
            figure = timeline({name: condition.arms[name][0] for name in pair})
            written += save(figure, folder / f"{stem}-timeline-{_slug(pair[-1])}")
    for sweep in summary.sweeps:
        of = pd.concat([part(summary.means, each) for each in sweep.conditions])
        for kind in KINDS:
            column = "ttft_ns" if has(of, kind, "ttft_ns_p50") else "e2e_ns"
            parts = [f"{column}_{part}" for part in ("p50", "p95", "p99") if has(of, kind, f"{column}_{part}")]
            if parts:
                figure = latency_rate(of, sweep.points, [(kind, part) for part in parts])
                written += save(
                    figure, folder / f"{_stem(sweep.experiment, sweep.source, sweep.label)}-latency_rate-{kind}"
                )
    return written


def _saturation_rows(summary: Summary) -> pd.DataFrame:
    rows = [
        (sweep.experiment, sweep.source, sweep.label, policy, *point)
        for sweep in summary.sweeps
        for policy, point in sweep.points.items()
    ]
    return pd.DataFrame(rows, columns=["experiment", "source", "condition", "policy", *Saturation._fields])


def _node_rows(summary: Summary) -> pd.DataFrame:
    """Utilisation of each node over the arrival window of each run."""
    frames = []
    for condition in summary.conditions:
        for policy, runs in condition.arms.items():
            for run in runs:
                requests = run.frame("requests", ("scheduled_ns", "ended_ns", "warmup"))
                window = window_of(run, requests[~requests["warmup"]])
                frame = node_series(run, window.start_ns, window.arrivals_end_ns)
                facts = (condition.experiment, condition.source, condition.label, policy, run.manifest.run_id)
                for i, (name, fact) in enumerate(zip(_RUN, facts, strict=True)):
                    frame.insert(i, name, fact)
                frames.append(frame)
    return pd.concat(frames, ignore_index=True)


_RUN: Final = ("experiment", "source", "condition", "policy", "run_id")


def _markdown(summary: Summary) -> str:
    parts = ["# Report\n"]
    for sheet in sheets(summary):
        parts.append(f"## {sheet.title}\n")
        parts.append(
            f"| {' | '.join(column.replace(chr(10), ' ') for column in sheet.columns)} |\n|{'---|' * len(sheet.columns)}"
        )
        parts.extend(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in sheet.rows)
        parts.append("")
    parts.append("## Definitions and notes\n")
    parts.extend(f"- {line}" for line in (*definitions(), *summary.notes))
    return "\n".join(parts) + "\n"


def _stem(experiment: str, source: str, label: str) -> str:
    return "-".join(_slug(part) for part in (experiment, "" if source == "simulation" else source, label) if part)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text).strip("_")


def _plain(text: str) -> str:
    """Text as it is: a bracket is not markup."""
    return text.replace("[", r"\[")
