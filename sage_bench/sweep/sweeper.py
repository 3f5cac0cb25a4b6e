"""The sweeper of ``sage run --multirun``: every combination of values, as Hydra's own, for sweeps of a thousand points.

What Hydra's (``hydra/sweeper=basic``) lacks: points that are done are not run again, a failed point is listed at the end, people
see how far it is, nothing of a point stays in memory, and the check before the first point composes each value once and not
each combination.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from sage_bench.config import checked
from sage_bench.sweep.journal import Entry, Reader
from sage_bench.sweep.loader import PointLoader
from sage_bench.sweep.point import Point, this_process
from sage_bench.sweep.progress import Progress
from sage_bench.sweep.resume import RESUMES, Resume
from sage_bench.sweep.workers import begin_worker, ended_in_order
from sage_core.errors import ConfigError, EngineError, SageError

PLUGIN: Final = "hydra_plugins.sage_sweeper"
"""Hydra takes sweepers from this namespace only; see ``sage_bench.launcher_ray``."""


class SageSweeper(Sweeper):
    """resume: what an earlier result must share with a point to stand for it (``code``, ``config`` or ``never``)."""

    __module__ = PLUGIN
    say: ClassVar[Callable[[str], None]] = print
    note: ClassVar[Callable[[str], None]] = print
    """Where the lines and notes of points go; the command line sets them."""

    def __init__(self, params: dict[str, str] | None = None, resume: Resume = "code") -> None:
        self._params = params or {}
        if resume not in RESUMES:
            raise ConfigError(f"hydra.sweeper.resume: expected one of {', '.join(RESUMES)}, got {resume!r}")
        self._resume: Resume = resume

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Remember what launchers will need; ``task_function`` is not it, because a sweep brings its own."""
        self._context, self._config = hydra_context, config

    def sweep(self, arguments: list[str]) -> list[Entry]:
        """Run every point that has no result; what became of those, in order. Raises the first failure, and
        KeyboardInterrupt."""
        loader = self._context.config_loader
        grid = [f"{key}={values}" for key, values in self._params.items()]
        overrides = OverridesParser.create(config_loader=loader).parse_overrides([*grid, *arguments])
        points: list[list[str]] = BasicSweeper.split_arguments(overrides, None)[0]
        several = (each for each in zip(*points, strict=True) if len(set(each)) > 1)
        varying = frozenset(each[0].partition("=")[0] for each in several)
        points_loader = PointLoader(loader)
        for point in _each_value_once(points):
            points_loader.composed(self._config, point)
        reader = Reader(Path(str(self._config.hydra.sweep.dir)))
        try:
            return self._swept(
                reader, points, Point(reader.journal, self._resume, varying, this_process()), points_loader
            )
        finally:
            reader.close()

    def _swept(self, reader: Reader, points: list[list[str]], point: Point, points_loader: PointLoader) -> list[Entry]:
        callbacks = Callbacks()
        callbacks.callbacks = [*self._context.callbacks.callbacks, _Slim()]
        launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=points_loader, callbacks=callbacks),
            task_function=point,
            config=self._config,
        )
        returns: Sequence[Any] = ()
        progress = Progress(reader, len(points), type(self).say, type(self).note, same_code=self._resume == "code")
        workers = type(launcher).__name__ == "JoblibLauncher"
        if workers:
            launcher.joblib["initializer"] = begin_worker
        try:
            with progress, ended_in_order(reader, progress) if workers else contextlib.nullcontext():
                if left := self._left(points, point, points_loader):
                    returns = launcher.launch(left, initial_job_idx=0)
        except BaseException as error:
            progress.summary()
            if any("joblib.externals.loky" in each.__module__ for each in type(error).__mro__):
                raise EngineError(
                    f"hydra.launcher: a worker process was killed ({str(error).splitlines()[0]}), for want of memory perhaps; "
                    "hydra.launcher.n_jobs=1 needs less, and the same command goes on where this one stopped"
                ) from error
            raise
        progress.summary()
        entries: list[Entry] = [each.return_value for each in returns]
        if any(entry.state in ("interrupted", "not begun") for entry in entries):
            raise KeyboardInterrupt
        _raise_first(entries, len(points))
        return entries

    def _left(self, points: list[list[str]], point: Point, points_loader: PointLoader) -> list[list[str]]:
        """Points without a result. A point asks again when its turn comes; this spares those that need not have one what a
        launcher does for each."""
        folder = Path(str(self._config.hydra.sweep.dir))
        if self._resume == "never" or not any(folder.glob("*/manifest.json")):
            return points
        left = []
        for number, each in enumerate(points):
            try:
                composed = points_loader.composed(self._config, each)
                with open_dict(composed):
                    del composed["hydra"]
                there = point.found(*checked(composed)).folder is not None
            except (SageError, HydraException, OmegaConfBaseException):
                there = False  # for the point to tell
            if there:
                point.journal.write(Entry(job=number, name=point.named(each), state="skipped"))
            else:
                left.append(each)
        return left


class _Slim(Callback):
    """A point returns what became of it and not its configuration, which the sweep would keep, twice, for every point."""

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        job_return.cfg = job_return.hydra_cfg = None


def _each_value_once(points: Sequence[list[str]]) -> list[list[str]]:
    """Points in which every value of every key occurs: the first, and the first for each value that it does not have."""
    seen: set[str] = set()
    chosen = []
    for point in points:
        if not seen.issuperset(point):
            seen.update(point)
            chosen.append(point)
    return chosen


def _raise_first(entries: Sequence[Entry], points: int) -> None:
    failed = [entry for entry in entries if entry.state == "failed"]
    if not failed:
        return
    first = failed[0]
    kinds = {kind.exit_code: kind for kind in SageError.__subclasses__()}
    raise kinds.get(first.exit_code, SageError)(
        f"{len(failed):,} of {points:,} points failed; the first, '{first.name}': {first.why}"
    )


def register() -> None:
    """Make it known to Hydra."""
    sys.modules[PLUGIN] = sys.modules[__name__]
    Plugins.instance().register(SageSweeper)
