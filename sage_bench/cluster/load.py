"""``cluster.yaml``: read, checked, priced."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from sage_bench.cluster.price import listed
from sage_bench.cluster.source import YamlSource
from sage_core.cluster import Cluster, Gpu, Job, Needs, Node
from sage_core.plan import fits_nowhere
from sage_core.unplaceable import told
from sage_sim.profile import profile_names

_STRUCTS: Final[dict[str, type[msgspec.Struct]]] = {
    "": Cluster,
    "nodes[...]": Node,
    "nodes[...].gpus[...]": Gpu,
    "jobs[...]": Job,
    "jobs[...].needs": Needs,
    "jobs[...].needs[...]": Needs,
}


def read_cluster(path: str | Path) -> Cluster:
    """The cluster of a file; nodes without a price of their own have that of their devices, where those are listed.

    ConfigError names the file, the line and the key: an unknown key, a wrong value, a name used twice, a job that no node
    could run even if it were empty.
    """
    source = YamlSource(Path(path))
    if not isinstance(source.plain, dict):
        raise source.error("", "expected the keys nodes and jobs; see docs/cluster.md")
    cluster = source.converted(Cluster, _STRUCTS)
    if not cluster.nodes:
        raise source.error("nodes", "expected at least one node, got an empty list")
    _check_names(source, "nodes", [node.name for node in cluster.nodes])
    _check_names(source, "jobs", [job.name for job in cluster.jobs])
    for i, job in enumerate(cluster.jobs):
        _check_job(source, f"jobs[{i}]", job, cluster)
    return msgspec.structs.replace(cluster, nodes=tuple(listed(node) for node in cluster.nodes))


def _check_names(source: YamlSource, key: str, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        first = names.index(name)
        if first < i:
            at = source.line(f"{key}[{first}].name")
            raise source.error(f"{key}[{i}].name", f"{name!r} is the name of another at line {at}; names must differ")


def _check_job(source: YamlSource, key: str, job: Job, cluster: Cluster) -> None:
    names = [each.name for each in cluster.jobs]
    for n, other in enumerate(job.apart_from):
        if other == job.name:
            raise source.error(f"{key}.apart_from[{n}]", "a job is kept apart from itself by anti_affinity: true")
        if other not in names:
            raise source.error(f"{key}.apart_from[{n}]", f"no job is called {other!r}{_near(other, names)}")
    profiles = [(f"{key}.profile", job.profile)]
    for n, needs in enumerate(job.alternatives):
        at = f"{key}.needs[{n}]" if isinstance(job.needs, tuple) else f"{key}.needs"
        profiles.append((f"{at}.profile", needs.profile))
    for at, name in profiles:
        if name is not None and not name.endswith((".yaml", ".yml")) and name not in profile_names():
            hint = _near(name, profile_names()) or "; `sage profile list` shows all"
            raise source.error(at, f"no shipped profile is called {name!r}{hint}; a file of your own ends in .yaml")
    why = fits_nowhere(cluster.nodes, job)
    if why is not None:
        wanted = ", or ".join(told(each) for each in job.alternatives)
        raise source.error(
            f"{key}.needs",
            f"job {job.name!r} fits on no node, even an empty one: it needs {wanted}; what there is: {why}",
        )


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
