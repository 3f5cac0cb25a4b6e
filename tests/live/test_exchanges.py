"""The recorded exchanges themselves: whole, readable, and without a trace of where they were recorded."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from record_exchanges import ENGINES, EXCHANGES, complete  # noqa: E402

FILES = sorted(EXCHANGES.rglob("*.json"))


def test_every_question_has_an_answer_of_every_engine() -> None:
    recorded = {(file.parent.name.partition("-")[0], file.stem) for file in FILES}
    asked = {
        (engine, question.name)
        for engine, by_recipe in ENGINES.items()
        for all_ in by_recipe.values()
        for question in all_
    }
    assert recorded == asked


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_recording_is_a_whole_exchange(file: Path) -> None:
    recorded = json.loads(file.read_text())
    response = "".join(data for _, data in recorded["response"]).encode("latin-1")
    times = [ms for ms, _ in recorded["response"]]
    assert recorded["request"].partition(" ")[0] in ("GET", "POST")
    assert re.match(rb"HTTP/1\.1 [2-5]\d\d ", response) and complete(response)
    assert times == sorted(times)
    if b"text/event-stream" in response:
        assert response.count(b"data: [DONE]") == 1
    assert not re.search(r"/(work|home|root|tmp|opt)/|127\.0\.0\.1", file.read_text())
