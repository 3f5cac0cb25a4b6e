"""What a study found, as data: tables, figures, sentences and claims, all computed from runs.

Nothing here knows how it is shown; a terminal, Markdown, HTML and LaTeX each read the same findings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from matplotlib.figure import Figure

from sage_bench.metrics.statistics import Interval
from sage_bench.tables import Sheet
from sage_core.errors import DataError


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure. name: of its files, unique in the study. caption: one or two sentences with numbers from the data, its
    sample size and its source. draw: called once, when the files are written. core: it belongs in a paper's body, not in its appendix.
    """

    name: str
    caption: str
    draw: Callable[[], Figure]
    core: bool = True


@dataclass(frozen=True, slots=True)
class TableOf:
    """A table with its caption; ``sheet.title`` is its heading."""

    name: str
    caption: str
    sheet: Sheet
    core: bool = True


Outcome = Literal["holds", "does not hold", "no significant difference", "stated", "not measured"]
"""*stated*: a number was asked for and is given; nothing was to be decided."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement that the measurements decide.

    requirement: its number in the list of requirements, 0 where it has none. asked: what was to be shown, with the number
    asked for. text: what was found, with the number measured and its interval. evidence: experiments whose runs show it.
    """

    id: str
    requirement: int
    asked: str
    text: str
    outcome: Outcome
    evidence: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.evidence and self.outcome != "not measured":
            raise DataError(f"claim {self.id}: says {self.outcome!r} and names no run that shows it")
        if re.search(r"\bnan\b", self.text):
            raise DataError(f"claim {self.id}: its number is missing: {self.text}")


@dataclass(frozen=True, slots=True)
class Findings:
    """Of one study. sentences: the answer in prose, filled from data, wins and losses alike. nowhere: where it makes no
    difference, a sentence each. fairness: what the arms share and what they differ in, a sentence each."""

    tables: Sequence[TableOf]
    figures: Sequence[Drawing]
    sentences: Sequence[str]
    claims: Sequence[Claim]
    nowhere: Sequence[str] = ()
    fairness: Sequence[str] = ()
    notes: Sequence[str] = field(default=())


def decided(better: bool, significant: bool) -> Outcome:
    """Of a claim that something is better: by its sign and whether that could be chance."""
    if not significant:
        return "no significant difference"
    return "holds" if better else "does not hold"


def bounded(value: Interval, *, least: float = -math.inf, most: float = math.inf) -> Outcome:
    """Of a claim that a value is above ``least`` and below ``most``, decided only where its interval leaves the bound out: an
    interval that touches it, or one run, is "no significant difference"; no run is "not measured"."""
    if value.n == 0:
        return "not measured"
    if least < value.low and value.high < most:
        return "holds"
    return "does not hold" if value.high < least or value.low > most else "no significant difference"


def number(value: float, digits: int = 3) -> str:
    """``value`` as prose has it: so many significant digits, thousands grouped. Raises :class:`DataError` for NaN."""
    if math.isnan(value):
        raise DataError("a sentence needs a number that the runs do not give")
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{places}f}"


def percent(share: float, digits: int = 1) -> str:
    """A share as ``12.3 %``. Raises :class:`DataError` for NaN."""
    if math.isnan(share):
        raise DataError("a sentence needs a share that the runs do not give")
    return f"{100 * share:.{digits}f} %"
