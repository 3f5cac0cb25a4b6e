"""Every example runs, from an empty folder, as a reader would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(ROOT.joinpath("examples").rglob("*.py"))


def test_there_are_examples() -> None:
    assert EXAMPLES, "examples/ holds no program"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_example_runs(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(example)],
        cwd=tmp_path, env={**os.environ, "MPLBACKEND": "Agg"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{example}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if "__main__" in example.read_text():  # else it is a module that another example or a configuration names
        assert done.stdout.strip(), f"{example} printed nothing: what does a reader learn from it?"
