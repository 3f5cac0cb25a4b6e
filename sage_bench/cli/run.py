"""``sage run``: Hydra composes the configuration, :mod:`sage_bench.run` runs it."""

from __future__ import annotations

import os
import sys
from typing import Final

import hydra
import typer
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from sage_bench.run import RunResult, run
from sage_core.errors import ConfigError
from sage_core.plane import ControlPlane

CONTEXT: Final = {"allow_extra_args": True, "ignore_unknown_options": True}


def command(context: typer.Context) -> None:
    """Simulate: `sage run [group=choice ...] [key=value ...] [--multirun]`. `sage run --help` lists the groups."""
    # Hydra reads sys.argv, and prints its own errors unless it is told to raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *context.args]
    sys.path.insert(0, os.getcwd())  # a user's own policy or load, by _target_
    try:
        _hydra_main()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"config: {_first_lines(str(error))}") from error


@hydra.main(version_base="1.3", config_path="pkg://sage_bench.conf", config_name="config")
def _hydra_main(composed: DictConfig) -> None:
    console = Console(stderr=True, highlight=False)
    overrides = list(HydraConfig.get().overrides.task)
    with console.status("composing") as status:

        def tick(now: int, plane: ControlPlane) -> None:
            counts = plane.counts
            status.update(f"{now / 1e9:,.0f} s simulated, {counts.arrived:,} requests, {plane.live:,} live")

        result = run(composed, overrides, tick if console.is_terminal else None)
    _tell(result, console)
    if result.finish.interrupted:
        raise KeyboardInterrupt


def _tell(result: RunResult, console: Console) -> None:
    for warning in result.warnings:
        console.print(f"[yellow]note:[/yellow] {warning}")
    counts, finish = result.counts, result.finish
    state = "interrupted, partial" if finish.interrupted else "done"
    print(
        f"{result.folder}: {state}; {counts.arrived:,} requests in {finish.now / 1e9:,.1f} simulated s, "
        f"{counts.responded:,} responded, {counts.rejected:,} rejected, {counts.cancelled:,} cancelled, "
        f"{counts.failed:,} failed; {finish.total_s:.2f} CPU s; digest {finish.digest.hex()}"
    )


def _first_lines(text: str, lines: int = 12) -> str:
    return "\n".join(line for line in text.strip().splitlines()[:lines] if line.strip())
