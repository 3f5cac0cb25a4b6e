"""Where documents come from: a folder of text files, or the reference texts that every Python has with it."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from sage_core.errors import DataError

SUFFIXES: Final = (".txt", ".md", ".rst", ".py")

_log = logging.getLogger(__name__)


def documents(folder: Path, *, note: Callable[[str], object] = _log.warning) -> Iterator[tuple[str, str]]:
    """``(source, text)`` of the text files below ``folder``, sorted; a source is the path below it, with slashes.

    Hidden files and folders are left out, links to folders are not followed. A file that is not UTF-8 or cannot be read
    is skipped, which ``note`` is told. DataError, at once: no such folder, no text files in it; at the end: none of them
    can be read.
    """
    paths = _text_files(folder)
    return _read(folder, paths, note)


def python_topics() -> Iterator[tuple[str, str]]:
    """The demo corpus: chapters of Python's language reference, which ``help("TOPIC")`` shows. DataError without them."""
    try:
        texts: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(f"this Python comes without its reference texts ({error}); index a folder instead") from error
    return ((f"python/{topic}", texts[topic]) for topic in sorted(texts))


def _text_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}; expected a folder of text files ({', '.join(SUFFIXES)})")

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error

    paths = []
    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [  # what is no regular file, a pipe say, might never end
            path for path in map(Path(place).joinpath, files) if _is_text(path)
        ]
    if not paths:
        raise DataError(f"{folder}: no text files; expected some that end in {', '.join(SUFFIXES)}")
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()


def _read(folder: Path, paths: list[Path], note: Callable[[str], object]) -> Iterator[tuple[str, str]]:
    readable = False
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            note(f"{path}: skipped, not UTF-8 (byte {error.start})")
        except OSError as error:
            note(f"{path}: skipped, cannot be read ({error.strerror})")
        else:
            readable = True
            yield path.relative_to(folder).as_posix(), text
    if not readable:
        raise DataError(f"{folder}: none of its {len(paths)} text files can be read as UTF-8; convert them")
