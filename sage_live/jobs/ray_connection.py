"""A Ray cluster that runs: reached, and held against what the cluster file says of it.

A node of the file is the raylet with the custom resource of its name (:func:`resource_of`): host names and addresses may
be shared or change, and two raylets of one machine have both in common.
"""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections.abc import Sequence
from typing import Any, Final

from sage_core.cluster import Node
from sage_core.errors import ConfigError, EngineError

NAMESPACE: Final = "sage"

REACH_S: Final = 5.0
"""What a connection to the head node may take."""

SLICE: Final = 0.0001
"""Of a node's resource, for each actor that is to be there: the least that Ray counts."""


def resource_of(node: str) -> str:
    """What the raylet of this node is to be started with, one of it."""
    return f"sage_node_{node}"


def ray_module() -> Any:
    """Ray, which is optional and large. ConfigError that says how to get it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its authors
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"Ray is not installed here ({error}): `pip install 'sage-serving[ray]'`") from error


def connect(address: str | None = None) -> Any:
    """Ray, connected to the cluster at ``address``; None: ``RAY_ADDRESS``, or the one of this machine. EngineError."""
    ray = ray_module()
    if not ray.is_initialized():
        try:
            _check_reachable(address or os.environ.get("RAY_ADDRESS", ""))
            ray.init(address or "auto", namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise EngineError(
                f"no Ray cluster at {where}: {str(error).splitlines()[0]}; start one (`ray start --head ...`, "
                "docs/cluster-live.md) or set RAY_ADDRESS"
            ) from error
    return ray


def _check_reachable(address: str) -> None:
    """OSError at once, where Ray would try for minutes. What is not HOST:PORT is Ray's to judge."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()


def nodes_there(ray: Any, names: Sequence[str]) -> frozenset[str]:
    """Which of the nodes have a raylet that lives."""
    resources = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    return frozenset(name for name in names if any(resource_of(name) in each for each in resources))


def check_nodes(ray: Any, nodes: Sequence[Node], wait_s: float = 0.0) -> None:
    """ConfigError where a node of the file has no raylet, two, or one with less than the file says."""
    deadline = time.monotonic() + wait_s
    while len(nodes_there(ray, [node.name for node in nodes])) < len(nodes) and time.monotonic() < deadline:
        time.sleep(0.2)
    alive = [each for each in ray.nodes() if each["Alive"]]
    for node in nodes:
        mine = [each["Resources"] for each in alive if resource_of(node.name) in each["Resources"]]
        if len(mine) != 1:
            what = "no raylet" if not mine else f"{len(mine)} raylets"
            raise ConfigError(
                f"node {node.name}: {what} with its resource; start one on that machine with "
                f"`ray start --address=HEAD:PORT --resources='{{\"{resource_of(node.name)}\": 1}}'`"
            )
        cpus = mine[0].get("CPU", 0.0)
        if cpus < node.cpus:
            raise ConfigError(
                f"node {node.name}: the cluster file says {node.cpus:g} CPUs, its raylet has {cpus:g}; "
                "correct the file, or start the raylet with --num-cpus"
            )
