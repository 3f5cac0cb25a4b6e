"""Whether a point of a sweep has been run before: by configuration, by code, and to its end."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sage_bench.results.manifest import Manifest, file_fact, read_manifest
from sage_bench.results.writer import output_error
from sage_bench.run import config_digest
from sage_bench.sweep import sources
from sage_core.errors import DataError

Resume = Literal["code", "config", "never"]
"""What an earlier result has to share with a point to stand for it: configuration and code, the configuration alone, or
nothing will do and the point is run again."""

RESUMES: Final[tuple[Resume, ...]] = ("code", "config", "never")

Why = Literal["", "other code", "other data", "incomplete"]
"""Why what was there did not do."""


@dataclass(frozen=True, slots=True)
class Found:
    """folder: of the run that stands for the point, None where none does; then ``why`` those that are there do not."""

    folder: Path | None
    why: Why = ""


def found(experiment: Path, config: Mapping[str, Any], resume: Resume) -> Found:
    """Look for a run of ``config`` below ``experiment`` (``results/<name>``). The first complete one counts, of a live
    configuration as well: measuring again is asked for with ``never``."""
    if resume == "never":
        return Found(None)
    why: Why = ""
    for folder in sorted(experiment.glob(f"*-s{config['seed']}-{config_digest(config)}*")):
        try:
            manifest = read_manifest(folder)
        except DataError:
            why = why or "incomplete"
            continue
        if not _whole(folder, manifest):
            why = why or "incomplete"
        elif not _same_data(manifest):
            why = "other data"
        elif resume == "code" and _sources(folder) != sources.sources_digest(config):
            why = "other code"
        else:
            return Found(folder)
    return Found(None, why)


def _whole(folder: Path, manifest: Manifest) -> bool:
    """It ended as it should, its measurements may be believed, and its files are there with the sizes they had."""
    if manifest.status != "complete" or manifest.invalid:
        return False
    try:
        return all(os.stat(folder / name).st_size == fact.bytes for name, fact in manifest.outputs.items())
    except OSError:
        return False


def _same_data(manifest: Manifest) -> bool:
    """The traces and the profiles that it read are what they were; one that is gone is for the run to tell."""
    read = [*manifest.profiles.values(), *manifest.traces]
    try:
        return all(file_fact(Path(fact.path)).sha256 == fact.sha256 for fact in read)
    except DataError:
        return False


def _sources(folder: Path) -> str:
    try:
        return (folder / sources.NAME).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):  # written by a version that did not say, or damaged
        return ""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Alone in ``folder``, which is made; waits while another process runs this point, be it one that a killed sweep left
    behind, and says whether it did. Where the file system has no locks on folders (NFS), it is taken on trust. OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise output_error(folder, error) from error
    try:
        yield _locked(number)
    finally:
        os.close(number)


def _locked(number: int) -> bool:
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(number, fcntl.LOCK_EX)
            return True
    return False
