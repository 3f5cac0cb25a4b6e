"""Count what there is: language, files, lines of code, tests, dependencies and artefacts of every package.

Prints a table and writes ``results/bench/implementation.json``; ``--json`` prints that with the layer map instead (for
``sage paper``, which draws both). *Lines* as in ``tools/complexity.py``: blank lines, comments and docstrings do not count.
*Tests*: test functions, not the cases that they are run with. *Dependencies*, of what is in the wheel: distributions that a
package imports, ``*`` where they are not among those that every installation has.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Final, TypeVar

import layers
from complexity import code_lines
from document import ROOT
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

T = TypeVar("T")

OUT: Final = Path("results/bench/implementation.json")
LANGUAGES: Final = {
    ".py": "Python",
    ".pyi": "Python",
    ".cpp": "C++",
    ".hpp": "C++",
    ".c": "C",
    ".yaml": "YAML",
    ".sh": "shell",
}
NOT_SHOWN: Final = frozenset({"", ".so", ".pyc", ".py", ".typed"})
"""Suffixes that are no artefacts: what builds leave, and what says nothing of a part."""
OURS: Final = frozenset({"sage_core", "sage_policies", "sage_sim", "sage_live", "sage_bench"})


@dataclass(frozen=True, slots=True)
class Part:
    """A row. folder: what is counted. layer: empty for what is not in the wheel. tests: folders below ``tests/``."""

    name: str
    layer: str
    folder: str
    language: str
    tests: tuple[str, ...] = ()


PARTS: Final = (
    Part("sage_core", "L1-L3", "sage_core", "Python", ("core", "golden")),
    Part("native", "L2", "native", "C++"),
    Part("sage_policies", "L4", "policies/sage_policies", "Python", ("policies",)),
    Part("sage_sim", "L5", "sage_sim", "Python", ("sim",)),
    Part("sage_live", "L5", "sage_live", "Python", ("live", "real")),
    Part(
        "sage_bench",
        "L6",
        "sage_bench",
        "Python",
        ("app", "figures", "loads", "metrics", "publish", "results", "studies"),
    ),
    Part("conf", "L6", "conf", "YAML"),
    Part("examples", "", "examples", "Python"),
    Part("benchmarks", "", "benchmarks", "Python"),
    Part("tools", "", "tools", "Python", ("dev",)),
    Part("tests", "", "tests", "Python"),
)
"""Tests are counted at what they test; the last row has their lines. C++ is tested through Python, against its meaning."""


@dataclass(frozen=True, slots=True)
class Counts:
    """See :class:`sage_bench.publish.system.facts.PackageCounts`."""

    package: str
    layer: str
    language: str
    files: int
    lines: int
    tests: int
    dependencies: tuple[str, ...]
    artefacts: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the counts and the layer map as JSON; write nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = counted(ROOT)
    rows = [asdict(each) for each in found]
    if options.json:
        json.dump({"layers": [asdict(box) for box in layers.read(ROOT)], "packages": rows}, sys.stdout)
        return
    table = Table(*Counts.__slots__, box=SIMPLE, title="implementation summary")
    for each in found:
        table.add_row(*(", ".join(cell) if isinstance(cell, tuple) else str(cell) for cell in asdict(each).values()))
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    print(f"wrote {options.out}")


def counted(root: Path) -> list[Counts]:
    """A row a part. SystemExit if a folder of tests belongs to none, or a part is not there."""
    project = tomllib.loads(root.joinpath("pyproject.toml").read_text("utf-8"))["project"]
    known = {name for part in PARTS for name in part.tests}
    homeless = sorted({path.parent.name for path in root.joinpath("tests").glob("*/test_*.py")} - known)
    if homeless:
        raise SystemExit(f"tests/{homeless[0]}: belongs to no part; name it in PARTS of {Path(__file__).name}")
    return [_counts(root, part, project) for part in PARTS]


def lines_of(path: Path) -> int:
    """Lines of code in a file; 0 for a language that is not counted."""
    language = LANGUAGES.get(path.suffix)
    if language is None:
        return 0
    if language == "Python":
        return _of(path, code_lines)
    text = path.read_text("utf-8")
    if language in ("C++", "C"):
        return sum(bool(line.strip()) for line in without_comments(text).splitlines())
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines())


def without_comments(text: str) -> str:
    """C++ without comments; what looks like one within a string stays."""
    tokens = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/', re.S)
    return tokens.sub(lambda found: found[0] if found[0][0] in "\"'" else "", text)


def tests_in(text: str) -> int:
    """Functions whose name starts with ``test``, of a module and of its classes, and state machines of Hypothesis."""
    found = 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += node.name.startswith("test")
        elif isinstance(node, ast.Assign):
            found += isinstance(node.value, ast.Attribute) and node.value.attr == "TestCase"
    return found


def _counts(root: Path, part: Part, project: Mapping[str, Any]) -> Counts:
    files = list(_files(root / part.folder))
    if not files:
        raise SystemExit(f"{part.folder}: no such folder, or nothing in it; correct PARTS of {Path(__file__).name}")
    code = [path for path in files if LANGUAGES.get(path.suffix) == part.language]
    tests = [path for name in part.tests for path in root.joinpath("tests", name).glob("test_*.py")]
    return Counts(
        part.name,
        part.layer,
        part.language,
        len(code),
        sum(map(lines_of, code)),
        sum(_of(path, tests_in) for path in tests),
        _native_dependencies(root) if part.language == "C++" else _dependencies(code, project) if part.layer else (),
        tuple(_artefacts(root, part, set(files) - set(code), project)),
    )


def _of(path: Path, read: Callable[[str], T]) -> T:
    """What ``read`` makes of a Python file. SystemExit that names the file where it cannot be parsed."""
    try:
        return read(path.read_text("utf-8"))
    except (SyntaxError, tokenize.TokenError) as error:
        raise SystemExit(f"{path}: cannot be parsed: {error}") from error


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _dependencies(code: Iterable[Path], project: Mapping[str, Any]) -> tuple[str, ...]:
    names: set[str] = set()
    for path in code:
        if path.suffix != ".yaml":
            names |= _of(path, _imports)
    always = {_plain(re.split(r"[<>=\[;@ ]", each)[0]) for each in project["dependencies"]}
    found = {_distribution(name) for name in names if name not in sys.stdlib_module_names and name not in OURS}
    return tuple(sorted(name if name in always else f"{name}*" for name in found))


def _imports(text: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _distribution(name: str) -> str:
    """Of a top-level module; its own name where it is not installed, or where several distributions share it."""
    found = set(_distributions().get(name, ()))
    return _plain(found.pop() if len(found) == 1 else name)


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _native_dependencies(root: Path) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"find_package\((\w+)", root.joinpath("CMakeLists.txt").read_text("utf-8"))))


def _artefacts(root: Path, part: Part, others: Iterable[Path], project: Mapping[str, Any]) -> Iterator[str]:
    """Built modules, commands, and files that are not code of the part's language, by kind."""
    if part.language == "C++":
        yield from re.findall(r"pybind11_add_module\((\w+)", root.joinpath("CMakeLists.txt").read_text("utf-8"))
        return
    for command, target in project["scripts"].items():
        if target.startswith(f"{part.name}."):
            yield f"command {command}"
    kinds = Counter(path.suffix.lstrip(".") for path in others if path.suffix not in NOT_SHOWN)
    for kind, count in sorted(kinds.items()):
        yield f"{count} {kind}"


if __name__ == "__main__":
    main()
