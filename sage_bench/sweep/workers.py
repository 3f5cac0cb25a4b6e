"""Worker processes of a sweep on this machine: they go when the sweep goes, and Ctrl-C ends what they run in order.

Ctrl-C reaches every process of a terminal at once. Left alone, workers die in the middle of writing, and what they leave is
neither a result nor nothing. So a worker ignores it but while it simulates, when the run notes it and ends, partial and whole; the
sweep starts nothing more, waits for those runs, and only then ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from sage_bench.sweep.journal import Reader, wait_until
from sage_bench.sweep.progress import Progress

GRACE_S: Final = 2.0
"""For runs that the terminal has told already; then they are told by us."""

END_S: Final = 60.0
"""For runs to end and be written."""


def begin_worker() -> None:
    """Initialise a worker: deaf to Ctrl-C, and gone when its parent is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(os.getppid(),), name="parent", daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # a run ends in order; what is idle ends at once
    time.sleep(END_S)
    os._exit(130)


@contextlib.contextmanager
def ended_in_order(reader: Reader, progress: Progress) -> Iterator[None]:
    """While workers run points: Ctrl-C is raised once their runs have ended. A second one is raised at once."""
    came = False

    def end(number: int, frame: Any) -> None:
        nonlocal came
        if not came:
            came = True
            reader.stop()
            if not wait_until(lambda: not progress.running(), GRACE_S):
                for pid in progress.running():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGINT)
                wait_until(lambda: not progress.running(), END_S)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
