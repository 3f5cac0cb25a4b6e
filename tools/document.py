"""Parts of a document that are written by a tool stand between two marks; this replaces what is between them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def with_part(document: Path, text: str, part: str, content: str) -> str:
    """``text`` of ``document`` with ``content`` as its part ``part``. Raises ``SystemExit`` if a mark is absent."""
    begin, end = f"<!-- {part}: generated, see `make docs` -->", f"<!-- /{part} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(
            f"{document}: expected one line {begin!r} and after it one line {end!r} around the part {part!r}"
        )
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def publish(wanted: Mapping[Path, str], *, check: bool) -> int:
    """Write each file (paths from the root of the checkout), or with ``check`` only compare. Returns an exit code."""
    stale = [path for path, text in wanted.items() if not _holds(ROOT / path, text)]
    for path in stale:
        if check:
            print(f"{path} is out of date: run `make docs`", file=sys.stderr)
        else:
            ROOT.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
            ROOT.joinpath(path).write_text(wanted[path], "utf-8")
            print(f"wrote {path}")
    return int(check and bool(stale))


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text("utf-8") == text
