"""``sage validate``: a measured run replayed through the simulator, and the errors of the simulation.

What was measured is either a run of ours (``RUN``: its folder says everything) or a file of requests that an engine
served (``--measured``, with the engine's settings).
"""

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
    context: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A live run's folder: results/<experiment>/<run id>; or --measured."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="With RUN: what its simulation should have otherwise, as in cluster.devices.0.llm.profile=mine.yaml.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN2", help="With RUN: a second live run of the same load; the noise between the two."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured requests, Parquet (docs/validate.md has the columns).")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="With --measured: a shipped profile's name, or the path of a .yaml file; needed."
        ),
    ] = None,
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
        typer.Option(
            metavar="DIR", help="Where the files go; by default results/validate/<name of RUN or of the file>."
        ),
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw the overlays too, as PDF and PNG.")] = True,
    fail_above: Annotated[
        float | None,
        typer.Option(
            metavar="PCT",
            help="Exit with 9 if the mean E2E error is larger, either way; with RUN, that of any kind of request.",
        ),
    ] = None,
) -> None:
    """Replay a measured run and report the errors: mean, p50, p95, p99 of TTFT, TPOT, E2E (and queue time, with RUN)."""
    if fail_above is not None and not fail_above >= 0:
        raise ConfigError(f"--fail-above: expected per cent from 0, got {fail_above}")
    if run is not None:
        _only_of_runs(context)
        _of_run(run, overrides or [], against, out, figures, fail_above)
        return
    if measured is None:
        raise ConfigError("RUN, --measured: expected a live run's folder, or a file of measured requests")
    if against is not None:
        raise ConfigError("--against: a second run is for RUN; a measured file has none")
    if profile is None:
        raise ConfigError("--profile: needed with --measured; `sage profile list` names those that are shipped")
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


def _of_run(
    run: Path, overrides: list[str], against: Path | None, out: Path | None, figures: bool, fail_above: float | None
) -> None:
    from sage_bench.cli.validate_run import show_run
    from sage_bench.figures.run_fidelity import run_overlay
    from sage_bench.validate import live

    folder = out or Path("results/validate") / run.resolve().name
    fidelity = live.validate_run(run, folder, overrides, against)
    second = None if against is None else folder / live.AGAINST
    drawn = []
    for kind in fidelity.kinds if figures else ():
        drawn += save(run_overlay(folder / live.REQUESTS, kind, second), folder / f"{live.FIGURE}{kind}")
    show_run(fidelity, Console(highlight=False, width=WIDTH))
    files = [live.FIDELITY, live.REQUESTS, *([] if second is None else [live.AGAINST]), *(path.name for path in drawn)]
    print(f"{folder}: {', '.join(files)}")
    for kind, latencies in fidelity.kinds.items():
        error_pct = latencies["e2e"].mean.error_pct
        if fail_above is not None and not (error_pct is not None and abs(error_pct) <= fail_above):
            raise FidelityError(
                f"mean E2E error of {kind} requests is {error_pct:+.2f} %, more than the {fail_above:g} % of --fail-above"
            )


def _only_of_runs(context: typer.Context) -> None:
    """Refuse what only a measured file needs: a run says it itself."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in ("run", "overrides", "against", "out", "figures", "fail_above"):
            raise ConfigError(
                f"{parameter.opts[0]}: is for --measured; RUN says it itself, and KEY=VALUE after it changes its simulation"
            )


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
