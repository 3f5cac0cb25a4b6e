"""LaTeX: what data says is what is printed, and a LaTeX that is installed takes all of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.publish import latex
from sage_bench.publish.chapter import Chapter
from sage_bench.publish.ledger import ledger
from sage_bench.publish.publish import write_chapters
from sage_bench.studies.findings import TableOf
from sage_bench.tables import Sheet, numeric

ENGINE = next((name for name in ("tectonic", "pdflatex") if shutil.which(name)), None)


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"])))
def test_no_special_character_survives(text: str) -> None:
    """Outside the commands that stand for them there is none that LaTeX would act on."""
    escaped = latex.escape(text)
    for command in sorted(set(latex._SPECIAL.values()), key=len, reverse=True):
        escaped = escaped.replace(command, "")
    assert not re.search(r"[\\{}$&#^_%~<>|\"`\[\]]", escaped), escaped


@given(st.text())
def test_escaping_is_one_to_one(text: str) -> None:
    """No two texts become one: a number in print is the number of the table."""
    back = {command: character for character, command in latex._SPECIAL.items()}
    assert len(back) == len(latex._SPECIAL) - 1, "only the two letters mu print alike"


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (["1", "2.5 ±0.1", "–"], True),
        (["<0.001", "", "1,234"], True),
        (["+1.2 [+0.9, +1.5]", "none"], True),
        (["3 / 0 / 1"], True),
        (["1.2x", "12.5 %", "30 ms"], True),
        (["–", ""], False),
        (["fifo", "1"], False),
        (["12f9ab34", "34"], False),
        (["2026-11-21T10:00:00"], False),
    ],
)
def test_columns_of_numbers_are_set_right(cells: list[str], right: bool) -> None:
    assert numeric(Sheet("t", ["c"], [[cell] for cell in cells])) == [right]


@pytest.mark.parametrize(
    ("name", "macro"), [("control_plane-results", r"\SageControlPlaneResults"), ("claim-5.2a", r"\SageClaimFiveTwoa")]
)
def test_macros_have_letters_only(name: str, macro: str) -> None:
    assert latex.macro(name) == macro


def test_a_long_table_breaks_over_pages() -> None:
    rows = [[str(i), "x"] for i in range(latex.LINES_MAX + 1)]
    text = latex.table(TableOf("t", "c", Sheet("T", ["n", "what"], rows)), "tab:t")
    assert r"\begin{longtable}{rl}" in text
    assert r"\begin{tabular}{rl}" in latex.table(TableOf("t", "c", Sheet("T", ["n", "what"], rows[:3])), "tab:t")
    prose = [["1", "words " * 100]] * 4
    assert "longtable" in latex.table(TableOf("t", "c", Sheet("T", ["n", "what"], prose)), "tab:t")


@pytest.mark.skipif(
    ENGINE is None,
    reason="no LaTeX here: neither tectonic nor pdflatex is on PATH; on Debian: sudo tools/install-debian.sh --report",
)
def test_everything_compiles(chapter: Chapter, tmp_path: Path) -> None:
    long = Sheet("Long", ["n", "prose"], [[str(i), "a long text & more, 100 % of it; " * 4] for i in range(60)])
    findings = replace(chapter.findings, tables=[*chapter.findings.tables, TableOf("long", "Long.", long)])
    chapter = replace(chapter, findings=findings)
    write_chapters([chapter], ledger([chapter]), tmp_path, title="t")
    command = (
        ["tectonic", "figures.tex"]
        if ENGINE == "tectonic"
        else ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "figures.tex"]
    )
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "figures.pdf").read_bytes().startswith(b"%PDF")
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", done.stdout)]
    assert max(wide, default=0) < 10, "something runs off the page"
