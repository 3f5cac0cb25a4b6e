"""Claims that a test decides: those of one study are adjusted together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sage_bench.metrics.statistics import CONFIDENCE, holm
from sage_bench.studies.findings import Claim, decided


class Hypothesis(NamedTuple):
    """A claim before it is decided. better: the difference has the sign that the claim says. p: of that difference, as it is;
    NaN below two seeds."""

    id: str
    requirement: int
    asked: str
    text: str
    better: bool
    p: float
    evidence: tuple[str, ...]


def settled(claims: Sequence[Claim | Hypothesis]) -> list[Claim]:
    """In their order, each hypothesis decided by its p-value, Holm-adjusted over all hypotheses given; claims stay as they are."""
    adjusted = iter(holm([each.p for each in claims if isinstance(each, Hypothesis)]))
    return [
        Claim(each.id, each.requirement, each.asked, each.text, decided(each.better, next(adjusted) < 1 - CONFIDENCE), each.evidence)
        if isinstance(each, Hypothesis)
        else each
        for each in claims
    ]  # fmt: skip
