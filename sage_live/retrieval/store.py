"""An index on disk: a folder with ``manifest.json`` and the files that it names.

Files have names of their own content, and the manifest comes last, by a rename: whoever reads finds the old index or the
new one, whole, whenever a writer was stopped. What no manifest names any more is removed after that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from sage_core.errors import ConfigError, DataError, OutputError

FORMAT: Final = "sage-index/1"
MANIFEST: Final = "manifest.json"


class StoredFile(msgspec.Struct, frozen=True):
    """One file of an index."""

    name: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an index is. ``chunking``: the sizes its documents were cut by, where that is known. ``library``: which wrote
    the graph, and its version."""

    format: str = FORMAT
    model: str
    dimensions: int
    metric: str = "cosine"
    chunks: int
    documents: int
    chunking: dict[str, int] | None = None
    library: str
    files: dict[str, StoredFile] = {}  # msgspec copies it


class _Format(msgspec.Struct):
    format: str


def check_target(folder: Path) -> None:
    """ConfigError unless an index may be written to ``folder``: it is not there yet, empty, or an index."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder for the index")
    if folder.is_dir() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is neither empty nor an index ({MANIFEST} is missing); name another folder")


def write(folder: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Make ``folder`` this index. Keys of ``contents`` are file names such as ``chunks.parquet``. OutputError."""
    check_target(folder)
    files = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for key, data in contents.items():
            digest = hashlib.sha256(data).hexdigest()
            stem, _, suffix = key.partition(".")
            files[stem] = StoredFile(f"{stem}-{digest[:16]}.{suffix}", len(data), digest)
            _replace(folder / files[stem].name, data)
        whole = msgspec.structs.replace(manifest, files=files)
        _replace(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n")
        kept = {MANIFEST, *(file.name for file in files.values())}
        for path in folder.iterdir():
            ours = path.suffix == ".new" or path.name.startswith(tuple(f"{stem}-" for stem in files))
            if ours and path.name not in kept:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the index cannot be written ({error.strerror or error})") from error


def read_manifest(folder: Path) -> Manifest:
    """DataError: no index there, not one that this version reads."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise DataError(f"{path}: format {found!r}, expected {FORMAT!r}; build the index again")
        return msgspec.json.decode(data, type=Manifest)
    except OSError as error:
        raise DataError(
            f"{folder}: no index here ({MANIFEST}: {error.strerror}); `sage index build` makes one"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not the manifest of an index ({error}); build the index again") from error


def read_file(folder: Path, manifest: Manifest, stem: str) -> bytes:
    """The contents of one file, checked. DataError: missing, truncated, altered."""
    file = manifest.files.get(stem)
    if file is None:
        raise DataError(f"{folder / MANIFEST}: names no file {stem!r}; build the index again")
    path = folder / file.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); build the index again") from error
    if len(data) != file.bytes:
        raise DataError(f"{path}: {len(data)} of {file.bytes} bytes; build the index again")
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DataError(f"{path}: not what was written (SHA-256 differs); build the index again")
    return data


def _replace(path: Path, data: bytes) -> None:
    """Write by a rename, so that no half of a file has its name."""
    new = path.with_name(f"{path.stem}-{os.getpid()}.new")
    try:
        new.write_bytes(data)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
