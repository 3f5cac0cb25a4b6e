"""A chapter of a report: one study of the paper, or one experiment of a folder of runs, with everything that is said of it.

Whatever is published (HTML, LaTeX, CSV, ledger) reads chapters, so a number is computed once and is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sage_bench.metrics.compare import Condition, conditions, measured, verdicts
from sage_bench.publish.system.system import system_findings
from sage_bench.results.reader import Run, Runs
from sage_bench.studies.findings import Findings
from sage_bench.studies.study import Experiments, Study


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
    compared = conditions(Runs(experiments.runs))
    return Chapter(study.name, study.section, study.title, study.question, found, compared, verdicts_of(compared))


def system_chapter() -> Chapter:
    """What the system is: figures and tables that need no runs. Raises :class:`DataError`."""
    question = "What is it made of, and what happens to a request?"
    return Chapter("system", "4", "The system", question, system_findings(), (), pd.DataFrame())


def verdicts_of(compared: Sequence[Condition]) -> pd.DataFrame:
    """Verdicts of the conditions that have more than one arm; an empty table where there are none."""
    several = [condition for condition in compared if len(condition.arms) > 1]
    return verdicts(measured(several)) if several else pd.DataFrame()
