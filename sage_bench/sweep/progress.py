"""How far a sweep is, for people: a line that renews itself on a terminal, one now and then elsewhere; at the end a summary."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner

from sage_bench.sweep.journal import Entry, Reader

LOOK_S: Final = 0.25
TELL_S: Final = 30.0
"""Between two lines where nothing can be renewed, such as a log file."""

FAILURES_TOLD: Final = 20

WERE: Final = {
    "other code": "made by other code",
    "other data": "made from another trace or profile",
    "incomplete": "not complete",
}

Say = Callable[[str], None]


class Progress:
    """Reads the journal while points run. say: takes the line of each point; note: what a run notes, once each.

    points: how many there are. Left is what the points that were run since the first began took, times those that are
    left; that some of these may be there already, or be larger, is not known, so it is about. same_code: asked of what is there.
    """

    def __init__(
        self, reader: Reader, points: int, say: Say, note: Say, console: Console | None = None, same_code: bool = True
    ) -> None:
        self._reader = reader
        self._points = points
        self._same_code = same_code
        self._say, self._note = say, note
        self._console = console or Console(stderr=True, highlight=False)
        self._lock = threading.RLock()  # a signal's handler asks too, in the thread that may have it
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._spinner = Spinner("dots", style="status.spinner")
        self._live: Live | None = None
        self._started = time.monotonic()
        self._first_begun: float | None = None
        self._running: dict[int, int] = {}
        self.states: Counter[str] = Counter()
        self.reruns: Counter[str] = Counter()
        self.failures: list[Entry] = []

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._spinner.update(text=self.text())
            # What points print comes above the line; where it goes to a file or a pipe it is left alone.
            above = sys.stdout.isatty()
            self._live = Live(
                self._spinner,
                console=self._console,
                refresh_per_second=1 / LOOK_S,
                transient=True,
                redirect_stdout=above,
            )
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self.take()
        if self._live is not None:
            self._live.stop()

    def running(self) -> set[int]:
        """Processes in which a point is running."""
        self.take()
        return set(self._running.values())

    def take(self) -> None:
        """Account for what is new in the journal."""
        with self._lock:
            for entry in self._reader.new():
                self._account(entry)

    def _account(self, entry: Entry) -> None:
        if entry.state == "begun":
            self._running[entry.job] = entry.pid
            if self._first_begun is None:
                self._first_begun = time.monotonic()
            return
        self._running.pop(entry.job, None)
        self.states[entry.state] += 1
        if entry.state == "failed":
            self.failures.append(entry)
        elif entry.state == "done" and entry.why:
            self.reruns[entry.why] += 1
        for note in entry.notes:
            self._note(note)
        if entry.line:
            self._say(entry.line)

    def _watch(self) -> None:
        told = time.monotonic()
        while not self._end.wait(LOOK_S):
            self.take()
            if self._live is not None:
                self._spinner.update(text=self.text())
            elif time.monotonic() - told >= TELL_S:
                told = time.monotonic()
                self._console.print(f"sweep: {self.text()}", soft_wrap=True)

    def text(self) -> str:
        """Points so far, time so far, and about what is left."""
        ended = sum(self.states.values())
        told = f"{ended:,} of {self._points:,} points{self._parts()}, {span(time.monotonic() - self._started)}"
        ran = self.states["done"] + self.states["failed"]
        if ran and self._first_begun is not None:
            left = (self._points - ended) * (time.monotonic() - self._first_begun) / ran
            told += f", about {span(left)} left"
        return told

    def _parts(self) -> str:
        parts = [
            f"{self.states[state]:,} {word}"
            for state, word in (("skipped", "there already"), ("failed", "failed"), ("interrupted", "interrupted"))
            if self.states[state]
        ]
        return f" ({', '.join(parts)})" if parts else ""

    def summary(self) -> None:
        """What was run, what was not and why, and what failed, in the points' order."""
        ended = sum(self.states.values())
        took = span(time.monotonic() - self._started)
        self._print(
            f"sweep: {self.states['done']:,} of {self._points:,} points run{self._parts()} in {took}"
            + (f"; {self._points - ended:,} left, which the same command runs" if ended < self._points else "")
        )
        if self.states["skipped"]:
            by = "by the same code" if self._same_code else "by whatever code"
            self._print(
                f"sweep: what is there already was made from the same configuration {by}; --rerun runs it again"
            )
        for why, count in sorted(self.reruns.items()):
            self._print(f"sweep: {count:,} of those run had results that were {WERE[why]}")
        failures = sorted(self.failures, key=lambda entry: entry.job)
        for entry in failures[:FAILURES_TOLD]:
            self._print(f"failed: '{entry.name}': {entry.why}")
        if len(failures) > FAILURES_TOLD:
            self._print(f"failed: {len(failures) - FAILURES_TOLD:,} more")
        for entry in failures:
            if entry.trace:
                self._print(entry.trace.rstrip())
                break

    def _print(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)


def span(seconds: float) -> str:
    """A time for people: ``8 s``, ``2 min 5 s``, ``1 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
