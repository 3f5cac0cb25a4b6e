"""``sage policy list|show``: what decides, and with which parameters."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sage_core.errors import ConfigError
from sage_core.policy import native_twin
from sage_policies.presets import PRESETS, preset

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """The named policies."""
    table = Table("policy", "what it does", box=None)
    for name, make in PRESETS.items():
        table.add_row(name, (inspect.getdoc(make) or "").splitlines()[0])
    Console().print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A name from `sage policy list`.")]) -> None:
    """Parts and parameters of a policy; each parameter is an override, e.g. policy.reserve=0.2."""
    if name not in PRESETS:
        raise ConfigError(f"policy: unknown policy {name!r}; known: {', '.join(PRESETS)}")
    policy = preset(name)
    table = Table("part", "is", "runs", box=None)
    for part in ("admit", "order", "route", "limit", "predict"):
        value = getattr(policy, part)
        if value is None:
            table.add_row(part, "everything", "")
            continue
        twin = "" if part == "predict" else "native" if native_twin(value) is not value else "Python"
        table.add_row(part, type(value).__name__, twin)
    console = Console()
    console.print(table)
    parameters = Table("parameter", "default", box=None)
    for parameter in inspect.signature(PRESETS[name]).parameters.values():
        parameters.add_row(parameter.name, repr(parameter.default))
    console.print(parameters)
