"""The control plane: what a policy is asked, and the two drivers that pump the same plane."""

from __future__ import annotations

from typing import Final

from sage_bench.publish.system.diagram import PAGE_IN, Arrow, Diagram, Group, Node

_RUN: Final = Node(
    "Run", 0.85, 4.0, 1.25, 0.5, ("Run", "stages that are ready", "become tasks"), "L3", ("sage_core.executor:Run",)
)
_PREDICT: Final = Node(
    "Predict", 2.3, 4.0, 1.05, 0.5, ("Predict", "output tokens", "to expect"), "L4", ("sage_core.policy:Predict",)
)
_ADMIT: Final = Node(
    "Admit", 3.6, 4.0, 1.0, 0.5, ("Admit", "into the queue,", "or not"), "L4", ("sage_core.policy:Admit",)
)
_TASKS: Final = Node(
    "TaskView", 4.95, 4.0, 1.15, 0.5, ("TaskView", "a pool's queue", "as columns"), "L3", ("sage_core.policy:TaskView",)
)
_REPLICAS: Final = Node(
    "ReplicaView",
    6.28,
    4.0,
    1.05,
    0.5,
    ("ReplicaView", "its replicas", "as columns"),
    "L3",
    ("sage_core.policy:ReplicaView",),
)
_ORDER: Final = Node("Order", 0.85, 3.2, 1.05, 0.42, ("Order", "who goes first"), "L4", ("sage_core.policy:Order",))
_LIMIT: Final = Node("Limit", 2.22, 3.2, 1.3, 0.42, ("Limit", "how much each holds"), "L4", ("sage_core.policy:Limit",))
_ROUTE: Final = Node("Route", 3.55, 3.2, 1.0, 0.42, ("Route", "which replica"), "L4", ("sage_core.policy:Route",))
_MECHANISM: Final = Node(
    "Mechanism", 5.62, 3.2, 2.1, 0.48,
    ("Mechanism", "selects by (score, id), counts load", "within the step, loses no task"), "L2",
    ("sage_core._native:Mechanism", "sage_core.reference:Mechanism"),
)  # fmt: skip
_LOG: Final = Node(
    "Chain", 3.5, 1.95, 1.6, 0.5, ("Chain", "log: now, events and the", "digest of every step"), "L3", ("sage_core.log:Chain",)
)  # fmt: skip
_REPLAY: Final = Node(
    "replay", 3.5, 1.05, 1.3, 0.5, ("replay", "decides again:", "the same digests"), "L3", ("sage_core.replay:replay",)
)
_LIVE: Final = Node(
    "LiveDriver", 1.85, 1.05, 1.3, 0.42, ("LiveDriver", "asyncio: real time"), "L5", ("sage_live.driver:LiveDriver",)
)
_SIM: Final = Node(
    "SimDriver", 5.15, 1.05, 1.3, 0.42, ("SimDriver", "SimPy: virtual time"), "L5", ("sage_sim.driver:SimDriver",)
)
_GATEWAY: Final = Node(
    "Gateway", 0.62, 0.3, 1.1, 0.46, ("Gateway", "OpenAI's API;", "RequestClassifier"), "L5",
    ("sage_live.gateway.app:Gateway", "sage_core.classify:RequestClassifier"),
)  # fmt: skip
_HTTP: Final = Node(
    "HttpEngine",
    2.45,
    0.3,
    1.7,
    0.46,
    ("HttpEngine", "vLLM and other engines,", "unchanged, over HTTP"),
    "L5",
    ("sage_live.http_engine:HttpEngine",),
)
_MODEL: Final = Node(
    "BackendModel",
    4.55,
    0.3,
    1.7,
    0.46,
    ("BackendModel", "engines modelled iteration", "by iteration"),
    "L5",
    ("sage_core.backend:BackendModel",),
)
_LOAD: Final = Node(
    "OpenLoop",
    6.38,
    0.3,
    1.1,
    0.46,
    ("OpenLoop", "arrivals of a seed", "or a trace"),
    "L6",
    ("sage_bench.loads.open_loop:OpenLoop",),
)

_BUS: Final = 2.86
"""Height of the line that carries scores to the mechanism."""

CONTROL_PLANE: Final = Diagram(
    PAGE_IN, 4.72,
    (_RUN, _PREDICT, _ADMIT, _TASKS, _REPLICAS, _ORDER, _LIMIT, _ROUTE, _MECHANISM, _LOG, _REPLAY, _LIVE, _SIM, _GATEWAY, _HTTP, _MODEL, _LOAD),
    (
        Arrow((_RUN.at("e"), _PREDICT.at("w"))),
        Arrow((_PREDICT.at("e"), _ADMIT.at("w"))),
        Arrow((_ADMIT.at("e"), _TASKS.at("w"))),
        Arrow((_TASKS.at("s"), (_TASKS.x, _MECHANISM.y + 0.24))),
        Arrow((_REPLICAS.at("s"), (_REPLICAS.x, _MECHANISM.y + 0.24))),
        *(Arrow((part.at("s"), (part.x, _BUS), (_MECHANISM.x, _BUS), _MECHANISM.at("s"))) for part in (_ORDER, _LIMIT)),
        Arrow((_ROUTE.at("s"), (_ROUTE.x, _BUS), (_MECHANISM.x, _BUS), _MECHANISM.at("s")), "scores, lower first", (4.6, _BUS)),
        Arrow(((1.55, 2.66), (1.55, 1.26)), "commands", (1.55, 1.95)),
        Arrow(((2.15, 1.26), (2.15, 2.66)), "events", (2.15, 1.95)),
        Arrow(((4.85, 2.66), (4.85, 1.26)), "commands", (4.85, 1.95)),
        Arrow(((5.45, 1.26), (5.45, 2.66)), "events", (5.45, 1.95)),
        Arrow(((3.5, 2.66), _LOG.at("n"))),
        Arrow((_LOG.at("s"), _REPLAY.at("n")), dashed=True),
        Arrow(((_GATEWAY.x, 0.53), (_GATEWAY.x, _LIVE.y), _LIVE.at("w"))),
        Arrow((_LIVE.at("s", 0.3), (2.15, 0.53)), both=True),
        Arrow((_SIM.at("s", -0.3), (4.85, 0.53)), both=True),
        Arrow(((_LOAD.x, 0.53), (_LOAD.x, _SIM.y), _SIM.at("e"))),
    ),
    (Group(3.5, 3.66, 6.84, 2.0, "ControlPlane.step(now, events) → commands: no clock, no socket, no randomness of its own", ("sage_core.plane:ControlPlane.step",)),),
)  # fmt: skip
"""Colours are those of the layers: policies, kernel, operators, runtimes, interfaces."""
