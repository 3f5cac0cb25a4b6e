"""What a checkout says of itself: its layers and its counts, by ``tools/implementation_summary.py``.

In a process of its own: the tool reads the import graph where the sources are written, and moves import paths to do so.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import msgspec

from sage_bench.publish.system.layers import LayerBox
from sage_core.errors import DataError

TOOL: Final = Path("tools/implementation_summary.py")


class PackageCounts(msgspec.Struct, frozen=True):
    """One row of the implementation summary. tests: test functions. dependencies: distributions that it imports, those
    that are optional with a ``*``. artefacts: what is built or shipped from it."""

    package: str
    layer: str
    language: str
    files: int
    lines: int
    tests: int
    dependencies: tuple[str, ...]
    artefacts: tuple[str, ...]


class Facts(msgspec.Struct, frozen=True):
    """layers: from top to bottom. packages: in the order of the layers, then what is around them."""

    layers: tuple[LayerBox, ...]
    packages: tuple[PackageCounts, ...]


def checkout() -> Path | None:
    """The checkout that this package is read from; None for an installed wheel, or without the developer tools that read
    the import graph."""
    root = Path(__file__).resolve().parents[3]
    return root if root.joinpath(TOOL).is_file() and find_spec("grimp") else None


def facts_of(root: Path) -> Facts:
    """Of the checkout at ``root``. Raises :class:`DataError` with what the tool said, where it fails."""
    done = subprocess.run([sys.executable, str(root / TOOL), "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise DataError(f"{root / TOOL}: failed: {said[-1]}")
    return msgspec.json.decode(done.stdout, type=Facts)
