"""The positioning page: rows are complete, cited tests and files exist, and words are neutral."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest

from sage_bench.publish.mapping import PAPER
from sage_bench.studies.registry import STUDIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/positioning.md"
SYSTEMS = (
    "vLLM", "TensorRT-LLM", "SGLang", "Orca", "Ray Serve", "KServe", "Triton Inference Server", "LangChain", "LlamaIndex",
    "DSPy", "MLflow", "Kubeflow", "Airflow", "AgentBench", "ToolBench", "HELM", "vLLM benchmark", "vector indexes",
    "time-series databases", "dataflow systems",
)  # fmt: skip
"""Named in the requirements; each has a row."""
SECTIONS = (
    "LLM serving engines", "ML serving frameworks", "LLM application frameworks and agents", "ML workflow platforms",
    "LLM benchmarks and evaluation", "Data and storage systems for AI",
)  # fmt: skip
MARKETING = re.compile(
    r"\b(state[- ]of[- ]the[- ]art|blazing|lightning[- ]fast|seamless\w*|revolutionary|cutting[- ]edge|best[- ]in[- ]class|"
    r"world[- ]class|unparalleled|unprecedented|game[- ]chang\w+|powerful|effortless\w*|groundbreaking|breakthrough|superior|"
    r"industry[- ]leading|next[- ]gen\w*|turbocharge\w*|supercharge\w*|unleash\w*|robust and scalable|magic\w*)\b",
    re.IGNORECASE,
)
PRIORITY = re.compile(
    r"\b(?:the|our|is|a|as) first (?:\w+ )?(?:system|framework|simulator|control plane|platform|work|benchmark|harness|unified)\b"
    r"|\bfirst[- ](?:ever|of[- ]its[- ]kind)\b|\bthe first to (?:schedule|unify|combine|integrate|offer|provide|support)\b",
    re.IGNORECASE,
)
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.joinpath("docs").rglob("*.md"), *ROOT.joinpath("changelog.d").glob("*.md")]
)


def page() -> str:
    return PAGE.read_text("utf-8")


def section(text: str, title: str) -> str:
    """From a heading to the next of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$", text, re.M)
    assert found, f"no section {title!r}"
    level = len(found[1])
    after = text[found.end() :].splitlines()
    return "\n".join(takewhile(lambda line: not re.match(rf"#{{1,{level}}} ", line), after))


def rows(text: str) -> list[list[str]]:
    """Cells of every row of every table, headings and rules left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    found = []
    for i, line in enumerate(lines):
        rule = re.fullmatch(r"[|\-: ]+", line)
        heading = i + 1 < len(lines) and re.fullmatch(r"[|\-: ]+", lines[i + 1])
        if not rule and not heading:
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


@cache
def functions_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def missing_tests(text: str) -> list[str]:
    cited = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    return [
        f"{path}::{name}"
        for path, name in cited
        if not ROOT.joinpath(path).is_file() or (name and name not in functions_in(ROOT / path))
    ]


def incomplete(cells: list[str]) -> str | None:
    """Why a row of the systems is not complete; None where it is."""
    if len(cells) != 6:
        return f"{len(cells)} cells"
    if not all(cells):
        return "an empty cell"
    *_, evidence, date, source = cells
    if not re.search(r"\b(measured|measured once|read)\b", evidence):
        return f"evidence {evidence!r} says neither measured nor read"
    if re.search(r"\bmeasured: (?!`)", evidence):
        return f"evidence {evidence!r} names no command"
    if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])(-\d\d)?", date):
        return f"date {date!r}"
    if not re.fullmatch(r"https://[\w.-]+/\S*", source):
        return f"source {source!r}"
    return None


def test_every_system_has_a_complete_row() -> None:
    found = rows(section(page(), "Systems"))
    assert [(cells[0], why) for cells in found if (why := incomplete(cells))] == []
    named = [cells[0] for cells in found]
    assert [system for system in SYSTEMS if not any(name.startswith(system) for name in named)] == []
    assert len(named) == len(set(named))


@pytest.mark.parametrize("title", SECTIONS)
def test_every_category_has_a_section(title: str) -> None:
    assert rows(section(page(), title))


@pytest.mark.parametrize(
    "row",
    [
        "| a | b | c | read | 2026-11 |  |",
        "| a | b | c | known | 2026-11 | https://x.org/ |",
        "| a | b | c | read | now | https://x.org/ |",
        "| a | b | c | read | 2026-11 | a book |",
        "| a | b | c | measured: yes | 2026-11 | https://x.org/ |",
        "| a | b | read | 2026-11 | https://x.org/ |",
    ],
)
def test_canary_an_incomplete_row_is_noticed(row: str) -> None:
    (cells,) = rows(row)
    assert incomplete(cells)


def test_what_was_measured_names_a_command_that_exists() -> None:
    targets = re.findall(r"^([\w-]+):", ROOT.joinpath("Makefile").read_text(), re.M)
    for command in re.findall(r"`((?:make|python) [^`]+)`", page()):
        tool, argument = command.split()[:2]
        assert argument in targets if tool == "make" else ROOT.joinpath(argument).is_file(), command


def test_every_cited_test_exists() -> None:
    assert missing_tests(page()) == []
    assert missing_tests("`tests/dev/test_positioning.py::test_nowhere`") != []


def test_reviewers_questions_cite_an_arm_a_policy_test_the_layer_map_and_the_experiment() -> None:
    answers = [part for part in section(page(), "Questions of reviewers").split("\n\n") if part.startswith("**")]
    assert len(answers) == 4
    vllm, ray, langchain, unified = answers
    assert "conf/arm/control_plane" in vllm and "`vllm_only`" in vllm
    for arm in ("vllm_only", "unified"):
        assert ROOT.joinpath(f"conf/arm/control_plane/{arm}.yaml").is_file()
    assert re.search(r"`tests/policies/\w+\.py::\w+`", ray)
    assert "ARCHITECTURE.md#layers" in langchain
    assert "sage paper --only control_plane" in unified and "constant" in unified


def test_five_things_have_a_test_each() -> None:
    found = rows(section(page(), "Five things that SAGE adds to vLLM"))
    assert len(found) == 5
    assert all(re.search(r"`tests/[\w/]+\.py::\w+`", cells[2]) for cells in found)


def test_the_ledger_lists_prior_systems_with_sources_and_five_parts_with_evidence() -> None:
    ledger = section(page(), "Claim ledger")
    prior = [cells for cells in rows(ledger) if len(cells) == 5]
    assert len(prior) >= 5 and all(all(cells) and cells[4].startswith("https://") for cells in prior)
    parts = [cells for cells in rows(ledger) if len(cells) == 2]
    assert [cells[0] for cells in parts] == ["layers", "dataflow", "control plane", "mixed hardware", "benchmarks"]
    assert all(re.search(r"\]\(.+\), `tests/", cells[1]) for cells in parts)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_neutral_and_priority_is_claimed_in_the_ledger_only(document: Path) -> None:
    text = document.read_text("utf-8")
    assert MARKETING.findall(text) == []
    if document == PAGE:
        text = text.replace(section(text, "Claim ledger"), "")
    assert PRIORITY.findall(text) == []


def test_canary_marketing_and_priority_are_noticed() -> None:
    assert MARKETING.search("a blazing, state-of-the-art system")
    assert PRIORITY.search("SAGE is the first unified control plane")
    assert PRIORITY.search("the first open framework")
    assert not PRIORITY.search("the first token of the first request")


def test_the_coverage_of_agent_benchmarks_borrows_no_numbers() -> None:
    found = rows(section(page(), "What agent benchmarks cover"))
    assert len(found) >= 10
    assert all(len(cells) == 6 and all(cells) for cells in found)
    assert not [cell for cells in found for cell in cells if re.search(r"\d", cell)]


# --- docs/experiments.md ----------------------------------------------------------------------------------------------


def experiments() -> str:
    return ROOT.joinpath("docs/experiments.md").read_text("utf-8")


def test_every_experiment_is_there_and_has_one_command() -> None:
    named = set(re.findall(r"experiment=([\w/]+)", experiments()))
    assert named
    assert [name for name in named if not ROOT.joinpath(f"conf/experiment/{name}.yaml").is_file()] == []
    entry = rows(section(experiments(), "Five entry points"))
    assert [cells[0] for cells in entry] == [f"5.{i}" for i in range(1, 6)]
    assert all(re.fullmatch(r"`sage paper --only \w+`", cells[2]) for cells in entry)


def test_the_papers_list_is_that_of_the_report() -> None:
    mapped = rows(section(experiments(), "The paper's list"))
    assert [(cells[0], tuple(re.findall(r"`(\w+)`", cells[2]))) for cells in mapped] == [
        (number, studies) for number, _, studies in PAPER
    ]
    placed = {cells[0].strip("`"): cells[2] for cells in rows(section(experiments(), "Core and supplement"))}
    assert set(placed) == {study for _, _, studies in PAPER for study in studies}
    assert set(placed.values()) == {"core", "supplement"}


def test_a_study_that_is_registered_makes_the_runs_that_the_page_says() -> None:
    for study in STUDIES:
        assert study.name in {name for _, _, studies in PAPER for name in studies}
    for cells in rows(section(experiments(), "Five entry points")):
        name = cells[2].strip("`").split()[-1]
        said = set(re.findall(r"experiment=([\w/]+)", cells[3]))
        assert [study for study in STUDIES if study.name == name and set(study.experiments) != said] == []
