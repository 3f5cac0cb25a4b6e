"""What a study is: a question, the experiments that answer it, and the function that reads the answer from their runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run, Runs, load_runs
from sage_bench.studies.findings import Findings
from sage_core.errors import DataError

Size = Literal["full", "quick", "live"]
"""``full``: what a paper prints. ``quick``: fewer seeds and shorter runs, to see that everything works. ``live``: a reduced
one on emulated engines in real time."""

FOLDERS: Final[Mapping[Size, str]] = {"full": "", "quick": "quick/", "live": "live/"}
"""Where the experiments of a size are, below ``conf/experiment``."""


@dataclass(frozen=True, slots=True)
class Experiments:
    """Runs of a study by experiment (its name below ``conf/experiment``); simulated, and live where there are any. left_out: a
    sentence for each run that was found and is not among them."""

    simulated: Mapping[str, Runs]
    live: Mapping[str, Runs]
    left_out: Sequence[str] = ()

    @property
    def runs(self) -> list[Run]:
        """All of them, in this order."""
        return [run for part in (self.simulated, self.live) for runs in part.values() for run in runs]


@dataclass(frozen=True, slots=True)
class Study:
    """section: of the paper, such as ``5.2``. experiments: names below ``conf/experiment``; each exists in every size that
    is in ``sizes``. findings: from the runs alone. live: those of the experiments that also have a live size.

    baselines: arms that the others are held against in *wins and losses*: the first of them that a condition has, and nothing is
    held against anything where it has none; empty leaves it to ``metrics.compare``. references: arms that are not held against
    others, such as one that gets fewer requests."""

    name: str
    section: str
    title: str
    question: str
    experiments: tuple[str, ...]
    findings: Callable[[Experiments], Findings]
    live: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    def commands(self, size: Size) -> list[tuple[str, ...]]:
        """Arguments of ``sage run`` that make its runs, one for each experiment."""
        names = self.live if size == "live" else self.experiments
        return [(f"experiment={FOLDERS[size]}{name}",) for name in names]


def folder_of(experiment: str) -> str:
    """Name of an experiment's results: ``scalability/load`` becomes ``scalability_load``."""
    return experiment.replace("/", "_")


def experiments_in(results: Path, study: Study) -> Experiments:
    """Its runs below ``results`` that are complete and valid. Raises :class:`DataError` where an experiment has none that is
    simulated."""
    simulated, live = {}, {}
    left_out: list[str] = []
    for name in study.experiments:
        folder = results / folder_of(name)
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; run `sage run experiment={name} results={results}`, or `sage paper`"
            )
        found = load_runs(folder)
        left_out += [_left_out(run.manifest) for run in found.where(lambda m: not _counts(m))]
        runs = found.where(_counts)
        simulated[name] = runs.where(lambda m: m.source == "simulation")
        live[name] = runs.where(lambda m: m.source != "simulation")
        if not len(simulated[name]):
            raise DataError(f"{folder}: holds no complete simulated run; run `sage run experiment={name}` again")
    return Experiments(simulated, {name: runs for name, runs in live.items() if len(runs)}, left_out)


def _counts(manifest: Manifest) -> bool:
    """Whether it ran to its end and the load generator kept up."""
    return manifest.status == "complete" and not manifest.invalid


def _left_out(manifest: Manifest) -> str:
    why = manifest.status if manifest.status != "complete" else f"invalid ({'; '.join(manifest.invalid)})"
    return f"{manifest.experiment}/{manifest.run_id}: {why}, left out."


def evidence(runs: Runs) -> tuple[str, ...]:
    """Experiments that ``runs`` belong to, as a claim names them."""
    return tuple(dict.fromkeys(run.manifest.experiment for run in runs))


def one_of(studies: Sequence[Study], name: str) -> Study:
    """The study of that name. Raises :class:`DataError`."""
    for each in studies:
        if each.name == name:
            return each
    raise DataError(f"no study {name!r}; there are {', '.join(each.name for each in studies)}")
