"""A chapter of a report: one study of the paper, or one experiment of a folder of runs, with everything that is said of it.

Whatever is published (HTML, LaTeX, CSV, ledger) reads chapters, so a number is computed once and is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from sage_bench.metrics.compare import Condition, conditions, measured, verdicts
from sage_bench.publish.system.system import system_findings
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.findings import Findings
from sage_bench.studies.study import Experiments, Study
from sage_bench.studies.twins import TWIN


@dataclass(frozen=True, slots=True)
class Chapter:
    """name: of its folder and its anchor. section: of the paper, "" where it has none. conditions: what was compared.
    verdicts: see :func:`sage_bench.metrics.compare.verdicts`; empty where nothing was held against anything."""

    name: str
    section: str
    title: str
    question: str
    findings: Findings
    conditions: Sequence[Condition]
    verdicts: pd.DataFrame

    @property
    def heading(self) -> str:
        """Section and title."""
        return f"{self.section} {self.title}".strip()

    @property
    def runs(self) -> list[Run]:
        """Every run that it rests on, in order of conditions and arms."""
        return [run for condition in self.conditions for arm in condition.arms.values() for run in arm]


def chapter_of(study: Study, experiments: Experiments) -> Chapter:
    """What ``study`` says of its runs. Raises :class:`DataError`."""
    found = study.findings(experiments)
    found = replace(found, notes=[*found.notes, *experiments.left_out])
    compared = conditions(Runs(experiments.runs))
    verdicts = verdicts_of(_held(study, experiments))
    return Chapter(study.name, study.section, study.title, study.question, found, compared, verdicts)


def system_chapter() -> Chapter:
    """What the system is: figures and tables that need no runs. Raises :class:`DataError`."""
    question = "What is it made of, and what happens to a request?"
    return Chapter("system", "4", "The system", question, system_findings(), (), pd.DataFrame())


def _held(study: Study, experiments: Experiments) -> list[Condition]:
    """Conditions as their arms are held against each other: the study's baseline first, without its references; without
    the simulations that only stand beside a live run, which would count one point of the sweep twice."""
    held = []
    for condition in conditions(Runs(experiments.runs).where(lambda m: TWIN not in m.overrides)):
        arms = {name: runs for name, runs in condition.arms.items() if name not in study.references}
        named = [name for name in study.baselines if name in arms]
        if study.baselines and not named:
            continue
        held.append(replace(condition, arms={name: arms[name] for name in dict.fromkeys([*named[:1], *arms])}))
    return held


def verdicts_of(compared: Sequence[Condition]) -> pd.DataFrame:
    """Verdicts of the conditions that have more than one arm; an empty table where there are none."""
    several = [condition for condition in compared if len(condition.arms) > 1]
    return verdicts(measured(several)) if several else pd.DataFrame()
