"""What nodes cost, and what a plan does."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from sage_core.cluster import Cluster, Node
from sage_core.plan import Plan
from sage_sim import hardware


class Price(NamedTuple):
    """USD per hour: of all nodes, and of those of them that the plan leaves without a replica. ``unknown``: nodes whose
    price is not known, and is in neither."""

    total: float
    idle: float
    unknown: tuple[str, ...]


def listed(node: Node) -> Node:
    """``node`` with a price: its own, else the list prices of its GPUs (with the host they come with); None stays None where
    one of them is not listed, or there are none."""
    if node.price_per_h is not None or not node.gpus:
        return node
    total = 0.0
    for gpu in node.gpus:
        facts = hardware.facts(gpu.type)
        if facts is None or facts.price is None:
            return node
        total += gpu.count * facts.price.usd_per_hour
    return msgspec.structs.replace(node, price_per_h=round(total, 6))


def price(cluster: Cluster, plan: Plan) -> Price:
    """Of all nodes of the cluster under the plan."""
    used = {each.place.node for each in plan.placed}
    priced = [(node.name, node.price_per_h) for node in cluster.nodes if node.price_per_h is not None]
    return Price(
        sum(usd for _, usd in priced),
        sum(usd for name, usd in priced if name not in used),
        tuple(node.name for node in cluster.nodes if node.price_per_h is None),
    )
