"""The system itself, as a chapter of the report: figures of its structure and the summary of its implementation.

Nothing here is drawn by hand from memory: layers come from the import graph, pipelines from the shipped files, counts from
the tree, and every name in a diagram is looked up in the code by a test.
"""

from __future__ import annotations

from functools import partial

from sage_bench.compose import device_makers, make_parts
from sage_bench.config import checked, composed
from sage_bench.pipelines.draw import pipeline_figure
from sage_bench.pipelines.file import load_pipeline
from sage_bench.pipelines.predict import Prediction, predict, speeds_of
from sage_bench.pipelines.show import span
from sage_bench.publish.system.control_plane import CONTROL_PLANE
from sage_bench.publish.system.diagram import drawn
from sage_bench.publish.system.execution import execution_figure
from sage_bench.publish.system.facts import Facts, checkout, facts_of
from sage_bench.publish.system.layers import layers_figure, overview_figure
from sage_bench.publish.system.routing import ROUTING
from sage_bench.publish.system.workflow import WORKFLOW
from sage_bench.studies.findings import Drawing, Findings, TableOf
from sage_bench.tables import Sheet

CLUSTER = "pipelines"
REQUEST_TOKENS, ANSWER_TOKENS = 100, 256
"""Of the request that plans are drawn for: those of ``sage pipeline show``."""


def system_findings() -> Findings:
    """Figures 1 to 5 and 7 of the system, how requests are routed, and the implementation summary.

    What is counted or read from the import graph needs a checkout; without one it is left out and ``notes`` says so.
    Raises :class:`DataError` where a checkout cannot be read.
    """
    root = checkout()
    if root is None:
        note = "Layers and counts of the sources are left out: they need a checkout and its developer tools."
        return Findings([], drawings(), [], [], notes=[note])
    facts = facts_of(root)
    return Findings([implementation(facts)], [*_layers(facts), *drawings()], [_sizes(facts)], [])


def drawings() -> list[Drawing]:
    """The figures that need no checkout."""
    rag, summarize = plan_of("rag"), plan_of("summarize")
    tasks = [stage for stage in summarize.stages if stage.expected and stage.pool]
    return [
        Drawing(
            "pipeline",
            f"A declared pipeline: conf/pipeline/rag.yaml, {len(rag.stages)} stages on {_pools(rag)} pools. Predicted for an "
            f"idle cluster ({CLUSTER}): {span(rag.total_ns)}, the critical path is bold.",
            partial(pipeline_figure, rag),
        ),
        Drawing(
            "execution",
            f"Execution model: conf/pipeline/summarize.yaml, {len(summarize.stages)} stages when it is compiled, as {len(tasks)} "
            f"tasks on their pools; spans predicted for an idle cluster ({CLUSTER}). Columns are steps of the graph, not "
            "lengths of time. Heavy: the critical path. Left out: joins, and parts that a text of this length does not have.",
            partial(execution_figure, summarize),
        ),
        Drawing(
            "control_plane",
            "The control plane. Policies are the four parts and the predictor; the mechanism decides with their scores. Two "
            "drivers pump the same plane, and a log of either replays.",
            partial(drawn, CONTROL_PLANE),
        ),
        Drawing(
            "routing",
            "Classification and routing. Endpoint, body and model name give the kind of a request; the pool's policy chooses "
            "among the replicas behind it.",
            partial(drawn, ROUTING),
            core=False,
        ),
        Drawing(
            "workflow",
            "From configuration to a live cluster and back. The same files are simulated and deployed; what was measured "
            "is compared, replayed and asked what-if.",
            partial(drawn, WORKFLOW),
        ),
    ]


def plan_of(pipeline: str) -> Prediction:
    """The plan of a shipped pipeline on the cluster that they are shown on, as ``sage pipeline show`` makes it."""
    config, _ = checked(composed([f"cluster={CLUSTER}"]))
    speeds = speeds_of(joined for make in device_makers(make_parts(config)) for joined in make(0).joined())
    return predict(load_pipeline(pipeline), speeds, input_tokens=REQUEST_TOKENS, output_tokens_max=ANSWER_TOKENS)


def implementation(facts: Facts) -> TableOf:
    """Table 1: what there is of each package."""
    columns = ["package", "layer", "language", "files", "lines\nof code", "test\nfunctions", "depends on", "artefacts"]
    rows = [
        [
            each.package,
            each.layer,
            each.language,
            f"{each.files:,}",
            f"{each.lines:,}",
            f"{each.tests:,}" if each.tests else "",
            ", ".join(each.dependencies),
            ", ".join(each.artefacts),
        ]
        for each in facts.packages
    ]
    total = [sum(getattr(each, name) for each in facts.packages) for name in ("files", "lines", "tests")]
    rows.append(["all", "", "", *(f"{count:,}" for count in total), "", ""])
    caption = (
        "Counted by tools/implementation_summary.py. Lines of code: without blank lines, comments "
        "and docstrings. Depends on: distributions imported; * optional, installed by an extra or by developers."
    )
    return TableOf("implementation", caption, Sheet("Implementation summary", columns, rows))


def _sizes(facts: Facts) -> str:
    product = [each for each in facts.packages if each.layer]
    tests = sum(each.tests for each in facts.packages)
    lines = {name: sum(each.lines for each in product if each.language == name) for name in ("Python", "C++")}
    return (
        f"The six layers are {lines['Python']:,} lines of Python and {lines['C++']:,} lines of C++, "
        f"without blank lines, comments and docstrings, and {tests:,} test functions hold them."
    )


def _layers(facts: Facts) -> list[Drawing]:
    edges = sum(len(box.imports) for box in facts.layers)
    return [
        Drawing(
            "overview",
            "System overview: users, the layers with their packages, engines and results. From the layer map.",
            partial(overview_figure, facts.layers),
        ),
        Drawing(
            "layers",
            f"Layers and their modules. A dot on an arrow: imports from. All {edges} of these dependencies point downwards; "
            "an upward import fails the build. From the import graph.",
            partial(layers_figure, facts.layers),
        ),
    ]


def _pools(plan: Prediction) -> int:
    return len({stage.pool for stage in plan.stages if stage.pool})
