"""From studies and their runs to everything that is published of them.

Below ``results/report``: ``report.html``; ``claims.csv`` and ``claims.json``; ``figures.tex``, which includes all that is
in the studies' folders; and a folder for each study with its figures (PDF, PNG), its tables (CSV, LaTeX) and its result
paragraph. Equal runs give equal bytes, but for the checklist, which tells dates.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from sage_bench.figures.style import save
from sage_bench.metrics.measure import measure_all
from sage_bench.publish import latex
from sage_bench.publish.balance import balance
from sage_bench.publish.chapter import Chapter, chapter_of, system_chapter
from sage_bench.publish.checklist import checklist, runs_sheet
from sage_bench.publish.fairness import differences, refuse_unequal_hosts
from sage_bench.publish.ledger import ledger, ledger_json, ledger_sheet, tally
from sage_bench.publish.page import page
from sage_bench.results.writer import output_error
from sage_bench.studies.findings import Claim, TableOf
from sage_bench.studies.study import Study, experiments_in
from sage_bench.tables import Sheet, definitions
from sage_core.errors import DataError

TITLE: Final = "SAGE: findings"


def publish(studies: Sequence[Study], results: Path, console: Console, *, system: bool = True) -> list[Path]:
    """Read the runs below ``results``, and write the report into ``results/report``; the paths of its front pages.

    system: begin with the chapter on the system itself, which needs no runs and takes seconds to draw. Raises
    :class:`DataError` (also for a number that the runs do not give) and :class:`OutputError`.
    """
    experiments = [experiments_in(results, study) for study in studies]
    with console.status("measuring the runs"):
        measure_all(run for each in experiments for run in each.runs)
    chapters = []
    for study, of in zip(studies, experiments, strict=True):
        with console.status(f"reading {study.name}"):
            chapters.append(chapter_of(study, of))
    for chapter in chapters:
        refuse_unequal_hosts(chapter.conditions)
    with console.status("writing the report"):
        whole = [system_chapter(), *chapters] if system else chapters
        written = write_chapters(
            whole, ledger(whole), results / "report", title=TITLE, definitions=definitions(), of_the_paper=True
        )
    for chapter in chapters:
        console.print(f"\n[bold]{chapter.heading.replace('[', chr(92) + '[')}[/bold]")
        for sentence in chapter.findings.sentences:
            console.print(sentence, markup=False, soft_wrap=True)
        for claim in chapter.findings.claims:
            console.print(f"  {claim.outcome}: {claim.text} ({claim.id})", markup=False, soft_wrap=True)
    console.print(f"\n{tally(ledger(whole))}", markup=False, soft_wrap=True)
    return [path for path in written if path.name in ("report.html", "figures.tex", "claims.csv")]


def write_chapters(
    chapters: Sequence[Chapter],
    claims: Sequence[Claim],
    out: Path,
    *,
    title: str,
    figures: bool = True,
    definitions: Sequence[str] = (),
    of_the_paper: bool = False,
) -> list[Path]:
    """Write page, ledger, LaTeX, tables and, if asked, figures below ``out``; the paths written.

    Raises :class:`DataError` and :class:`OutputError`.
    """
    _refuse_doubles(chapters, claims)
    drawn: dict[tuple[str, str], Path] = {}
    texts: dict[Path, str] = {}
    written = []
    for chapter in chapters:
        folder = out / chapter.name
        for each in chapter.findings.tables:
            texts[folder / latex.file_name(each)] = latex.table(each, f"tab:{chapter.name}-{each.name}")
        for each in (*chapter.findings.tables, *balance(chapter), *differences(chapter)):
            texts[folder / f"{each.name}.csv"] = sheet_csv(each.sheet)
        for drawing in chapter.findings.figures if figures else ():
            pdf, png = save(drawing.draw(), folder / drawing.name)
            drawn[chapter.name, drawing.name] = png
            written += [pdf, png]
            label = f"fig:{chapter.name}-{drawing.name}"
            texts[folder / latex.file_name(drawing)] = latex.figure(drawing, f"{chapter.name}/{pdf.name}", label)
    tables = []
    if claims:
        tables = [
            TableOf("claims", "What was asked, what was found, and the experiments that show it.", ledger_sheet(claims))
        ]
        texts[out / "claims.csv"] = sheet_csv(tables[0].sheet)
        texts[out / "claims.json"] = ledger_json(claims)
        texts[out / latex.file_name(tables[0])] = latex.table(tables[0], "tab:claims")
    texts[out / "macros.tex"] = latex.macros(chapters, claims)
    texts[out / "figures.tex"] = latex.document(chapters, tables, figures=figures)
    texts[out / "checklist.csv"] = sheet_csv(checklist(chapters))
    texts[out / "checklist_runs.csv"] = sheet_csv(runs_sheet(chapters))
    texts[out / "report.html"] = page(
        title, chapters, claims, drawn, definitions=definitions, of_the_paper=of_the_paper
    )
    for path, text in texts.items():
        write_text(path, text)
    return [*written, *texts]


def sheet_csv(sheet: Sheet) -> str:
    """As CSV: a heading's unit stands on the same line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(column.replace("\n", " ") for column in sheet.columns)
    writer.writerows(sheet.rows)
    return out.getvalue()


def write_text(path: Path, text: str) -> None:
    """Raises :class:`OutputError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise output_error(path, error) from error


def _refuse_doubles(chapters: Sequence[Chapter], claims: Sequence[Claim]) -> None:
    """Raises :class:`DataError` where two things would be written into one file or be cited by one name."""
    names = [f"claim {claim.id}" for claim in claims]
    names += [f"study {chapter.name}" for chapter in chapters]
    for chapter in chapters:
        names += [f"figure {chapter.name}/{drawing.name}" for drawing in chapter.findings.figures]
        tables = (*chapter.findings.tables, *balance(chapter), *differences(chapter))
        names += [f"table {chapter.name}/{table.name}" for table in tables]
    doubles = [name for name, n in Counter(names).items() if n > 1]
    if doubles:
        raise DataError(f"{doubles[0]}: there are two of that name; rename one, since files and citations go by it")
