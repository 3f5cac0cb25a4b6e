"""One point of a sweep, wherever a launcher runs it: skipped if its result is there, else run, and told in the journal."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sage_bench.config import LiveDriverConfig, RunConfig, checked
from sage_bench.live import LiveResult, run_live
from sage_bench.run import RunResult, planned, run_planned
from sage_bench.sweep.journal import Entry, Journal, State
from sage_bench.sweep.loader import BROKEN
from sage_bench.sweep.outcome import line_of, notes_of
from sage_bench.sweep.resume import Found, Resume, Why, found, held
from sage_core.errors import ConfigError, SageError


def this_process() -> tuple[str, int]:
    """Told apart from all others that results are shared with."""
    return socket.gethostname(), os.getpid()


@dataclass(frozen=True, slots=True)
class Point:
    """The task function of a sweep. varying: keys in which points differ; owner: the process that sweeps."""

    journal: Journal
    resume: Resume
    varying: frozenset[str]
    owner: tuple[str, int]

    def __call__(self, composed: DictConfig) -> Entry:
        """Run or skip; errors are told and not raised. KeyboardInterrupt for Ctrl-C in the process that sweeps."""
        hydra = HydraConfig.get()
        overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        job, name = int(hydra.job.num), self.named(overrides)
        if self.journal.stopped():
            return Entry(job=job, name=name, state="not begun")
        if this_process() != self.owner:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a run notices it; between runs it is the owner's to act on
        started = time.perf_counter()

        def ended(state: State, **about: Any) -> Entry:
            entry = Entry(job=job, name=name, state=state, wall_s=time.perf_counter() - started, **about)
            self.journal.write(entry)
            return entry

        try:
            result, why = self._run(composed, overrides, Entry(job=job, name=name, state="begun", pid=os.getpid()))
        except SageError as error:
            return ended("failed", why=str(error), exit_code=error.exit_code)
        except KeyboardInterrupt:
            ended("interrupted")
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            return ended("failed", why=told, exit_code=1, trace=traceback.format_exc())
        if result is None:
            return ended("skipped")
        line, notes = line_of(result), tuple(notes_of(result))
        if not result.interrupted:
            return ended("done", line=line, notes=notes, why=why)
        entry = ended("interrupted", line=line, notes=notes)
        if this_process() == self.owner:
            raise KeyboardInterrupt
        return entry

    def named(self, overrides: list[str]) -> str:
        """What tells the point from others."""
        return " ".join(each for each in overrides if each.partition("=")[0] in self.varying)

    def _run(
        self, composed: DictConfig, overrides: list[str], begun: Entry
    ) -> tuple[RunResult | LiveResult | None, Why]:
        """What was run, None if its result was there; and why what was there did not do."""
        if BROKEN in composed:
            raise ConfigError(f"config: {composed[BROKEN]}")
        config, plain = checked(composed)
        there = self.found(config, plain)
        if there.folder is not None:
            return None, ""
        if isinstance(config.driver, LiveDriverConfig):
            self.journal.write(begun)
            return run_live(composed, overrides), there.why
        plan = planned(config, plain)
        with held(plan.folder) as waited:
            if waited and self.found(config, plain).folder is not None:
                return None, ""
            self.journal.write(begun)
            return run_planned(plan, overrides), there.why

    def found(self, config: RunConfig, plain: dict[str, Any]) -> Found:
        """What there is of it before it is run."""
        return found(Path(config.results) / config.name, plain, self.resume)
