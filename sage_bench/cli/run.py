"""``sage run``: Hydra composes the configuration, :mod:`sage_bench.run` runs it."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from pathlib import Path
from typing import Final

import hydra
import typer
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from sage_bench import launcher_ray
from sage_bench.cli.leave import leave
from sage_bench.config import told_by_hydra
from sage_bench.live import LiveResult, run_live
from sage_bench.results.writer import output_error
from sage_bench.run import RunResult, run
from sage_bench.sweep import sweeper
from sage_bench.sweep.outcome import line_of, notes_of
from sage_core.errors import ConfigError, SageError
from sage_core.native_plane import Plane

CONTEXT: Final = {"allow_extra_args": True, "ignore_unknown_options": True}

FLAGS: Final = {"--rerun": "hydra.sweeper.resume=never"}
"""Flags of ours, and the overrides that they stand for."""


def command(context: typer.Context) -> None:
    """Simulate: `sage run GROUP=CHOICE ... key=value ... --multirun`. `sage run --help` lists groups and keys."""
    # Hydra reads sys.argv, and prints its own errors unless it is told to raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    arguments = [FLAGS.get(each, each) for each in context.args]
    if not any(each.startswith("hydra/sweeper=") for each in arguments):
        arguments.insert(0, "hydra/sweeper=sage")  # its parser takes no override behind a flag with a value
    # Its parser refuses an override after a flag; the order means nothing to us.
    sys.argv = [sys.argv[0], *sorted(arguments, key=lambda arg: arg not in ("-m", "--multirun"))]
    launcher_ray.register()
    sweeper.register()
    sweeper.SageSweeper.say, sweeper.SageSweeper.note = staticmethod(_say), staticmethod(_note)
    try:
        _hydra_main()
    except SageError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"config: {told_by_hydra(error)}") from error
    except (ValueError, OSError) as error:
        if _ours(error) or isinstance(error, BrokenPipeError):
            raise
        if isinstance(error, OSError):  # the folder of a sweep, which Hydra makes
            raise output_error(Path(error.filename or "."), error) from error
        raise ConfigError(f"config: {error}") from error


@hydra.main(version_base="1.3", config_path="pkg://sage_bench.conf", config_name="config")
def _hydra_main(composed: DictConfig) -> None:
    _job(composed)


def _job(composed: DictConfig) -> None:
    console = Console(stderr=True, highlight=False)
    # As written: an interpolation in them is for the configuration to resolve.
    overrides: list[str] = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[assignment]
    with console.status("composing") as status:

        def tick(now: int, plane: Plane) -> None:
            counts = plane.counts
            status.update(f"{now / 1e9:,.0f} s simulated, {counts.arrived:,} requests, {plane.live:,} live")

        result: RunResult | LiveResult
        try:
            if OmegaConf.select(composed, "driver.kind") == "live":
                result = run_live(composed, overrides, status.update)
            else:
                result = run(composed, overrides, tick if console.is_terminal else None)
        except SageError as error:
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                raise  # at the end of the sweep, when Hydra says which overrides it was
            status.stop()
            leave(error)
    for note in notes_of(result):
        _note(note)
    _say(line_of(result))
    if result.interrupted:
        raise KeyboardInterrupt


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError as error:  # nobody reads it, or there is no room for it: the results are on disk all the same
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what is still buffered must not fail again at exit
        if not isinstance(error, BrokenPipeError):
            _note(f"standard output: {error.strerror}; {line}")


@functools.cache  # the points of a sweep would all say the same
def _note(text: str) -> None:
    Console(stderr=True, highlight=False).print(f"[yellow]note:[/yellow] {escape(text)}", soft_wrap=True)


def _ours(error: BaseException) -> bool:
    """Whether it came up inside a run; if not, Hydra met it while composing."""
    return any(frame.f_code is _job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))
