"""How points tell the process that swept them: files in a folder, one a process, of lines that are only ever added to.

It works for every launcher, also where points run on other machines, because results need a folder in common anyway. A
stop is told the other way round, by a file that points look for before they begin.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

STOP: Final = "stop"
PREFIX: Final = ".sweep-"

State = Literal["begun", "done", "skipped", "failed", "interrupted", "not begun"]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What a point says of itself. wall_s: time it took. line: for standard output; notes: for people. why: the reason that
    an earlier run did not do, or the error; exit_code: that goes with it; trace: of an error that is not one of ours."""

    job: int
    name: str
    state: State
    pid: int = 0
    wall_s: float = 0.0
    line: str = ""
    notes: tuple[str, ...] = ()
    why: str = ""
    exit_code: int = 0
    trace: str = ""


class Journal(msgspec.Struct, frozen=True):
    """The points' side; the folder is made by the sweep."""

    folder: str

    def write(self, entry: Entry) -> None:
        """Add a line. Progress is not worth a run: what cannot be written is left out."""
        own = Path(self.folder, f"{socket.gethostname()}-{os.getpid()}.jsonl")
        with contextlib.suppress(OSError), own.open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")

    def stopped(self) -> bool:
        """Whether no point is to begin any more."""
        return Path(self.folder, STOP).exists()


class Reader:
    """The sweep's side: makes the folder below ``parent``, and reads what is new in it. OSError where it cannot be made."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        here = f"{PREFIX}{socket.gethostname()}-"
        for old in parent.glob(f"{here}*"):  # of a sweep that was killed
            if not _alive(old.name.removeprefix(here)):
                shutil.rmtree(old, ignore_errors=True)
        self.folder = parent / f"{here}{os.getpid()}"
        self.folder.mkdir(exist_ok=True)
        self.journal = Journal(str(self.folder.absolute()))
        self._read: dict[str, int] = {}

    def new(self) -> list[Entry]:
        """Whole lines since the last call."""
        entries: list[Entry] = []
        with contextlib.suppress(OSError):
            for file in sorted(self.folder.glob("*.jsonl")):
                with file.open("rb") as lines:
                    lines.seek(self._read.get(file.name, 0))
                    text = lines.read()
                whole = text.rfind(b"\n") + 1
                self._read[file.name] = self._read.get(file.name, 0) + whole
                entries += [msgspec.json.decode(line, type=Entry) for line in text[:whole].splitlines()]
        return entries

    def stop(self) -> None:
        """No point is to begin any more."""
        with contextlib.suppress(OSError):
            (self.folder / STOP).touch()

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_until(reached: Callable[[], bool], timeout_s: float) -> bool:
    """Look again and again; whether it came true in time."""
    end = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
