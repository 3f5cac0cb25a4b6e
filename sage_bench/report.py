"""Tables and figures of a folder of runs: printed, and written as HTML, Markdown, CSV, LaTeX, PDF and PNG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from sage_bench.figures.latency_cdf import Latency, latency_cdf
from sage_bench.figures.latency_rate import latency_rate
from sage_bench.figures.slo_attainment import slo_attainment
from sage_bench.figures.timeline import timeline
from sage_bench.metrics.compare import Condition
from sage_bench.metrics.devices import node_series
from sage_bench.metrics.measure import window_of
from sage_bench.metrics.saturation import Saturation
from sage_bench.metrics.statistics import CONFIDENCE
from sage_bench.metrics.summary import Summary, Sweep
from sage_bench.publish.chapter import Chapter
from sage_bench.publish.fairness import refuse_unequal_hosts
from sage_bench.publish.page import slug
from sage_bench.publish.publish import write_chapters, write_text
from sage_bench.results.schema import KINDS
from sage_bench.studies.findings import Drawing, Findings, TableOf
from sage_bench.tables import DETAILED_MAX, definitions, has, part, sheets, title_of, verdict_sentences

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


def write(
    summary: Summary, out: Path, *, figures: bool = True, root: Path | None = None, hosts_differ: bool = False
) -> list[Path]:
    """Write the page ``report.html``, the tables and figures behind it, the rows as CSV and ``report.md`` below ``out``;
    the paths written.

    root: the folder the runs were read from; files name runs relative to it. hosts_differ: arms may have run on different
    machines. Raises :class:`DataError` (also where they did and may not) and :class:`OutputError`.
    """
    if not hosts_differ:
        refuse_unequal_hosts(summary.conditions)
    if root is not None:
        summary = replace(summary, notes=[note.replace(f"{root}/", "") for note in summary.notes])
    rows = {
        "runs": summary.rows,
        "means": summary.means,
        "verdicts": summary.verdicts,
        "saturation": _saturation_rows(summary),
        "nodes": _node_rows(summary),
    }
    written = []
    for name, table in rows.items():
        if not table.empty:
            write_text(out / f"{name}.csv", table.to_csv(index=False))
            written.append(out / f"{name}.csv")
    write_text(out / "report.md", _markdown(summary))
    chapters = list(chapters_of(summary))
    pages = write_chapters(chapters, (), out, title="SAGE: report", figures=figures, definitions=definitions())
    return [*written, out / "report.md", *pages]


def chapters_of(summary: Summary) -> Iterator[Chapter]:
    """A chapter for each experiment: its tables, its verdicts in words, its figures."""
    for experiment in dict.fromkeys(each.experiment for each in summary.conditions):
        conditions = [each for each in summary.conditions if each.experiment == experiment]
        part = replace(
            summary, conditions=conditions, sweeps=[each for each in summary.sweeps if each.experiment == experiment]
        )
        seeds = {run.manifest.seed for each in conditions for arm in each.arms.values() for run in arm}
        caption = f"Means over {len(seeds)} seed{'s' if len(seeds) > 1 else ''}."
        findings = Findings(
            tables=[TableOf(f"table_{i + 1:02d}", caption, sheet) for i, sheet in enumerate(sheets(part))],
            figures=list(drawings(part)),
            sentences=[sentence for each in conditions for sentence in verdict_sentences(part, each)],
            claims=(),
            notes=summary.notes,
        )
        rows = summary.verdicts
        yield Chapter(
            slug(experiment), "", experiment, "", findings, conditions, rows[rows["experiment"] == experiment]
        )


def drawings(summary: Summary) -> Iterator[Drawing]:
    """The figures of every detailed condition and of every sweep, each with what it shows and of how many requests."""
    counts: dict[tuple[str, str], int] = {}
    for each in summary.conditions:
        counts[each.experiment, each.source] = counts.get((each.experiment, each.source), 0) + 1
    for condition in summary.conditions:
        if counts[condition.experiment, condition.source] <= DETAILED_MAX:
            yield from _of_condition(summary, condition)
    for sweep in summary.sweeps:
        yield from _of_sweep(summary, sweep)


def _of_condition(summary: Summary, condition: Condition) -> Iterator[Drawing]:
    of = part(summary.means, condition)
    stem = _stem(condition.source, condition.label)
    sample = _sample(condition)
    what = title_of(condition)
    yield Drawing(
        f"{stem}slo_attainment",
        f"SLO attainment by kind of request; {what}; {sample}; bars: mean and {CONFIDENCE:.0%} interval over seeds.",
        lambda: slo_attainment(of),
    )
    for kind in KINDS:
        latencies: list[Latency] = [each for each in ("ttft_ns", "e2e_ns") if has(of, kind, f"{each}_p50")]
        if latencies:
            panels = [(kind, each) for each in latencies]
            yield Drawing(
                f"{stem}latency_cdf-{kind}",
                f"Latency CDF of {kind} requests, as a share of the offered; {what}; {sample}.",
                partial(latency_cdf, condition.arms, panels),
            )
    baseline, *others = condition.arms
    for pair in [[baseline, other] for other in others] or [[baseline]]:
        runs = {name: condition.arms[name][0] for name in pair}
        seed = next(iter(runs.values())).manifest.seed
        yield Drawing(
            f"{stem}timeline-{slug(pair[-1])}",
            f"Requests in time, at most 30 of them: {' and '.join(pair)}; {what}; seed {seed}.",
            partial(timeline, runs),
        )


def _of_sweep(summary: Summary, sweep: Sweep) -> Iterator[Drawing]:
    of = pd.concat([part(summary.means, each) for each in sweep.conditions])
    rates = sorted({each.rate for each in sweep.conditions if each.rate is not None})
    for kind in KINDS:
        column = "ttft_ns" if has(of, kind, "ttft_ns_p50") else "e2e_ns"
        parts = [f"{column}_{name}" for name in ("p50", "p95", "p99") if has(of, kind, f"{column}_{name}")]
        if parts:
            label = f"; {sweep.label}" if sweep.label else ""
            yield Drawing(
                f"{_stem(sweep.source, sweep.label)}latency_rate-{kind}",
                f"Latency of {kind} requests against offered load, {rates[0]:g} to {rates[-1]:g} req/s in {len(rates)} "
                f"steps ({sweep.source}){label}; bands: {CONFIDENCE:.0%} intervals over seeds; rings: saturation points.",
                partial(latency_rate, of, sweep.points, [(kind, name) for name in parts]),
            )


def _sample(condition: Condition) -> str:
    """How many seeds and requests a figure rests on."""
    runs = [run for arm in condition.arms.values() for run in arm]
    requests = sum(run.manifest.outputs["requests.parquet"].rows or 0 for run in runs)
    return f"{len({run.manifest.seed for run in runs})} seeds, {requests:,} requests in {len(runs)} runs"


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


def _stem(source: str, label: str) -> str:
    """What the names of a condition's figures begin with."""
    return "".join(f"{slug(each)}-" for each in ("" if source == "simulation" else source, label) if each)


def _plain(text: str) -> str:
    """Text as it is: a bracket is not markup."""
    return text.replace("[", r"\[")
