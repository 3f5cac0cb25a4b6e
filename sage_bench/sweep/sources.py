"""Which code a run is made by, as one digest: what resume asks before it takes an earlier result for this code's.

A commit does not say it. It changes with every sentence of the documentation, and a work tree with changes in it has none.
So the digest is of what decides a run: the packages it executes with their data, the native module, the versions of what computes random
numbers and time, and the modules that the configuration names by ``_target_`` from outside. What only reads results is not in it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sage_core.errors import ConfigError
from sage_core.ops import extension

NAME: Final = "sources.sha256"
"""File of a run that holds the digest."""

PACKAGES: Final = ("sage_core", "sage_policies", "sage_sim")
BENCH: Final = ("cluster", "compose", "config", "loads", "metrics/percentile", "pipelines", "results", "run", "traces")
"""Modules of ``sage_bench`` that a simulated run executes; a test holds this against what is loaded."""

LIVE: Final = ("discovery", "emulate", "gateway_process", "live", "live_manifest", "own_plane", "serving")
"""Those that a live run executes besides, with ``sage_live``."""

SUFFIXES: Final = (".py", ".yaml", ".json", ".csv")
LIBRARIES: Final = ("numpy", "simpy")


def sources_digest(config: Mapping[str, Any]) -> str:
    """Hex digest of the code that runs ``config``, which is a whole configuration as plain data."""
    live = config.get("driver", {}).get("kind") == "live"
    found = hashlib.sha256(_own(live).encode())
    for module in sorted({name.rpartition(".")[0] for name in _targets(config)}):
        for file in _files_of(module):
            found.update(_file(file))
    return found.hexdigest()


@functools.cache
def _own(live: bool) -> str:
    found = hashlib.sha256(platform.python_version().encode())
    for library in LIBRARIES:
        found.update(importlib.metadata.version(library).encode())
    bench = Path(__file__).parents[1]
    files = [file for package in (*PACKAGES, *(("sage_live",) if live else ())) for file in _package(package)]
    for name in (*BENCH, *(LIVE if live else ())):
        files += _below(bench / name) or [bench / f"{name}.py"]
    for file in files:
        found.update(file.name.encode())
        found.update(_file(file))
    try:
        found.update(_file(Path(str(extension().__file__))))
    except ConfigError:
        found.update(b"reference")  # runs without it
    return found.hexdigest()


def _package(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return [file for folder in folders for file in _below(Path(folder))]


def _below(folder: Path) -> list[Path]:
    """Code, and the data that lies beside it, such as profiles and fits."""
    return sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES)


def _targets(node: Any) -> Iterator[str]:
    """Every ``_target_`` below ``node`` that is not of our packages."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if isinstance(target, str) and not target.startswith("sage_"):
            yield target
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from _targets(each)


def _files_of(module: str) -> list[Path]:
    """The module's file, or all of the package that it is in; none where it cannot be found, which the run will tell."""
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return _package(top)
    return [Path(spec.origin)] if spec.origin and Path(spec.origin).is_file() else []


def _file(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
