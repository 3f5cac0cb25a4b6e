"""The report as one HTML page: readable offline, without scripts, on a phone, in the dark and on paper.

Everything is inside the file: the style, and the figures as data URIs. Text from runs is escaped by the template engine.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jinja2
from PIL import Image

from sage_bench.figures.style import DPI, WIDTH_IN
from sage_bench.publish.balance import balance, nowhere
from sage_bench.publish.chapter import Chapter
from sage_bench.publish.checklist import checklist, runs_of, runs_sheet
from sage_bench.publish.fairness import differences, fairness
from sage_bench.publish.ledger import ledger_sheet, tally
from sage_bench.publish.mapping import mapping
from sage_bench.results.writer import output_error
from sage_bench.studies.findings import Claim, Drawing, TableOf
from sage_bench.tables import numeric
from sage_core.errors import DataError

OPEN_ROWS: Final = 40
"""Rows of a table that is shown open; a longer one is folded away, and printed all the same."""

COLOURS: Final = 128
"""Of a figure on the page."""


@dataclass(frozen=True, slots=True)
class _Image:
    """uri: the PNG itself. wide: it was drawn wider than one column, and gets the width of the page."""

    drawing: Drawing
    uri: str
    wide: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """A chapter as the template has it; what is not core comes later."""

    chapter: Chapter
    tables: Sequence[TableOf]
    more_tables: Sequence[TableOf]
    images: Sequence[_Image]
    more_images: Sequence[_Image]
    balance: Sequence[TableOf]
    differences: Sequence[TableOf]
    nowhere: Sequence[str]
    fairness: Sequence[str]


def page(
    title: str,
    chapters: Sequence[Chapter],
    claims: Sequence[Claim],
    pictures: Mapping[tuple[str, str], Path],
    *,
    definitions: Sequence[str] = (),
    of_the_paper: bool = False,
) -> str:
    """The page. pictures: PNG of each figure by names of chapter and figure; those without one are left out.
    of_the_paper: it maps the paper's experiments to chapters too.

    Raises :class:`DataError` for a picture that is missing or empty.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sage_bench.publish", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["numeric"] = numeric
    environment.filters["slug"] = slug
    return environment.get_template("page.html.j2").render(
        title=title,
        parts=[_part(chapter, pictures) for chapter in chapters],
        tally=tally(claims) if claims else None,
        claims=claims,
        claim_sheet=ledger_sheet(claims) if claims else None,
        checklist=checklist(chapters),
        runs=runs_sheet(chapters),
        runs_n=len(runs_of(chapters)),
        mapping=mapping(chapters) if of_the_paper else (),
        definitions=definitions,
        open_rows=OPEN_ROWS,
    )


def slug(text: str) -> str:
    """As an anchor or a file name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text).strip("_")


def _part(chapter: Chapter, pictures: Mapping[tuple[str, str], Path]) -> _Part:
    found = chapter.findings
    images = [
        _image(each, pictures[chapter.name, each.name])
        for each in found.figures
        if (chapter.name, each.name) in pictures
    ]
    return _Part(
        chapter,
        tables=[each for each in found.tables if each.core],
        more_tables=[each for each in found.tables if not each.core],
        images=[image for image in images if image.drawing.core],
        more_images=[image for image in images if not image.drawing.core],
        balance=list(balance(chapter)),
        differences=list(differences(chapter)),
        nowhere=[*found.nowhere, *nowhere(chapter)],
        fairness=fairness(chapter),
    )


def _image(drawing: Drawing, png: Path) -> _Image:
    """Of the palette's colours alone, a third of the size; the file itself stays as it is."""
    try:
        content = io.BytesIO(png.read_bytes())
    except OSError as error:
        raise output_error(png, error) from error
    try:
        picture = Image.open(content, formats=("PNG",)).convert("RGB")
    except (OSError, SyntaxError) as error:  # what Pillow says of a file that is another's, or cut short
        raise DataError(f"{png}: not a PNG; draw the figures again") from error
    small = io.BytesIO()
    picture.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"
    return _Image(drawing, uri, picture.width > 1.25 * WIDTH_IN * DPI)
