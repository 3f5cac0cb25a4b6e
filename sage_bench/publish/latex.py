"""Tables, figures and sentences as LaTeX: what a paper includes, and one document that includes all of it.

Plain LaTeX with ``graphicx``, ``booktabs`` and ``longtable``, so that pdfLaTeX, XeLaTeX and Tectonic all take it. Every
text from data is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from sage_bench.publish.chapter import Chapter
from sage_bench.studies.findings import Claim, Drawing, TableOf
from sage_bench.tables import Sheet, numeric
from sage_core.errors import DataError

LINES_MAX: Final = 40
"""Lines of a table on one page; a longer one is a ``longtable`` that breaks over pages."""

_PROSE_MIN: Final = 40
"""Characters from which a cell is prose, and broken into lines."""

_SPECIAL: Final = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_\allowbreak{}",  # names are long, and columns narrow
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    '"': r"{\char34}",
    "`": r"\textasciigrave{}",
    "[": "{[}",  # at the start of a row it would be an option of the row before
    "]": "{]}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": r"$-$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "→": r"$\to$",
    "∞": r"$\infty$",
    "µ": r"$\mu$",
    "μ": r"$\mu$",
    "°": r"$^\circ$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "\u00a0": "~",
}

_DIGITS: Final = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")

PREAMBLE: Final = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage{array}
\usepackage{graphicx}
\usepackage{booktabs}
\usepackage{longtable}
\usepackage[margin=2.2cm]{geometry}
\newsavebox{\sagebox}
\begin{document}
"""
"""``\\sagebox`` holds a table or figure while it is measured: only one that is wider than the line is made smaller."""


_PROSE: Final = r">{\raggedright\arraybackslash}p{5.5cm}"
"""A column of sentences in a table of one page."""


def escape(text: str) -> str:
    """``text`` as LaTeX prints it. A letter without a LaTeX name stays as it is (UTF-8)."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def macro(name: str) -> str:
    r"""The name of a macro, letters only: ``control_plane`` becomes ``\SageControlPlane``."""
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name) if word]
    camel = "".join(word[0].upper() + word[1:] for word in words)
    return "\\Sage" + re.sub(r"\d", lambda digit: _DIGITS[int(digit[0])], camel)


def file_name(part: TableOf | Drawing) -> str:
    """Of its LaTeX: a table and a figure may have one name."""
    return f"{part.name}_{'table' if isinstance(part, TableOf) else 'figure'}.tex"


def table(of: TableOf, label: str) -> str:
    """A table with its caption: on one page, or broken over several."""
    sheet = of.sheet
    caption = f"{escape(sheet.title)}. {escape(of.caption)}"
    right = numeric(sheet)
    columns = "".join("r" if each else "l" for each in right)
    head = " & ".join(_heading(name, each) for name, each in zip(sheet.columns, right, strict=True)) + r" \\"
    body = [" & ".join(map(escape, row)) + r" \\" for row in sheet.rows]
    if sum(1 + max(map(len, row), default=0) // _PROSE_MIN for row in sheet.rows) > LINES_MAX:
        return _long(sheet, caption, label, columns, head, body)
    longest = [max(map(len, cells), default=0) for cells in zip(*sheet.rows, strict=True)] or [0] * len(right)
    columns = "".join(_PROSE if width > _PROSE_MIN else each for each, width in zip(columns, longest, strict=True))
    inner = "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    )
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\small",
            rf"\caption{{{caption}}}\label{{{label}}}",
            _fitted(inner),
            r"\end{table}",
            "",
        ]
    )


def figure(of: Drawing, path: str, label: str) -> str:
    """A figure in the size it was drawn in, with its caption."""
    return "\n".join(
        [
            r"\begin{figure}[htbp]",
            r"\centering",
            _fitted(rf"\includegraphics{{{path}}}"),
            rf"\caption{{{escape(of.caption)}}}\label{{{label}}}",
            r"\end{figure}",
            "",
        ]
    )


def paragraph(chapter: Chapter) -> str:
    """The result paragraph: the answer, then where it makes no difference."""
    return "\n".join(escape(sentence) for sentence in (*chapter.findings.sentences, *chapter.findings.nowhere)) + "\n"


def macros(chapters: Sequence[Chapter], claims: Sequence[Claim]) -> str:
    """A macro for the result paragraph of each chapter, and one for each claim that was decided.

    Raises :class:`DataError` where two would have the same name.
    """
    texts = [(f"{chapter.name}-results", paragraph(chapter).strip()) for chapter in chapters]
    decided = [claim for claim in claims if claim.outcome != "not measured"]
    texts += [(f"claim-{claim.id}", f"{escape(claim.text)} ({escape(claim.outcome)})") for claim in decided]
    named: dict[str, str] = {}
    lines = []
    for name, text in texts:
        if (other := named.setdefault(macro(name), name)) != name:
            raise DataError(f"{name} and {other}: both would be the LaTeX macro {macro(name)}; rename one")
        lines.append(rf"\newcommand{{{macro(name)}}}{{{text}}}")
    return "\n".join(["% Filled from the runs by the report; do not edit.", *lines]) + "\n"


def document(chapters: Sequence[Chapter], claims: Sequence[TableOf], *, figures: bool = True) -> str:
    """``figures.tex``: every study with its paragraph, tables and (if there are files of them) figures; what is not core
    in an appendix. claims: the ledger, at the end."""
    parts = [PREAMBLE + r"\input{macros.tex}"]
    for chapter in chapters:
        parts.append(rf"\section*{{{escape(chapter.heading)}}}")
        parts.append(rf"\emph{{{escape(chapter.question)}}}" + "\n")
        parts.append(macro(f"{chapter.name}-results") + "\n")
        parts += [_input(chapter, each) for each in _parts(chapter, figures) if each.core]
        parts.append(r"\clearpage")
    parts.append(r"\appendix")
    for chapter in chapters:
        more = [_input(chapter, each) for each in _parts(chapter, figures) if not each.core]
        if more:
            parts += [rf"\section*{{Supplement: {escape(chapter.heading)}}}", *more, r"\clearpage"]
    parts += [rf"\input{{{file_name(each)}}}" for each in claims]
    return "\n".join([*parts, r"\end{document}", ""])


def _parts(chapter: Chapter, figures: bool) -> list[TableOf | Drawing]:
    return [*chapter.findings.tables, *(chapter.findings.figures if figures else ())]


def _input(chapter: Chapter, part: TableOf | Drawing) -> str:
    return rf"\input{{{chapter.name}/{file_name(part)}}}"


def _fitted(content: str) -> str:
    box = r"\usebox{\sagebox}"
    return rf"\sbox{{\sagebox}}{{{content}}}\ifdim\wd\sagebox>\linewidth\resizebox{{\linewidth}}{{!}}{{{box}}}\else{box}\fi"


def _heading(name: str, right: bool) -> str:
    """A heading; its second line, the unit, below the first."""
    lines = [escape(line) for line in name.split("\n")]
    if len(lines) == 1:
        return lines[0]
    side = "r" if right else "l"
    stacked = r" \\ ".join(lines)
    return rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}{stacked}\end{{tabular}}"


def _long(sheet: Sheet, caption: str, label: str, columns: str, head: str, body: Sequence[str]) -> str:
    """Over pages; columns of prose share what the width of the page leaves."""
    heads = [max(name.split("\n"), key=len) for name in sheet.columns]
    widths = [max(map(len, cells)) for cells in zip(heads, *sheet.rows, strict=True)]
    if sum(widths) > 100:
        columns = _shared(columns, widths)
    return "\n".join(
        [
            r"{\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\begin{{longtable}}{{{columns}}}",
            rf"\caption{{{caption}}}\label{{{label}}} \\",
            r"\toprule",
            head,
            r"\midrule",
            r"\endhead",
            r"\bottomrule",
            r"\endfoot",
            *body,
            r"\end{longtable}}",
            "",
        ]
    )


def _shared(columns: str, widths: Sequence[int]) -> str:
    """Columns of numbers and words are as wide as they are; those of prose share what these leave of the line. widths: in characters."""
    prose = [width > 20 and column == "l" for column, width in zip(columns, widths, strict=True)]
    left = (
        1 - 0.014 * len(widths) - sum(0.0105 * width for width, wraps in zip(widths, prose, strict=True) if not wraps)
    )
    total = sum(min(width, 60) for width, wraps in zip(widths, prose, strict=True) if wraps)
    return "".join(
        rf">{{\raggedright\arraybackslash}}p{{{max(left, 0.3) * min(width, 60) / total:.3f}\linewidth}}"
        if wraps
        else column
        for column, width, wraps in zip(columns, widths, prose, strict=True)
    )
