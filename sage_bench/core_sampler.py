"""How fast one core is, from moment to moment: ``python -m sage_bench.core_sampler CORE FILE``, a process of its own.

It runs on the core that is watched, because nowhere else can be told what its neighbours do to it: every few milliseconds it
does a fixed piece of work (:data:`PROBE_BYTES` of CRC-32, in the first-level cache) and writes down how long that took. Where the
system allows it, the process goes before others, so that its own waiting for the core is not counted. It takes one or two per
cent of the core. To FILE are added pairs of 64-bit integers: instant (ns of the monotonic clock) and duration (ns).

While it runs the core is never idle: a second process, which runs only when nobody else wants to, computes the same. A virtual
core that halts is taken from its hardware thread and comes back cold, so that probes (and requests) after a pause would be slow
for a reason of their own. Both end when standard input does, so nothing outlives whoever started them.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Final
from zlib import crc32

PROBE_BYTES: Final = 1 << 15
WARM: Final = 4
"""Times that the work is done before it is timed: what the others left in the core's caches is no part of the probe."""

INTERVAL_S: Final = 0.008
FLUSHED: Final = 12
"""Samples, a tenth of a second."""


def main(core: int, file: Path) -> None:
    """Sample until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us, and ends our input
    os.sched_setaffinity(0, {core})
    work = os.urandom(PROBE_BYTES)
    keeper = _keep_awake(work)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO)))
    try:
        _probe(work, file)
    finally:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)


def _probe(work: bytes, file: Path) -> None:
    now, samples = time.monotonic_ns, array("q")
    with file.open("ab", buffering=0) as out:
        while len(samples) or not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(WARM):
                crc32(work)
            at = now()
            crc32(work)
            samples.extend((at, now() - at))
            if len(samples) >= 2 * FLUSHED:
                out.write(samples.tobytes())
                del samples[:]
            time.sleep(INTERVAL_S)


def _keep_awake(work: bytes) -> int:
    """The process that runs when nobody else wants to."""
    parent = os.getpid()
    child = os.fork()
    if not child:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while os.getppid() == parent:  # also if that was killed
            for _ in range(1000):
                crc32(work)
        os._exit(0)
    return child


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
