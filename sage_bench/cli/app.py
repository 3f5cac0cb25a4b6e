"""The ``sage`` command: one Typer app; each command is a module beside this one, imported when it is asked for.

What plots imports Matplotlib and what tests imports SciPy, a second or more of CPU: an engine or a gateway that starts
must not wait for either.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import typer

HELP: Final = "Simulate and measure control planes for LLM and embedding serving."
EPILOG: Final = (
    "Exit codes: 0 done, 2 configuration, 3 data file, 4 policy, 5 backend, 6 our defect, 7 replay diverged, "
    "8 output cannot be written, 9 not as true to a measured run as asked, 10 engine not reachable, 130 interrupted."
)


def _single(app: typer.Typer, name: str, module: Any) -> None:
    app.command(name)(module.command)


def _run(app: typer.Typer, name: str, module: Any) -> None:
    app.command(name, context_settings=module.CONTEXT, add_help_option=False)(module.command)


def _group(help_: str) -> Callable[[typer.Typer, str, Any], None]:
    return lambda app, name, module: app.add_typer(module.app, name=name, help=help_)


COMMANDS: Final[Mapping[str, Callable[[typer.Typer, str, Any], None]]] = {
    "run": _run,
    "report": _single,
    "replay": _single,
    "validate": _single,
    "whatif": _single,
    "calibrate": _single,
    "hetero": _single,
    "paper": _single,
    "tune": _single,
    "timeline": _single,
    "doctor": _single,
    "gateway": _group("Serve the OpenAI API from engines, the control plane in between."),
    "llm": _group("LLM engines: serve one, real or emulated."),
    "embed": _group("Embedding engines: serve one."),
    "trace": _group("Import, inspect and synthesise traces."),
    "profile": _group("Calibrated profiles: list and show."),
    "policy": _group("Policies: list and show."),
    "pipeline": _group("Declared pipelines: list, check and show."),
    "index": _group("Vector indexes of documents: build one, ask it, look at it."),
    "app": _single,
    "cluster": _group("Nodes and jobs: plan a placement, start and stop services."),
}
"""Name, which is that of the module, and how it is added."""

MODULES: Final[Mapping[str, str]] = {"app": "application"}
"""Where it is another."""


def app_of(asked: str | None) -> typer.Typer:
    """The app with the command ``asked``; with all of them where that is none."""
    app = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP, epilog=EPILOG
    )
    app.callback()(lambda: None)  # with a single command Typer would take its name for an argument
    for name in [asked] if asked is not None and asked in COMMANDS else COMMANDS:
        COMMANDS[name](app, name, importlib.import_module(f"sage_bench.cli.{MODULES.get(name, name)}"))
    return app
