"""``sage timeline RUN``: a run as a trace that Perfetto opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def command(
    run: Annotated[Path, typer.Argument(help="A run's folder: results/<experiment>/<run id>.")],
    out: Annotated[Path, typer.Option(help="File to write; .gz compresses it.")] = Path("trace.json.gz"),
    requests: Annotated[int, typer.Option(help="At most so many requests, the first of the stretch.")] = 2000,
    start: Annotated[float, typer.Option("--from", help="Begin of the stretch, in seconds of the run.")] = 0.0,
    stop: Annotated[float | None, typer.Option("--to", help="Its end; by default that of the run.")] = None,
) -> None:
    """Write a run's requests, tasks and queues as a Chrome trace, for ui.perfetto.dev or chrome://tracing."""
    # pandas takes a second, which no other command should pay for.
    from sage_bench.publish.chrome_trace import export
    from sage_bench.results.reader import Run
    from sage_core.units import SECOND

    written = export(Run(run), out, requests=requests, start_s=start, stop_s=stop)
    tasks = (
        "no tasks, which the run did not keep (record.tasks=false),"
        if written.tasks is None
        else f"{written.tasks:,} tasks"
    )
    Console(highlight=False).print(
        f"{out}: {written.requests:,} requests and {tasks} from {written.start_ns / SECOND:.3f} s to "
        f"{written.stop_ns / SECOND:.3f} s, {written.events:,} events; open it at ui.perfetto.dev or chrome://tracing",
        soft_wrap=True,
        markup=False,
    )
