"""Figures of the system: every name they show is in the code, and no text leaves its box, its page, or touches another."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from sage_bench.cli.app import COMMANDS, MODULES
from sage_bench.figures.style import save
from sage_bench.pipelines.predict import Prediction
from sage_bench.publish.system.control_plane import CONTROL_PLANE
from sage_bench.publish.system.diagram import PAGE_IN, Arrow, Diagram, Node, drawn
from sage_bench.publish.system.execution import execution_figure, read_plan
from sage_bench.publish.system.facts import Facts, checkout, facts_of
from sage_bench.publish.system.layers import LayerBox, layers_figure, overview
from sage_bench.publish.system.routing import ROUTING
from sage_bench.publish.system.system import plan_of, system_findings
from sage_bench.publish.system.workflow import WORKFLOW
from sage_core.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"OpenAI", "OpenLoop", "LLM", "API", "GPU", "CPU", "HTTP", "vLLM", "YAML", "SimPy", "OpenAI's"}
"""Words that look like names of the code and are not."""


@pytest.fixture(scope="module")
def facts() -> Facts:
    root = checkout()
    assert root == ROOT
    return facts_of(root)


@cache
def targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([\w-]+):", ROOT.joinpath("Makefile").read_text(), re.M))


def resolve(ref: str) -> None:
    """Raises where ``ref`` is nothing: a name of the code, a path, a command or a target of the Makefile."""
    words = ref.split()
    if words[0] == "sage":
        assert words[1] in COMMANDS, f"{ref}: no such command"
        module = importlib.import_module(f"sage_bench.cli.{MODULES.get(words[1], words[1])}")
        if len(words) > 2:
            groups = [each.name or each.callback.__name__.strip("_") for each in module.app.registered_commands]
            assert words[2] in groups, f"{ref}: no such command"
    elif words[0] == "make":
        assert words[1] in targets(), f"{ref}: no such target"
    elif "/" in ref:
        assert ROOT.joinpath(ref).exists(), f"{ref}: no such path"
    else:
        pkgutil.resolve_name(ref)


def diagrams(facts: Facts) -> dict[str, Diagram]:
    return {
        "overview": overview(facts.layers),
        "control_plane": CONTROL_PLANE,
        "routing": ROUTING,
        "workflow": WORKFLOW,
    }


@pytest.mark.parametrize("name", ["overview", "control_plane", "routing", "workflow"])
def test_every_name_in_a_diagram_is_in_the_code(name: str, facts: Facts) -> None:
    for lines, refs in diagrams(facts)[name].named():
        for ref in refs:
            resolve(ref)
        ends = {re.split(r"[:./ ]", ref.rstrip("/"))[-1] for ref in refs} | set(refs)
        for line in lines:
            # What looks like code: a capital within a word, capitals joined by underscores, or a command.
            for word in re.findall(r"\b(?:[A-Z]\w*[a-z]\w*[A-Z]\w*|[A-Z]+_[A-Z_]+|sage_\w+)\b", line):
                assert word in OUTSIDE or any(word in each for each in ends), f"{name}: {word} in {line!r} has no ref"
            for command in re.findall(r"\b(?:sage|make) [a-z]+", line):
                assert any(ref.startswith(command) for ref in refs), f"{name}: {command} in {line!r} has no ref"


def test_a_name_that_is_not_in_the_code_is_noticed() -> None:
    for gone in ("sage_core.plane:Nowhere", "conf/nowhere/", "sage nowhere", "sage cluster nowhere", "make nowhere"):
        with pytest.raises((AssertionError, AttributeError)):
            resolve(gone)


def figures(facts: Facts) -> Iterator[tuple[str, Figure]]:
    for name, diagram in diagrams(facts).items():
        yield name, drawn(diagram)
    yield "layers", layers_figure(facts.layers)
    for pipeline in ("summarize", "rag", "agent"):
        yield f"execution of {pipeline}", execution_figure(plan_of(pipeline))


def troubles(figure: Figure) -> list[str]:
    """Texts that leave the page or a box they begin in, or overlap; and boxes that overlap."""
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.draw(renderer)
    boxes = [
        patch.get_window_extent(renderer) for patch in axes.patches if isinstance(patch, FancyBboxPatch) and patch.get_zorder() == 3
    ]  # fmt: skip
    texts = {
        text.get_text(): Text.get_window_extent(text, renderer)
        for text in axes.texts
        if not isinstance(text, Annotation) and text.get_text()
    }
    found = []
    page = figure.bbox
    for said, extent in texts.items():
        if not inside(extent, page):
            found.append(f"{said!r} leaves the page")
        middle = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
        home = [box for box in boxes if box.contains(*middle)]
        if any(not inside(extent, box) for box in home):
            found.append(f"{said!r} leaves its box")
        if not home and any(extent.overlaps(box) for box in boxes):
            found.append(f"{said!r} lies on a box")
    for (a, one), (b, other) in combinations(texts.items(), 2):
        if one.overlaps(other):
            found.append(f"{a!r} lies on {b!r}")
    found += ["two boxes overlap" for one, other in combinations(boxes, 2) if one.overlaps(other)]
    return found


def inside(inner: Bbox, outer: Bbox) -> bool:
    return inner.x0 >= outer.x0 and inner.x1 <= outer.x1 and inner.y0 >= outer.y0 and inner.y1 <= outer.y1


def test_no_text_is_clipped_or_overlaps_and_every_figure_fits_a_page(facts: Facts) -> None:
    for name, figure in figures(facts):
        assert troubles(figure) == [], name
        width, height = figure.get_size_inches()
        if not name.endswith("agent"):  # the longest loop that is shipped; it is not a figure of the paper
            assert width <= PAGE_IN + 0.01 and height <= 9, name


@pytest.mark.parametrize(
    ("nodes", "trouble"),
    [
        ([Node("a", 1, 0.5, 0.3, 0.3, ("wider than its box",))], "leaves its box"),
        ([Node("a", 0.2, 0.5, 1.2, 0.3, ("wider than it",))], "leaves the page"),
        ([Node("a", 1, 0.5, 0.6, 0.3, ("a",)), Node("b", 1.4, 0.5, 0.6, 0.3, ("b",))], "two boxes overlap"),
        ([Node("a", 1, 0.5, 0.6, 0.11, ("one", "two"))], "lies on a box"),
    ],
)
def test_canary_what_is_drawn_badly_is_noticed(nodes: list[Node], trouble: str) -> None:
    assert any(trouble in each for each in troubles(drawn(Diagram(2.0, 1.0, nodes))))


def test_canary_a_label_on_a_box_is_noticed() -> None:
    node = Node("a", 1, 0.5, 0.6, 0.3, ("a",))
    arrow = Arrow(((0.1, 0.9), (1.0, 0.9)), "a label", (1.45, 0.5))
    assert "'a label' lies on a box" in troubles(drawn(Diagram(2.0, 1.0, [node], [arrow])))


def test_arrows_of_the_layers_point_downwards(facts: Facts) -> None:
    names = [box.name for box in facts.layers]
    assert len(names) > 6
    for box in facts.layers:
        assert all(names.index(other) > names.index(box.name) for other in box.imports)
    figure = layers_figure(facts.layers)
    heads = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert len(heads) == len({other for box in facts.layers for other in box.imports})


def test_findings_draw_every_figure_twice_the_same(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage_bench.publish.system.system.facts_of", lambda root: facts)  # read once is enough
    found = system_findings()
    names = [drawing.name for drawing in found.figures]
    assert names == ["overview", "layers", "pipeline", "execution", "control_plane", "routing", "workflow"]
    for drawing in found.figures[:1]:
        once, again = (save(drawing.draw(), tmp_path / str(i) / drawing.name) for i in range(2))
        assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    assert found.tables[0].sheet.rows[-1][0] == "all"
    assert all(len(row) == len(found.tables[0].sheet.columns) for row in found.tables[0].sheet.rows)


def test_a_wheel_without_sources_says_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sage_bench.publish.system.system.checkout", lambda: None)
    found = system_findings()
    assert not found.tables and "need a checkout" in found.notes[0]
    assert [drawing.name for drawing in found.figures] == [
        "pipeline",
        "execution",
        "control_plane",
        "routing",
        "workflow",
    ]


def test_the_execution_is_drawn_from_a_dump_of_the_plan(tmp_path: Path) -> None:
    plan = plan_of("summarize")
    path = tmp_path / "plan.json"
    path.write_bytes(msgspec.json.encode(plan))
    assert read_plan(path) == plan
    shown = {text.get_text() for text in execution_figure(read_plan(path)).axes[0].texts}
    tasks = {stage.stage for stage in plan.stages if stage.expected and stage.pool}
    assert tasks < shown and "partial" not in shown  # a join is no task


@pytest.mark.parametrize("content", [b"", b"{", b'{"pipeline": "x"}', b"PAR1"])
def test_a_dump_that_is_none_is_a_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"plan\.json: expected a plan"):
        read_plan(path)


def test_a_plan_without_tasks_is_a_clear_error() -> None:
    plan = Prediction("empty", "", 1, 1, "request", [], [], None, None)
    with pytest.raises(DataError, match="no stage is expected to run"):
        execution_figure(plan)


# --- the implementation summary -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def summary() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("implementation_summary")
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.cpp", "int a; // one\n\n/* two\nlines */\nint b;\n", 2),
        ("a.cpp", 'auto s = "// no comment";\n', 1),
        ("a.hpp", "int a = '\"'; /* x */ int b;\n", 1),
        ("a.yaml", "# a comment\n\na: 1  # one\n  # indented\nb: [1,\n  2]\n", 3),
        ("a.py", '"""Doc."""\n\nx = 1\n', 1),
        ("a.md", "text\n", 0),
    ],
)
def test_lines_of_code(summary: Any, name: str, text: str, lines: int, tmp_path: Path) -> None:
    tmp_path.joinpath(name).write_text(text)
    assert summary.lines_of(tmp_path / name) == lines


def test_test_functions_are_counted(summary: Any) -> None:
    text = "def test_a(): ...\ndef helper(): ...\nasync def test_b(): ...\nclass T:\n    def test_c(self): ...\nTestPlane = Machine.TestCase\n"
    assert summary.tests_in(text) == 4


def test_a_file_that_cannot_be_parsed_is_named(summary: Any, tmp_path: Path) -> None:
    for text in ("def f(:\n", "x = (1,\n"):
        tmp_path.joinpath("broken.py").write_text(text)
        with pytest.raises(SystemExit, match=r"broken\.py: cannot be parsed"):
            summary.lines_of(tmp_path / "broken.py") or summary._of(tmp_path / "broken.py", summary.tests_in)


def test_a_tool_that_fails_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.joinpath("tools").mkdir()
    tmp_path.joinpath("tools/implementation_summary.py").write_text("raise SystemExit('x.py: cannot be parsed')\n")
    with pytest.raises(DataError, match=r"implementation_summary\.py: failed: x\.py: cannot be parsed"):
        facts_of(tmp_path)


def test_counts_are_those_of_the_tree(facts: Facts) -> None:
    rows = {each.package: each for each in facts.packages}
    assert rows["sage_sim"].files == len(list(ROOT.joinpath("sage_sim").rglob("*.py")))
    assert "simpy" in rows["sage_sim"].dependencies and "simpy" not in rows["sage_core"].dependencies
    assert rows["native"].artefacts == ("_native",)
    assert "command sage" in rows["sage_bench"].artefacts
    assert rows["conf"].lines > rows["conf"].files > 0


def test_the_tool_prints_and_writes(
    summary: Any, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "implementation.json"
    counted = [summary.Counts(**msgspec.structs.asdict(each)) for each in facts.packages]
    monkeypatch.setattr(summary, "counted", lambda root: counted)  # once is enough
    monkeypatch.setattr(sys, "argv", ["implementation_summary", "--out", str(out)])
    summary.main()
    assert "sage_core" in capsys.readouterr().out
    assert {row["package"] for row in json.loads(out.read_text())} >= {"sage_core", "native", "conf"}


def test_a_layer_map_of_other_boxes_is_drawn_too() -> None:
    """Nothing in the drawing knows our packages but by the map."""
    boxes = (
        LayerBox("L6", "upper", "asks", ("a", "b"), ("middle", "lower")),
        LayerBox("L5", "middle", "runs", ("c",), ("lower",)),
        LayerBox("L1", "lower", "says", (), ()),
    )
    figure = layers_figure(boxes)
    assert troubles(figure) == []
    assert {"L6  upper, asks", "a, b", "L1  lower, says"} <= {text.get_text() for text in figure.axes[0].texts}
