"""The counting script, on inputs whose counts are known, and on the three forms themselves."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools/complexity.py"))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", 0),
        ("# nothing\n\n\n", 0),
        ('"""A docstring\nof two lines."""\n', 0),
        ("x = 1  # one\n", 1),
        ("x = 1", 1),
        ("x = 1; y = 2\n", 1),
        ("x = (\n    1,\n\n    # a comment within\n    2,\n)\n", 4),
        ('text = """a\n\nb"""\n', 3),
        ('def f():\n    """Says what."""\n    return 1\n', 2),
        ('def f():\n    """Says what."""\n', 1),
        ("if x:\n    pass\nelse:\n    pass\n", 4),
        ('print(\n    "a"\n    "b"\n)\n', 4),
    ],
)
def test_lines_of_code(tool: dict[str, Any], text: str, lines: int) -> None:
    assert tool["code_lines"](text) == lines


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ({"a": 1, "b": "x"}, 2),
        ({"a": {"b": 1, "c": {"d": None}}}, 2),
        ({"urls": ["x", "y"]}, 1),
        ({"stages": [{"op": "embed"}, {"op": "chat", "k": 4}]}, 3),
        ({"a": {}, "b": []}, 2),
        ({"a": ""}, 1),
    ],
)
def test_configuration_keys(tool: dict[str, Any], content: Any, count: int) -> None:
    assert tool["leaves"](content) == count
    assert tool["leaves"](json.loads(json.dumps(content))) == count


def test_settings_in_code(tool: dict[str, Any]) -> None:
    text = 'T = TypeVar("T")\nLIMIT = 3\nWAIT_S: float = 1.0\nname = "x"\nclass A:\n    B = 1\nparser.add_argument("--x")\n'
    assert tool["settings_in_code"](text) == 3


def test_a_form_is_the_sum_of_its_files(tool: dict[str, Any], tmp_path: Path) -> None:
    tmp_path.joinpath("a.py").write_text("LIMIT = 1\nprint(LIMIT)\n")
    tmp_path.joinpath("b.py").write_text("# b\nprint()\n")
    tmp_path.joinpath("c.yaml").write_text("x: 1\ny: {z: 2}\n")
    tmp_path.joinpath("d.json").write_text('{"x": [1, 2]}')
    form = tool["Form"](("*.py", "c.yaml", "d.json"), ("a.py", "b.py"))
    assert tool["complexity"](form, tmp_path) == tool["Complexity"](4, 3, 3, 1, 2)
    with pytest.raises(SystemExit, match=r"e\.py: no such file"):
        tool["complexity"](tool["Form"](("e.py",), ()), tmp_path)
    tmp_path.joinpath("f.toml").write_text("")
    with pytest.raises(SystemExit, match=r"expected \.py, \.yaml or \.json"):
        tool["complexity"](tool["Form"](("f.toml",), ()), tmp_path)


def test_the_three_forms_are_counted(tmp_path: Path) -> None:
    out = tmp_path / "folder/complexity.json"
    command = [sys.executable, str(ROOT / "tools/complexity.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    counted = json.loads(out.read_text())
    assert list(counted) == ["declared", "script", "microservices"]
    assert counted["declared"]["lines"] == 0 < counted["declared"]["config_keys"]
    assert counted["microservices"]["processes"] == 3
    assert str(counted["microservices"]["lines"]) in done.stdout
