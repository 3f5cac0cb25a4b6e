"""How a request is classified, and how its tasks are routed to the backends of one pool of engines."""

from __future__ import annotations

from typing import Final

from sage_bench.publish.system.diagram import PAGE_IN, Arrow, Diagram, Group, Node

_FEATURES: Final = (
    Node("ENDPOINTS", 0.68, 2.75, 1.2, 0.42, ("ENDPOINTS", "path of the request"), "outside", ("sage_core.classify:ENDPOINTS",)),
    Node("SHAPES", 0.68, 1.95, 1.2, 0.42, ("SHAPES", "keys of its body"), "outside", ("sage_core.classify:SHAPES",)),
    Node("EMBEDDING_NAME", 0.68, 1.15, 1.2, 0.42, ("EMBEDDING_NAME", "name of its model"), "outside", ("sage_core.classify:EMBEDDING_NAME",)),
)  # fmt: skip
_CLASSIFIER: Final = Node(
    "RequestClassifier", 2.12, 1.95, 1.2, 0.56, ("RequestClassifier", "features that disagree:", "an error, no guess"), "L3",
    ("sage_core.classify:RequestClassifier",),
)  # fmt: skip
_KINDS: Final = (
    Node("LLM_CHAT", 3.5, 2.75, 1.08, 0.42, ("LLM_CHAT", "/chat/completions"), "L1", ("sage_core.units:RequestKind.LLM_CHAT",)),
    Node("LLM_GENERATE", 3.5, 1.95, 1.08, 0.42, ("LLM_GENERATE", "/completions"), "L1", ("sage_core.units:RequestKind.LLM_GENERATE",)),
    Node("EMBEDDING", 3.5, 1.15, 1.08, 0.42, ("EMBEDDING", "/embeddings"), "L1", ("sage_core.units:RequestKind.EMBEDDING",)),
)  # fmt: skip
_LLM: Final = Node(
    "PoolKind.LLM", 4.88, 2.35, 1.2, 0.62, ("PoolKind.LLM", "joins the running batch", "at the next iteration"), "L3",
    ("sage_core.units:PoolKind.LLM",),
)  # fmt: skip
_EMBEDDING: Final = Node(
    "PoolKind.EMBEDDING", 4.88, 1.15, 1.2, 0.62, ("PoolKind.EMBEDDING", "requests of different", "clients share a batch"), "L3",
    ("sage_core.units:PoolKind.EMBEDDING",),
)  # fmt: skip
_OPERATOR: Final = Node(
    "PoolKind.OPERATOR", 4.88, 0.32, 1.2, 0.46, ("PoolKind.OPERATOR", "retrieve, rerank, tool"), "L3",
    ("sage_core.units:PoolKind.OPERATOR",),
)  # fmt: skip
_STAGES: Final = Node("Run", 3.5, 0.32, 1.08, 0.46, ("Run", "stages of a pipeline"), "L3", ("sage_core.executor:Run",))
_BACKENDS: Final = (
    Node("llm", 6.28, 2.75, 1.2, 0.42, ("LLM engine", "GPU"), "outside"),
    Node("both", 6.28, 1.75, 1.2, 0.56, ("LLM + embedding", "two engines", "on one GPU"), "outside"),
    Node("embedding", 6.28, 0.92, 1.2, 0.42, ("embedding engine", "GPU or CPU"), "outside"),
    Node("cpu", 6.28, 0.32, 1.2, 0.42, ("function", "CPU"), "outside"),
)

ROUTING: Final = Diagram(
    PAGE_IN, 3.1,
    (*_FEATURES, _CLASSIFIER, *_KINDS, _LLM, _EMBEDDING, _OPERATOR, _STAGES, *_BACKENDS),
    (
        *(Arrow((feature.at("e"), _CLASSIFIER.at("w", shift))) for feature, shift in zip(_FEATURES, (0.14, 0, -0.14), strict=True)),
        *(Arrow((_CLASSIFIER.at("e", shift), kind.at("w"))) for kind, shift in zip(_KINDS, (0.14, 0, -0.14), strict=True)),
        Arrow((_KINDS[0].at("e"), _LLM.at("w", 0.12))),
        Arrow((_KINDS[1].at("e"), _LLM.at("w", -0.12))),
        Arrow((_KINDS[2].at("e"), _EMBEDDING.at("w"))),
        Arrow((_STAGES.at("e"), _OPERATOR.at("w"))),
        Arrow((_LLM.at("e", 0.12), _BACKENDS[0].at("w"))),
        Arrow((_LLM.at("e", -0.12), _BACKENDS[1].at("w", 0.12))),
        Arrow((_EMBEDDING.at("e", 0.12), _BACKENDS[1].at("w", -0.12))),
        Arrow((_EMBEDDING.at("e", -0.12), _BACKENDS[2].at("w"))),
        Arrow((_OPERATOR.at("e"), _BACKENDS[3].at("w"))),
    ),
    (Group(4.88, 1.54, 1.34, 3.04, "Order, Limit, Route", ("sage_core.policy:Order", "sage_core.policy:Limit", "sage_core.policy:Route")),),
)  # fmt: skip
"""Each pool has a queue of its own; the policy's parts decide over its queue and its replicas."""
