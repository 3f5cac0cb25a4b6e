"""``sage paper``: every experiment of the paper, from its runs to its tables, figures and sentences."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import typer
from rich.console import Console

from sage_core.errors import ConfigError

if TYPE_CHECKING:
    from sage_bench.studies.study import Study


class SizeOption(StrEnum):
    """See :data:`sage_bench.studies.study.Size`."""

    FULL = "full"
    QUICK = "quick"
    LIVE = "live"


SAGE_RUN: Final = (sys.executable, "-m", "sage_bench", "run")
"""In a process of its own: the command that a reader would give."""

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C."""

RESULTS: Final = {
    SizeOption.FULL: Path("results/paper"),
    SizeOption.QUICK: Path("results/paper-quick"),
    SizeOption.LIVE: Path("results/paper"),
}


class Sweep(NamedTuple):
    """One of a study's, which may read what those before it wrote."""

    study: str
    title: str
    arguments: list[str]

    @property
    def line(self) -> str:
        return f"{self.title}: sage run {' '.join(self.arguments)}"

    def check(self, code: int) -> None:
        """Raises ConfigError where it failed, KeyboardInterrupt where it was interrupted."""
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise ConfigError(
                f"sage run {' '.join(self.arguments)} ended with exit code {code}; what it said stands above"
            )


def command(
    size: Annotated[
        SizeOption, typer.Option(help="full, quick, or live: a reduced one on emulated engines.")
    ] = SizeOption.FULL,
    only: Annotated[list[str] | None, typer.Option(help="This study alone; may be given again.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Where runs and report go; by default results/paper, results/paper-quick.")
    ] = None,
    run: Annotated[bool, typer.Option(help="Run what is missing; --no-run: report what is there.")] = True,
) -> None:
    """Run the paper's experiments (points that are done are not run again) and write the report of them."""
    from sage_bench.publish.publish import publish
    from sage_bench.studies.registry import STUDIES
    from sage_bench.studies.study import one_of

    console = Console(highlight=False)
    studies = [one_of(STUDIES, name) for name in only] if only else list(STUDIES)
    folder = results or RESULTS[size]
    if run:
        if size is SizeOption.LIVE:
            _simulated_first(studies, folder, only or (), results)
        commands = [(study.name, arguments) for study in studies for arguments in study.commands(size.value)]
        sweeps = [
            Sweep(study, f"[{i + 1}/{len(commands)}] {study}", [*arguments, f"results={folder}"])
            for i, (study, arguments) in enumerate(commands)
        ]
        if size is SizeOption.QUICK:
            run_beside(sweeps, at_once=len(os.sched_getaffinity(0)))
        else:
            launcher = ["hydra/launcher=joblib"] if size is SizeOption.FULL else []
            for each in sweeps:
                console.print(each.line, markup=False, soft_wrap=True)
                each.check(ended([*SAGE_RUN, *each.arguments, *launcher]))
    for path in publish(studies, folder, console, system=not only):
        console.print(str(path), soft_wrap=True, markup=False)


def run_beside(sweeps: Sequence[Sweep], at_once: int) -> None:
    """Sweeps of a few short points, whose time goes into starting: ``at_once`` studies side by side, their lines marked by study. After
    a failure or Ctrl-C none is begun and those that run are left to end. Raises as :meth:`Sweep.check`, and KeyboardInterrupt."""
    stopped = threading.Event()
    one_line = threading.Lock()

    def say(text: str) -> None:
        with one_line:
            print(text, flush=True)

    def study(sweeps: list[Sweep]) -> None:
        try:
            for each in sweeps:
                if stopped.is_set():
                    return
                say(each.line)
                words = [*SAGE_RUN, *each.arguments]
                with subprocess.Popen(
                    words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
                ) as process:
                    for told in process.stdout or ():
                        say(f"{each.study}: {told.rstrip()}")
                each.check(process.returncode)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(at_once) as pool:
        studies = [pool.submit(study, list(of)) for _, of in groupby(sweeps, lambda each: each.study)]
        try:
            failed = [error for error in (each.exception() for each in studies) if error is not None]
        except KeyboardInterrupt:  # it reached the sweeps too; leaving the pool waits for them
            stopped.set()
            raise
    for error in failed:
        if not isinstance(error, ConfigError):
            raise error
    if failed:
        raise ConfigError("\n".join(map(str, failed)))


def ended(words: Sequence[str]) -> int:
    """Exit code of a command. Ctrl-C reaches it as it reaches us: it is left to end in order, then KeyboardInterrupt is raised."""
    interrupted = False
    with subprocess.Popen(words) as process:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode


def _simulated_first(studies: Sequence[Study], folder: Path, only: Sequence[str], results: Path | None) -> None:
    """ConfigError where a study lacks the simulated runs that its report needs: it is known before live runs take their hours."""
    missing = {study.name: name for study in studies for name in study.experiments if not _is_simulated(folder, name)}
    if missing:
        options = [f"--only {name}" for name in missing] if only else []
        options += [f"--results {results}"] if results else []
        raise ConfigError(
            f"--size live: {folder} has no simulated runs of {', '.join(missing)} (such as experiment {next(iter(missing.values()))}), which live "
            f"runs stand beside; run `{' '.join(['sage paper', *options])}` first"
        )


def _is_simulated(folder: Path, experiment: str) -> bool:
    """Whether there is a run that counts and is not the simulated twin of a live one."""
    from sage_bench.results.manifest import NAME, read_manifest
    from sage_bench.studies.study import folder_of
    from sage_bench.studies.twins import TWIN

    found = (read_manifest(path) for path in (folder / folder_of(experiment)).rglob(NAME))
    return any(
        m.source == "simulation" and m.status == "complete" and not m.invalid and TWIN not in m.overrides for m in found
    )
