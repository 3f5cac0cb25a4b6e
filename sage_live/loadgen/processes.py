"""One open loop from several processes, when one core is not enough to be punctual.

Each process takes the requests of its share (by id, round robin), prepares, says so, and waits for the common start, an
instant of CLOCK_MONOTONIC, which is one clock for all of them. The load is drawn once, here; a process reads its
columns from a file and leaves its rows in another. Its standard input is the leash: a line is the start, its end means
stop, so nothing outlives this process.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from sage_core.errors import ConfigError, SageError
from sage_core.load import ColumnLoad
from sage_core.units import MILLISECOND
from sage_live.loadgen.generator import Effort, Measured
from sage_live.loadgen.options import Options
from sage_live.loadgen.schema import FIELDS, gap_counts
from sage_live.loadgen.worker import JOB, rows_file

LEAD_NS = 50 * MILLISECOND
"""From the moment when all are ready to the start. A process that is held up for longer is late, and its send lag says so."""


async def run_processes(
    load: ColumnLoad,
    options: Options,
    processes: int,
    *,
    stop: asyncio.Event | None = None,
) -> Measured:
    """Run ``load`` from ``processes`` processes, to its end or until ``stop`` is set. Arguments as of ``generate``."""
    with tempfile.TemporaryDirectory(prefix="sage-load-") as name:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps((list(load.columns()), options), protocol=5))
        workers: list[asyncio.subprocess.Process] = []
        leash: asyncio.Future[None] | None = None
        try:
            for rest in range(processes):
                worker = await _worker(folder, rest, processes)
                workers.append(worker)
            for worker in workers:
                await _told(worker)
            start = time.monotonic_ns() + LEAD_NS
            for worker in workers:
                _stdin(worker).write(b"%d\n" % start)
            if stop is not None:
                leash = asyncio.ensure_future(_release(workers, stop))
            reports = [await _told(worker) for worker in workers]
        finally:
            if leash is not None:
                leash.cancel()
            for worker in workers:
                _stdin(worker).close()  # stops it, if it has not ended
            for worker in workers:
                await worker.wait()
        return joined(folder, start, reports)


async def _worker(folder: Path, rest: int, of: int) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "sage_live.loadgen.worker", str(folder), str(rest), str(of))
    # A session of its own: Ctrl-C reaches this process only, which then stops the others in order.
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, start_new_session=True)


async def _told(worker: asyncio.subprocess.Process) -> dict[str, Any]:
    """What a process says next."""
    assert worker.stdout is not None
    line = await worker.stdout.readline()
    if not line:
        raise SageError(f"a load-generating process ended with code {await worker.wait()}; what it printed is above")
    said: dict[str, Any] = json.loads(line)
    if "error" in said:
        raise ConfigError(said["error"])
    return said


async def _release(workers: list[asyncio.subprocess.Process], stop: asyncio.Event) -> None:
    await stop.wait()
    for worker in workers:
        _stdin(worker).close()


def _stdin(worker: asyncio.subprocess.Process) -> asyncio.StreamWriter:
    assert worker.stdin is not None
    return worker.stdin


def joined(folder: Path, start_ns: int, reports: list[dict[str, Any]]) -> Measured:
    """The rows of all processes in order of request."""
    parts = [np.load(folder / rows_file(rest)) for rest in range(len(reports))]
    rows = np.concatenate([part["rows"] for part in parts])
    order = np.argsort(rows[:, 0], kind="stable")
    gaps = None
    if "gaps" in parts[0]:
        # The gaps of a row lie together; they move with it.
        flat = np.concatenate([part["gaps"] for part in parts])
        counts = gap_counts(rows[:, FIELDS.index("chunks")])
        begins = (np.cumsum(counts) - counts)[order]
        counts = counts[order]
        gaps = flat[np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(len(flat))]
    efforts = [Effort(report["cpu_s"], report["busy"]) for report in reports]
    return Measured(rows[order], gaps, start_ns, min(report["objective_ns"] for report in reports), efforts)
