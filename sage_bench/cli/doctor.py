"""``sage doctor``: what this machine has, what is missing and how to get it. Exit 0 if the main job can run, else 1."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sage_bench.doctor import SHARED_TRACES, Check, Status, examine, healthy

_COLOURS = {Status.OK: "green", Status.MISSING: "bold red", Status.OPTIONAL: "yellow"}


def command(
    results: Annotated[Path, typer.Option(help="Where runs would write.")] = Path("results"),
    traces: Annotated[Path, typer.Option(help="Where recorded traces would be.")] = SHARED_TRACES,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say what this machine has, what is missing and how to get it.

    Exit code 0 if simulations and reports can run; 1 if something they need is missing.
    """
    checks = examine(results, traces)
    if as_json:
        rows = [dataclasses.asdict(check) for check in checks]
        typer.echo(json.dumps({"healthy": healthy(checks), "checks": rows}, indent=2))
    else:
        _print(checks)
    if not healthy(checks):
        raise typer.Exit(1)


def _print(checks: list[Check]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("check", "status", "found"):
        table.add_column(title, overflow="fold")
    for check in checks:
        table.add_row(check.name, f"[{_COLOURS[check.status]}]{check.status}[/]", _plain(check.found))
    console = Console(soft_wrap=True)
    console.print(table)
    for status, heading in ((Status.MISSING, "Missing"), (Status.OPTIONAL, "Optional, not here")):
        lacking = [check for check in checks if check.status is status]
        if lacking:
            console.print(f"\n{heading}:")
            for check in lacking:
                console.print(f"  {check.name}: {_plain(check.advice)}")
    console.print("\nSimulations and reports can run." if healthy(checks) else "\nSimulations cannot run yet.")


def _plain(text: str) -> str:
    """Text as it is: a bracket in a path or version is not markup."""
    return text.replace("[", r"\[")
