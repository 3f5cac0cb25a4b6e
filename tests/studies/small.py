"""Small real runs of a study's experiments, as a sweep would leave them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from sage_bench.config import composed
from sage_bench.results.manifest import NAME, Manifest, read_manifest
from sage_bench.run import run
from sage_bench.studies.study import Experiments, Study, experiments_in


def sweep(results: Path, experiment: str, fixed: Sequence[str], grid: Mapping[str, Sequence[str]]) -> None:
    """Run every point of ``grid``; seeds are a key like any other."""
    for values in itertools.product(*grid.values()):
        point = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
        overrides = [f"experiment={experiment}", *point, *fixed]
        run(composed([*overrides, f"results={results}"]), overrides)


def relabelled(results: Path, copy: Path, study: Study, names: Mapping[str, str]) -> Experiments:
    """The same runs with policies and arms called by other names: what a study says must follow the data."""
    shutil.copytree(results, copy)
    for path in copy.rglob(NAME):
        manifest = read_manifest(path)
        config = dict(manifest.config)
        arm = dict(config["arm"])
        if arm["name"] in names:
            arm["name"] = names[arm["name"]]
        overrides = tuple(
            f"policy={names.get(each.removeprefix('policy='), each.removeprefix('policy='))}"
            if each.startswith("policy=")
            else each
            for each in manifest.overrides
        )
        name = names.get(manifest.policy.name, manifest.policy.name)
        changed: Manifest = msgspec.structs.replace(
            manifest,
            config=config | {"arm": arm},
            overrides=overrides,
            policy=msgspec.structs.replace(manifest.policy, name=name),
        )
        path.write_bytes(msgspec.json.encode(changed))
    return experiments_in(copy, study)
