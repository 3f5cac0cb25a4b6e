"""The rules that make a comparison fair (requirements 215-218), checked against the manifests of the runs.

Arms of a condition ran on the same machine, or the report refuses. What their configurations and engines differ in beside
the policy is listed: it can only be what the experiment names in ``arm.differs_in``, since anything else makes another
condition. Where runs were made by different code, that is said too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sage_bench.metrics.compare import Condition
from sage_bench.publish.chapter import Chapter
from sage_bench.results.manifest import Manifest
from sage_bench.results.reader import Run
from sage_bench.studies.findings import TableOf
from sage_bench.tables import Sheet
from sage_core.errors import DataError

_OF_THE_RUN: Final = ("seed", "policy", "results", "arm")
"""Keys of a configuration in which runs of one condition differ anyway."""

_CELL_MAX: Final = 60
"""Characters of a value that a table shows."""


def host_facts(manifest: Manifest) -> dict[str, Any]:
    """The machine a run ran on: what arms of one comparison have to share. Memory is in whole GiB, since the kernel keeps
    a little more or less of it for itself at each boot."""
    hardware = manifest.hardware
    return {
        "cpu": hardware.cpu,
        "cores": hardware.cores,
        "memory_gib": round(hardware.memory_bytes / 2**30),
        "gpus": list(hardware.gpus),
        "network": hardware.network,
    }


def host_hash(manifest: Manifest) -> str:
    """Hex digest of :func:`host_facts`."""
    return hashlib.sha256(json.dumps(host_facts(manifest), sort_keys=True).encode()).hexdigest()


def refuse_unequal_hosts(conditions: Sequence[Condition]) -> None:
    """Raises :class:`DataError` where arms of one condition ran on different machines; it names two such runs."""
    for condition in conditions:
        runs = _runs(condition)
        first = runs[0]
        for other in runs[1:]:
            if host_hash(other.manifest) != host_hash(first.manifest):
                a, b = host_facts(first.manifest), host_facts(other.manifest)
                differ = "; ".join(f"{key}: {a[key]!r} and {b[key]!r}" for key in a if a[key] != b[key])
                raise DataError(
                    f"{first.folder} and {other.folder}: runs of one comparison on different machines ({differ}); run both "
                    "on one, keep them in separate folders, or accept it with `sage report --hosts-differ`"
                )


def fairness(chapter: Chapter) -> list[str]:
    """What the arms share and what they do not, a sentence each; the study's own sentences come first."""
    several = [condition for condition in chapter.conditions if len(condition.arms) > 1]
    sentences = list(chapter.findings.fairness)
    if not chapter.conditions:
        return sentences
    if not several:
        return [*sentences, "No condition has more than one arm: nothing is held against anything here."]
    hosts = {host_hash(run.manifest) for condition in several for run in _runs(condition)}
    unequal = [each for each in several if len({host_hash(run.manifest) for run in _runs(each)}) > 1]
    if unequal:
        sentences.append(
            f"In {len(unequal)} of {len(several)} conditions the arms ran on different machines, which was accepted with "
            "--hosts-differ: times measured on the machine (overhead of the control plane) are not comparable there."
        )
    else:
        digests = ", ".join(sorted(digest[:12] for digest in hosts))
        sentences.append(
            f"Hardware: in each of {len(several)} conditions all arms ran on one machine (SHA-256 of its facts: {digests})."
        )
    sentences += _configuration(several)
    sentences += _software(several)
    return sentences


def differences(chapter: Chapter) -> Iterator[TableOf]:
    """A table of every key of configuration and engines in which arms of a condition differ, if there is any."""
    rows: dict[tuple[str, str, str], None] = {}
    for condition in chapter.conditions:
        if len(condition.arms) < 2:
            continue
        facts = {arm: _settings(runs[0].manifest) for arm, runs in condition.arms.items()}
        for key in sorted({key for each in facts.values() for key in each}):
            arms: dict[str, list[str]] = {}
            for arm, each in facts.items():
                arms.setdefault(each.get(key, "not set"), []).append(arm)
            if len(arms) > 1:
                values = "; ".join(f"{value} ({', '.join(names)})" for value, names in arms.items())
                rows[condition.experiment, key, values] = None
    if rows:
        yield TableOf(
            "differences",
            "Every key, beside the policy, in which arms of one condition differ: of the configuration those that the "
            "experiment names in arm.differs_in, and what engines said of themselves.",
            Sheet("What the arms differ in", ["experiment", "key", "values (arms)"], [list(row) for row in rows]),
            core=False,
        )


def _configuration(several: Sequence[Condition]) -> Iterator[str]:
    named = {run.manifest.experiment: _differs_in(run.manifest) for each in several for run in _runs(each)}
    plain = [experiment for experiment, keys in named.items() if not keys]
    if plain:
        yield f"Configuration: in {', '.join(plain)} the arms differ in nothing but their policy (equal configuration hash)."
    for experiment, keys in named.items():
        if keys:
            yield f"Normalisation: in {experiment} the arms differ on purpose in {', '.join(keys)}, and in nothing else beside the policy."


def _software(several: Sequence[Condition]) -> Iterator[str]:
    """Whether the arms of each condition were run by the same code and against the same engine versions."""
    mixed = unlike = 0
    engines: dict[str, None] = {}
    for condition in several:
        built = {(run.manifest.software.git_commit, run.manifest.software.native_build) for run in _runs(condition)}
        mixed += len(built) > 1
        of = [
            sorted(f"{each.adapter} {each.version}, {each.model}" for each in run.manifest.engines)
            for run in _runs(condition)
        ]
        unlike += any(each != of[0] for each in of)
        engines.update(dict.fromkeys(name for each in of for name in each))
    if mixed:
        yield (
            f"In {mixed} of {len(several)} conditions the runs were made by different commits or native builds; run them "
            "again from one to be sure."
        )
    else:
        yield "Software: in every condition all runs were made by one commit and one native build."
    if unlike:
        yield f"In {unlike} of {len(several)} conditions the arms' engines differ in number, adapter, version or model: see the table."
    if engines:
        yield f"Engines that took part: {'; '.join(engines)}."


def _settings(manifest: Manifest) -> dict[str, str]:
    """Leaves of a run's configuration and of its engines, by dotted key."""
    leaves = {key: value for key, value in manifest.config.items() if key not in _OF_THE_RUN}
    found = dict(_leaves("", leaves))
    for engine in manifest.engines:
        for name, value in (("adapter", engine.adapter), ("model", engine.model), ("version", engine.version)):
            found[f"engines.{engine.name}.{name}"] = value
    return found


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key in value:
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value[key])
    elif isinstance(value, list | tuple) and value and not all(isinstance(each, int | float | str) for each in value):
        for i, each in enumerate(value):
            yield from _leaves(f"{prefix}.{i}", each)
    else:
        text = str(value)
        yield prefix, text if len(text) <= _CELL_MAX else f"{text[: _CELL_MAX - 1]}…"


def _differs_in(manifest: Manifest) -> list[str]:
    arm = manifest.config.get("arm") or {}
    return sorted(map(str, arm.get("differs_in") or ()))


def _runs(condition: Condition) -> list[Run]:
    return [run for arm in condition.arms.values() for run in arm]
