"""``sage trace``: bring a trace in, look at it, or make one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sage_bench.loads.fits import load_fit
from sage_bench.traces import formats, importer
from sage_bench.traces.statistics import TraceStatistics, statistics
from sage_bench.traces.synth import synth_load, write_load
from sage_core.errors import ConfigError

app = typer.Typer(help="Bring a request trace in, look at it, or make one.", no_args_is_help=True)

FORMATS = ("azure2023", "mooncake", "burstgpt", "csv")


@app.command("import")
def import_(
    source_format: Annotated[str, typer.Argument(metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The file as published.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Parquet file to write.")],
    kind: Annotated[
        str | None, typer.Option(help="chat, generation or embedding: what every row is (azure2023, mooncake, csv).")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="csv: name=column pairs, as in arrival_s=t,prompt_tokens=in,output_tokens=out,kind=k,session_id=s."
        ),
    ] = None,
    time_unit: Annotated[str, typer.Option(help="csv: s, ms, us, ns, or iso for dates.")] = "s",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave broken lines out and count them.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite DST.")] = False,
) -> None:
    """Convert a public trace into the trace schema, with provenance."""
    chosen = _format(source_format, kind, columns, time_unit)
    console = Console()
    with console.status(f"reading {source.name}"):
        report = importer.import_trace(source, destination, source_format, chosen, skip_bad=skip_bad, overwrite=force)
    console.print(
        f"{destination}: {report.rows:,} requests; broken lines skipped: {report.rows_skipped:,}; "
        f"out of order and sorted: {report.rows_reordered:,}",
        highlight=False,
        soft_wrap=True,
    )
    for message in report.skipped_lines:
        console.print(f"  skipped {message}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(metavar="FILE", help="A trace in Parquet.")]) -> None:
    """Check every row of a trace and print what it is like."""
    console = Console()
    with console.status(f"reading {path.name}"):
        figures = statistics(path)
    for table in _tables(path, figures):
        console.print(table)


@app.command()
def synth(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Parquet file to write.")],
    rate: Annotated[float | None, typer.Option(help="Requests/s in all; default: as the fitted trace.")] = None,
    requests: Annotated[int | None, typer.Option(help="Stop after so many requests.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    embedding_share: Annotated[float, typer.Option(help="Fraction of embedding requests.")] = 0.0,
    fit: Annotated[str, typer.Option(help="Fitted trace to imitate.")] = "azure2023_conv",
    embedding_fit: Annotated[str, typer.Option(help="Fitted trace for embedding lengths.")] = "ragpulse_query",
    poisson: Annotated[
        bool, typer.Option("--poisson", help="Poisson arrivals in place of the fitted process.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same trace.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Overwrite DST.")] = False,
) -> None:
    """Make a trace like a measured one, from its fitted parameters; no file is needed."""
    if requests is None and duration_s is None:
        raise ConfigError("--requests, --duration-s: set at least one, or the trace never ends")
    load = synth_load(seed, rate, requests, duration_s, embedding_share, fit, embedding_fit, poisson=poisson)
    parameters = load_fit(fit)
    metadata = {
        "source": f"synthetic, fitted to {parameters.source}",
        "license": parameters.license,
        "attribution": parameters.attribution,
        "importer": "synth",
        "importer_version": importer.VERSION,
        "fit": fit,
        **({"embedding_fit": embedding_fit} if embedding_share else {}),
        "arrivals": "poisson" if poisson else "fitted",
        "rate": repr(load.rate),
        "seed": str(seed),
    }
    console = Console()
    with console.status(f"writing {destination.name}"):
        rows = write_load(destination, load, metadata, overwrite=force)
    console.print(
        f"{destination}: {rows:,} requests at {load.rate:.3f} requests/s, like {parameters.source}",
        highlight=False,
        soft_wrap=True,
    )


def _format(name: str, kind: str | None, columns: str | None, time_unit: str) -> formats.Format:
    if name not in FORMATS:
        raise ConfigError(f"FORMAT: expected one of {', '.join(FORMATS)}, got {name!r}")
    if name != "csv" and (columns is not None or time_unit != "s"):
        raise ConfigError(
            f"--columns, --time-unit: only the format csv takes them, {name} has columns and units of its own"
        )
    if name == "burstgpt":
        if kind is not None:
            raise ConfigError("--kind: burstgpt says the kind of each row itself; leave --kind out")
        return formats.burstgpt()
    if name == "azure2023":
        return formats.azure2023(kind or "chat")
    if name == "mooncake":
        return formats.mooncake(kind or "generation")
    if columns is None:
        raise ConfigError(
            "--columns: the format csv needs to know which column is which, as in arrival_s=t,prompt_tokens=in"
        )
    return formats.generic_csv(_pairs(columns), time_unit, kind or "chat")


def _pairs(columns: str) -> dict[str, str]:
    pairs = {}
    for pair in columns.split(","):
        name, equals, column = pair.partition("=")
        if not equals or not name.strip() or not column.strip() or name.strip() in pairs:
            raise ConfigError(
                f"--columns: expected name=column pairs, each name once, separated by commas; got {pair!r}"
            )
        pairs[name.strip()] = column.strip()
    return pairs


def _tables(path: Path, figures: TraceStatistics) -> list[Table]:
    volume = Table(title=str(path), title_justify="left", show_header=False)
    volume.add_column(style="bold")
    volume.add_column(overflow="fold")  # a checksum is no use cut short
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in figures.rows_of.items())
    rows = {
        "requests": f"{figures.rows:,} ({kinds})",
        "duration": f"{figures.duration_s:,.1f} s",
        "mean rate": f"{figures.rate_mean:.4g} requests/s",
        "CV of gaps": _against_poisson(figures.gap_cv, 3),
        "Fano factor, 10 s": _against_poisson(figures.fano_10s, 2),
        "with a prefix": f"{figures.with_prefix:,}",
        "SHA-256": figures.sha256,
        **dict(figures.metadata),
    }
    for name, value in rows.items():
        volume.add_row(name, value)
    lengths = Table(title="lengths in tokens", title_justify="left")
    lengths.add_column("")
    for name in figures.lengths.prompt_tokens:
        lengths.add_column(name, justify="right")
    of = {"": figures.lengths} if len(figures.lengths_of) == 1 else {"": figures.lengths, **figures.lengths_of}
    for kind, columns in of.items():
        lengths.add_row(f"prompt {kind}".strip(), *(f"{value:,.0f}" for value in columns.prompt_tokens.values()))
        lengths.add_row(f"output {kind}".strip(), *(f"{value:,.0f}" for value in columns.output_tokens.values()))
    return [volume, lengths]


def _against_poisson(value: float, digits: int) -> str:
    return "not defined, too short" if math.isnan(value) else f"{value:.{digits}f} (Poisson: 1)"
