"""The page in a real browser: offline, quiet, visible, and no wider than the screen."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sage_bench.publish.chapter import Chapter
from sage_bench.publish.ledger import ledger
from sage_bench.publish.publish import write_chapters
from sage_bench.studies.findings import TableOf
from sage_bench.tables import Sheet


def test_the_page_in_a_browser(chapter: Chapter, tmp_path: Path, browser: Any) -> None:
    wide = Sheet("Wide", [f"column {i}\n(req/s)" for i in range(30)], [["1,234.5 ±0.1"] * 30] * 3)
    words = Sheet("Words", ["what"], [["one-very-long-identifier-" * 20], ["many words of prose " * 40]])
    tables = [*chapter.findings.tables, TableOf("wide", "Wide.", wide), TableOf("words", "Long.", words)]
    chapter = replace(chapter, findings=replace(chapter.findings, tables=tables))
    write_chapters([chapter], ledger([chapter]), tmp_path / "report", title="Test", of_the_paper=True)
    page = tmp_path / "report" / "report.html"
    light = {}
    for width in (390, 1280):
        seen = browser.look(page, width)
        assert seen.console == []
        assert [url for url in seen.requests if not url.startswith("data:")] == [page.as_uri()]
        assert seen.width <= width, "the page is wider than the screen"
        light[width] = _pixels(seen.screenshot)
        assert light[width].std() > 10, "the page is blank"
    dark = _pixels(browser.look(page, 1280, dark=True).screenshot)
    assert np.median(light[1280]) > 200 and np.median(dark) < 60


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), np.float64)
