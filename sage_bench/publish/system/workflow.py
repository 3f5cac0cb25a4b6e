"""From configuration to a live cluster and back: the commands, and the tools around them."""

from __future__ import annotations

from typing import Final

from sage_bench.publish.system.diagram import PAGE_IN, Arrow, Diagram, Group, Node

_CONF: Final = Node(
    "conf", 0.97, 2.78, 1.35, 0.56, ("conf/", "pipeline, policy, load,", "cluster, experiment"), "L1",
    ("conf/", "conf/pipeline/", "conf/policy/", "conf/load/", "conf/cluster/", "conf/experiment/"),
)  # fmt: skip
_CHECK: Final = Node(
    "check",
    2.55,
    2.78,
    1.35,
    0.56,
    ("check", "sage pipeline check", "sage cluster plan"),
    "L6",
    ("sage pipeline check", "sage cluster plan"),
)
_SIMULATE: Final = Node(
    "simulate", 4.3, 2.78, 1.45, 0.56, ("simulate", "sage run", "sage run --multirun"), "L6", ("sage run",)
)
_RESULTS: Final = Node(
    "results", 6.1, 2.25, 1.5, 0.68, ("results/", "rows and log: Parquet", "manifest.json: settings,", "versions, seeds, hardware"), "L1", ("results/",)
)  # fmt: skip
_UP: Final = Node(
    "deploy",
    2.55,
    1.72,
    1.35,
    0.56,
    ("deploy", "sage cluster up", "sage gateway start"),
    "L6",
    ("sage cluster up", "sage gateway start"),
)
_MEASURE: Final = Node("measure", 4.3, 1.72, 1.45, 0.56, ("measure", "sage run driver=live"), "L6", ("sage run",))
_CALIBRATE: Final = Node(
    "calibrate",
    0.97,
    1.72,
    1.35,
    0.56,
    ("calibrate", "sage calibrate", "a profile of an engine"),
    "L6",
    ("sage calibrate",),
)
_REPORT: Final = Node(
    "publish", 6.1, 0.98, 1.5, 0.56, ("publish", "sage report", "sage paper"), "L6", ("sage report", "sage paper")
)
_TRUST: Final = Node(
    "trust", 4.3, 0.98, 1.45, 0.56, ("compare", "sage validate, sage replay", "sage whatif"), "L6", ("sage validate", "sage replay", "sage whatif")
)  # fmt: skip
_TOOLS: Final = (
    Node("quickstart.sh", 0.98, 0.25, 1.5, 0.34, ("quickstart.sh", "installs"), "outside", ("./quickstart.sh",)),
    Node("make demo", 2.66, 0.25, 1.5, 0.34, ("make demo", "shows"), "outside", ("make demo",)),
    Node("make test", 4.34, 0.25, 1.5, 0.34, ("make test", "lints and tests"), "outside", ("make test", "make lint")),
    Node("make docs", 6.02, 0.25, 1.5, 0.34, ("make docs", "redraws from the code"), "outside", ("make docs",)),
)  # fmt: skip

WORKFLOW: Final = Diagram(
    PAGE_IN, 3.14,
    (_CONF, _CHECK, _SIMULATE, _RESULTS, _UP, _MEASURE, _CALIBRATE, _REPORT, _TRUST, *_TOOLS),
    (
        Arrow((_CONF.at("e"), _CHECK.at("w"))),
        Arrow((_CHECK.at("e"), _SIMULATE.at("w"))),
        Arrow((_CHECK.at("s"), _UP.at("n"))),
        Arrow((_UP.at("e"), _MEASURE.at("w"))),
        Arrow((_SIMULATE.at("e"), (5.6, _SIMULATE.y), (5.6, _RESULTS.y + 0.34))),
        Arrow((_MEASURE.at("e"), (5.2, _MEASURE.y), (5.2, _RESULTS.y), _RESULTS.at("w"))),
        Arrow((_RESULTS.at("s", 0.2), _REPORT.at("n", 0.2))),
        Arrow((_RESULTS.at("s", -0.5), (5.6, 1.36), (4.7, 1.36), (4.7, 1.26))),
        Arrow((_UP.at("w"), _CALIBRATE.at("e"))),
        Arrow((_CALIBRATE.at("n"), _CONF.at("s")), "profile", (0.97, 2.26)),
        Arrow((_TRUST.at("w"), (0.12, _TRUST.y), (0.12, _CONF.y), _CONF.at("w")), "the next question", (1.9, _TRUST.y), dashed=True),
    ),
    (Group(3.5, 0.34, 6.84, 0.62, "around it"),),
)  # fmt: skip
"""Commands and make targets that the figure shows exist; a test looks them up."""
