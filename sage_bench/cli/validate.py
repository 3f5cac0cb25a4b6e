"""``sage validate``: a measured run replayed through the simulator, and the errors of the simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sage_bench.figures.fidelity import latency_overlay, series_overlay
from sage_bench.figures.style import save
from sage_bench.report import WIDTH
from sage_bench.validate.compare import STATISTICS, Compared
from sage_bench.validate.fidelity import (
    FIDELITY,
    LATENCY_FIGURE,
    REQUESTS,
    SERIES_FIGURE,
    SERIES_FILE,
    Fidelity,
    validate,
)
from sage_bench.validate.setup import BLOCK_SIZE, Asked
from sage_core.errors import ConfigError, FidelityError


def command(
    measured: Annotated[
        Path, typer.Option(metavar="FILE", help="Measured requests, Parquet (docs/validate.md has the columns).")
    ],
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="A shipped profile's name, or the path of a .yaml file.")
    ],
    max_num_seqs: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences in a batch; by default as the file says.")
    ] = None,
    kv_blocks: Annotated[
        int | None, typer.Option(metavar="N", help="KV-cache blocks of a replica; by default as the file says.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Token budget of an iteration (max_num_batched_tokens); by default as the file says, else 2048.",
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(metavar="N", help="Tokens of a KV-cache block.")] = BLOCK_SIZE,
    data_parallel: Annotated[
        int | None, typer.Option(metavar="N", help="Replicas; by default as the file says, else 1.")
    ] = None,
    scheduling: Annotated[
        Literal["fcfs", "priority"],
        typer.Option(metavar="RULE", help="The engine's queue: fcfs, or priority, which needs a column of that name."),
    ] = "fcfs",
    arrivals: Annotated[
        Literal["queued", "arrival"],
        typer.Option(
            metavar="WHICH",
            help="Instant that requests reach the engine and latencies count from: queued_s or arrival_s.",
        ),
    ] = "queued",
    prefix_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The trace of these requests, whose hash_ids say which blocks prompts share; by default one that lies beside "
            "the measured file and has its lengths; none for none.",
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Another key of the llm engine's configuration; may be repeated."),
    ] = None,
    timeseries: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured running, waiting and kv_cache_pct over t, Parquet.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the files go; by default results/validate/<measured file's name>."),
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw the overlays too, as PDF and PNG.")] = True,
    fail_above: Annotated[
        float | None, typer.Option(metavar="PCT", help="Exit with 9 if the mean E2E error is larger, either way.")
    ] = None,
) -> None:
    """Replay a measured run and report the errors: mean, p50, p95, p99 of TTFT, TPOT and E2E; load and KV usage over time."""
    if fail_above is not None and not fail_above >= 0:
        raise ConfigError(f"--fail-above: expected per cent from 0, got {fail_above}")
    asked = Asked(
        profile=profile,
        max_num_seqs=max_num_seqs,
        kv_blocks=kv_blocks,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        data_parallel=data_parallel,
        scheduling=scheduling,
        arrivals=arrivals,
        prefix_trace=prefix_trace,
        engine=_pairs(engine or []),
    )
    folder = out or Path("results/validate") / measured.stem
    fidelity = validate(measured, asked, folder, timeseries)
    drawn = []
    if figures:
        drawn += save(latency_overlay(folder / REQUESTS), folder / LATENCY_FIGURE)
        if fidelity.series is not None:
            drawn += save(series_overlay(folder / SERIES_FILE), folder / SERIES_FIGURE)
    show(fidelity, Console(highlight=False, width=WIDTH))
    files = [FIDELITY, REQUESTS, *([] if fidelity.series is None else [SERIES_FILE]), *(path.name for path in drawn)]
    print(f"{folder}: {', '.join(files)}")
    error_pct = fidelity.latencies["e2e"].mean.error_pct
    if fail_above is not None and not (error_pct is not None and abs(error_pct) <= fail_above):
        raise FidelityError(f"mean E2E error is {error_pct:+.2f} %, more than the {fail_above:g} % of --fail-above")


def show(fidelity: Fidelity, console: Console) -> None:
    """Print the tables and the notes."""
    console.print(
        f"{fidelity.requests:,} requests, {fidelity.profile}, {fidelity.replicas} "
        f"replica{'s' if fidelity.replicas > 1 else ''}; latencies count from {fidelity.arrivals}_s; "
        f"simulated in {fidelity.cpu_s:.2f} CPU s",
        soft_wrap=True,
        markup=False,
    )
    table = _table("latency", "", "measured", "simulated", "error %")
    for name, each in fidelity.latencies.items():
        unit, scale = ("ms", 1e3) if name == "tpot" else ("s", 1.0)
        for statistic in STATISTICS:
            doubt = " *" if statistic == "p99" and not each.p99_certain else ""
            label = f"{name.upper()} ({unit})" if statistic == "mean" else ""
            table.add_row(label, f"{statistic}{doubt}", *_cells(getattr(each, statistic), scale))
        by_request = "" if each.by_request_mape_pct is None else f"{each.by_request_mape_pct:.2f}"
        table.add_row("", "mean |error| of a request", "", "", by_request, end_section=True)
    table.add_row("makespan (s)", "", *_cells(fidelity.makespan_s, 1.0))
    console.print(table)
    if any(not each.p99_certain for each in fidelity.latencies.values()):
        console.print("* p99 of fewer than 662 samples: the luck of a few requests, not a property of either system.")
    if fidelity.series is not None:
        table = _table("state of the engine", "ticks", "measured", "simulated", "mean |error|", "bias")
        for name, of in fidelity.series.items():
            numbers = (of.measured_mean, of.simulated_mean, of.mean_abs_error)
            table.add_row(name, str(of.ticks), *(f"{number:.2f}" for number in numbers), f"{of.bias:+.2f}")
        console.print(table)
    for warning in fidelity.warnings:
        console.print(f"[yellow]note:[/yellow] {escape(warning)}", soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    return table


def _cells(each: Compared, scale: float) -> tuple[str, str, str]:
    error = "" if each.error_pct is None else f"{each.error_pct:+.2f}"
    return f"{each.measured * scale:.3f}", f"{each.simulated * scale:.3f}", error


def _pairs(options: list[str]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key or key in pairs:
            raise ConfigError(f"--engine: expected KEY=VALUE, each key once, got {option!r}")
        try:
            pairs[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--engine: {option!r}: the value is not YAML; quote it") from error
    return pairs
