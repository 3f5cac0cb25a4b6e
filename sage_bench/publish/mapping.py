"""Where each experiment that a reader of the paper looks for is found: the categories, and the paper's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sage_bench.publish.chapter import Chapter
from sage_bench.studies.findings import Drawing, TableOf
from sage_bench.tables import Sheet

CATEGORIES: Final[Sequence[tuple[str, str, tuple[str, ...]]]] = (
    ("A", "control-plane effectiveness", ("control_plane",)),
    ("B", "comparison of scheduling policies", ("policy_comparison",)),
    ("C", "scalability", ("scalability",)),
    ("D", "mixed hardware", ("heterogeneous",)),
    ("E", "agent capability", ()),
)
"""Category, what it asks, and the studies that answer it."""

PAPER: Final[Sequence[tuple[str, str, tuple[str, ...]]]] = (
    ("8.1", "end-to-end pipeline performance (5.1)", ("e2e_rag",)),
    ("8.2", "control-plane effectiveness (5.2)", ("control_plane",)),
    ("8.3", "isolation and fairness (5.3)", ("isolation",)),
    ("8.4", "scalability (5.4)", ("scalability",)),
    ("8.5", "heterogeneous hardware (5.5)", ("heterogeneous",)),
    ("8.6", "policies, ablation and robustness", ("policy_comparison", "ablation", "robustness", "whatif")),
)
"""Experiments 8.1-8.6 of the paper: those of 5.1-5.5 in their order, then the studies without such a number."""


def mapping(chapters: Sequence[Chapter]) -> list[Sheet]:
    """The tables: paper's list and categories to studies; every table and figure to the body or the supplement."""
    there = {chapter.name: chapter for chapter in chapters}
    listed = []
    for title, rows in (("Experiments of the paper", PAPER), ("Categories of experiments", CATEGORIES)):
        cells = []
        for number, asks, names in rows:
            found = [there[name] for name in names if name in there]
            missing = [name for name in names if name not in there]
            where = [f"{chapter.heading}" for chapter in found] + [f"{name}: not in this report" for name in missing]
            cells.append([number, asks, "; ".join(where) or "no study: not measured here"])
        listed.append(Sheet(title, ["no.", "asks", "answered in"], cells))
    return [*listed, placement(chapters)]


def placement(chapters: Sequence[Chapter]) -> Sheet:
    """What goes into the paper's body and what into its supplement."""
    rows = []
    for chapter in chapters:
        parts: list[TableOf | Drawing] = [*chapter.findings.tables, *chapter.findings.figures]
        for core in (True, False):
            names = [each.name for each in parts if each.core is core]
            if names:
                rows.append([chapter.heading, "body" if core else "supplement", ", ".join(names)])
    return Sheet("Body and supplement", ["study", "where", "tables and figures"], rows)
