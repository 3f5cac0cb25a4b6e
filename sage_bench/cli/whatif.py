"""``sage whatif RUN policy=...``: what another policy or cluster would have made of a recorded load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sage_bench.whatif import Arm, WhatIf


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder: results/<experiment>/<run id>.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="What to change, as for `sage run`: policy=fifo, or policy=fifo,hybrid for two arms, cluster.devices.0.count=2. "
            "Without any the run is simulated as it was.",
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all numbers there too.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The simulated runs go to DIR/whatif; by default DIR is the folder of RUN."),
    ] = None,
) -> None:
    """Simulate RUN's own requests as it was and with changes; print the differences, their intervals and verdicts.

    A gateway's record says nothing of its engines' speed: describe them with cluster=... or cluster.devices=[...].
    """
    # pandas and scipy take a second, which no other command should pay for.
    import msgspec
    from rich.console import Console

    from sage_bench.report import WIDTH
    from sage_bench.results.writer import output_error
    from sage_bench.whatif import what_if

    console = Console(highlight=False, width=WIDTH)
    with Console(stderr=True).status("simulating"):
        found = what_if(run, overrides or [], out)
    if json is not None:
        try:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
        except OSError as error:
            raise output_error(json, error) from error
    show(found, console)


def show(found: WhatIf, console: Console) -> None:
    """Print a table for every arm, or one of the base alone, and the notes."""
    from rich.markup import escape

    from sage_bench.figures.style import SOURCES

    console.print(
        f"{found.run}: {found.requests:,} counted requests, {SOURCES[found.source]}; simulated again in {found.base}"
        + (": every decision the same" if found.repeated else ""),
        soft_wrap=True,
        markup=False,
    )
    arms: list[Arm | None] = [*found.arms] or [None]
    for arm in arms:
        _show_arm(found, arm, console)
    if any(row.doubtful for arm in found.arms for row in arm.rows):
        console.print(
            "? smaller than the simulation's own error against the recorded run: not to be trusted.", soft_wrap=True
        )
    if found.arms:
        console.print(
            f"±: 95 %, from {found.block_s:.3g} s blocks of time resampled; -: no significant difference, the number of verdicts "
            "considered. Throughput, goodput and cost are one number of a run each and have no interval.",
            soft_wrap=True,
        )
    for note in found.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)


def _show_arm(found: WhatIf, arm: Arm | None, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from sage_bench.metrics.definitions import METRICS

    if arm is not None:
        title = f"what if {' '.join(arm.overrides)} (policy {arm.policy}): {arm.folder}"
        console.print(f"\n{title}", soft_wrap=True, markup=False)
    # Where the simulation repeats the recorded run there is nothing to tell apart.
    recorded = ["recorded"] if found.repeated else ["recorded", "simulated", "sim. error"]
    headings = ["", *recorded, *([] if arm is None else ["what if", "difference", "verdict"])]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "verdict") else "right", no_wrap=True)
    for i, row in enumerate(found.rows):
        metric = METRICS[row.metric]

        def cell(value: float | None, sign: str = "", scale: float = metric.scale) -> str:
            return "" if value is None else _number(value / scale, sign)

        name = [*([] if row.kind == "all" else [row.kind]), metric.label, f"({metric.unit})"]
        cells = [" ".join(name), cell(row.recorded)]
        if not found.repeated:
            cells += [cell(row.simulated), "" if row.error_pct is None else f"{row.error_pct:+.1f} %"]
        if arm is not None:
            of = arm.rows[i]
            known = of.low is not None and of.high is not None
            spread = f" ± {cell((of.high - of.low) / 2):<6}" if known else " " * 9  # type: ignore[operator]
            words = "-" if of.verdict == "no significant difference" else of.verdict or ""
            cells += [cell(of.simulated), cell(of.difference, "+") + spread, f"{words}{' ?' if of.doubtful else ''}"]
        last = i + 1 == len(found.rows) or found.rows[i + 1].kind != row.kind
        table.add_row(*cells, end_section=last)
    console.print(table)


def _number(value: float, sign: str) -> str:
    """Three significant digits, and no exponent for what is large."""
    return f"{value:{sign},.0f}" if abs(value) >= 100 else f"{value:{sign}.3g}"
