"""What the documents point to exists: files, folders, tests, invariants, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.joinpath("docs").rglob("*.md"), *ROOT.joinpath("changelog.d").glob("*.md")]
)
SOURCES = ("sage_core", "sage_sim", "sage_live", "sage_bench", "policies", "native")


def invariants() -> dict[int, str]:
    """Rows of the table by number."""
    rows = re.findall(r"^\| (\d+) \|(.*)$", ROOT.joinpath("INVARIANTS.md").read_text(), re.M)
    return {int(number): row for number, row in rows}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    missing = [link for link in targets if "://" not in link and not document.parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "INVARIANTS.md"])
def test_files_named_in_backticks_exist(document: str) -> None:
    named = re.findall(r"`((?:\w[\w.-]*/)+[\w.-]*)`", ROOT.joinpath(document).read_text())
    assert named
    assert [path for path in named if not path.startswith("results/") and not ROOT.joinpath(path).exists()] == []


def test_invariants_are_numbered_without_gaps_and_each_names_its_test() -> None:
    rows = invariants()
    assert list(rows) == list(range(1, len(rows) + 1))
    for number, row in rows.items():
        tests = re.findall(r"tests/[\w/]+\.py", row)
        assert tests, f"invariant {number} names no test"
        for test in tests:
            assert ROOT.joinpath(test).is_file(), f"invariant {number}: {test} does not exist"


def test_every_invariant_that_the_code_cites_is_in_the_document() -> None:
    known = invariants()
    cited: dict[int, Path] = {}
    for folder in SOURCES:
        for path in sorted(ROOT.joinpath(folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".hpp"):
                cited |= {int(number): path for number in re.findall(r"\binvariant (\d+)\b", path.read_text())}
    assert cited
    assert {number: path for number, path in cited.items() if number not in known} == {}


def test_commands_of_the_readme_exist() -> None:
    from typer.main import get_command

    from sage_bench.cli import command

    known = set(get_command(command()).commands)  # type: ignore[attr-defined]  # a Typer with several commands is a group
    shown = set(
        re.findall(
            r"\bsage ([a-z]+)\b", "\n".join(re.findall(r"```\n(.*?)```", ROOT.joinpath("README.md").read_text(), re.S))
        )
    )
    assert shown
    assert shown <= known


def test_experiments_and_policies_of_the_readme_exist() -> None:
    readme = ROOT.joinpath("README.md").read_text()
    for group in ("experiment", "policy", "load"):
        for names in re.findall(rf"\b{group}=([\w,/]+)", readme):
            for name in names.split(","):
                assert ROOT.joinpath(f"conf/{group}/{name}.yaml").is_file(), f"{group}={name}"
