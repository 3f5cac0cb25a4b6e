"""A core of a machine that is shared with others, as a clock that counts work instead of seconds.

On a virtual machine a "core" is a hardware thread. What runs on the other thread of the physical core belongs to somebody
else, and while it runs ours does the same work in half as much time again, or twice; no counter in the guest shows it. An
engine on such a core has no times that could be measured once and hold. What it has are times per work: a probe that does the
same work again and again beside it (:mod:`sage_bench.core_sampler`) becomes slower and faster as the engine does. So *work time*
goes on by one second in a second in which the probe takes its reference time, and by less in a second in which it takes longer:
by the ratio of the two to a power, for the engine is more sensitive than the probe or less, and which power it is
shows when the engine does the same thing again and again. A profile measured in work time holds whatever the neighbours do;
what it predicts for an hour in which the probe was watched is told in seconds again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sage_bench.results.reader import read_table
from sage_bench.results.schema import CORE_SPEED
from sage_bench.results.writer import output_error
from sage_core.errors import DataError, EngineError

NAME: Final = "core_speed.parquet"
SAMPLES: Final = "core-samples.bin"

BIN_NS: Final = 500_000_000
"""Over which probes are averaged: some sixty of them."""

PROBE_MAX: Final = 4.0
"""Times the fastest ones: a longer probe was interrupted, and what interrupts is work of the machine's own."""

BEGIN_S: Final = 20.0
END_S: Final = 5.0
"""For the sampler to begin and to end."""

LATE_NS: Final = 2_000_000_000
"""Without a probe before the end of what it is to be told of: the sampler has ended early."""

_BEYOND_NS: Final = 3600 * 1_000_000_000


class Reference(NamedTuple):
    """What work time is: real time where the probe takes ``us``; where it takes x times as long, x ** ``power`` seconds of it."""

    us: float
    power: float


class Probes(NamedTuple):
    """(n,) instants and durations of probes, in order."""

    at_ns: NDArray[np.int64]
    took_ns: NDArray[np.int64]

    def uninterrupted_ns(self) -> NDArray[np.float64]:
        """Durations, without what an interruption added."""
        return np.minimum(self.took_ns, PROBE_MAX * np.percentile(self.took_ns, 5))


class CoreSpeed:
    """Work time by ``probes``."""

    def __init__(self, probes: Probes, reference: Reference) -> None:
        at_ns, took_ns = probes.at_ns, probes.uninterrupted_ns()
        bins = (at_ns - at_ns[0]) // BIN_NS
        counts = np.bincount(bins)
        seen = np.flatnonzero(counts)
        means = np.interp(np.arange(len(counts)), seen, np.bincount(bins, took_ns)[seen] / counts[seen])
        self.reference = reference
        self.slowness: NDArray[np.float64] = (means / 1e3 / reference.us) ** reference.power
        """(bins,) time over work time in each half second."""
        spans = np.concatenate(([_BEYOND_NS], np.full(len(means), BIN_NS), [_BEYOND_NS]))  # nothing is known beyond
        slowness = np.concatenate((self.slowness[:1], self.slowness, self.slowness[-1:]))
        self._real = np.concatenate(([0.0], spans.cumsum())) + (at_ns[0] - _BEYOND_NS)
        work = np.concatenate(([0.0], (spans / slowness).cumsum()))
        self._work = work - work[1] + at_ns[0]

    def work(self, real_ns: Any) -> Any:
        """Work time (ns) at instants of the clock of ``at_ns``; the two are one at the first probe."""
        return np.interp(real_ns, self._real, self._work)

    def real(self, work_ns: Any) -> Any:
        """The inverse."""
        return np.interp(work_ns, self._work, self._real)


@contextmanager
def watching(core: int, file: Path) -> Iterator[None]:
    """Probe ``core`` while the block runs; the probes are added to ``file``. EngineError, before the block: it cannot be watched."""
    command = [sys.executable, "-m", "sage_bench.core_sampler", str(core), str(file)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    try:
        before, until = _size(file), time.monotonic() + BEGIN_S
        while _size(file) == before:
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                why = process.stderr.read().decode(errors="replace").strip().splitlines()
                raise EngineError(f"core {core} cannot be watched: {why[-1] if why else 'nothing was probed'}")
            time.sleep(0.02)
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stderr.close()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def probes_in(file: Path, until_ns: int = 0) -> Probes:
    """What the sampler has written so far. EngineError: nothing yet, or nothing of the time until ``until_ns``."""
    try:
        raw = file.read_bytes()
    except OSError:
        raw = b""
    pairs = np.frombuffer(raw[: len(raw) // 16 * 16], np.int64).reshape(-1, 2)
    if not len(pairs):
        raise EngineError(f"{file}: the core that is to be watched has not been probed; is it a core of this machine?")
    if pairs[-1, 0] < until_ns - LATE_NS:
        raise EngineError(
            f"{file}: what probes the core has ended too early; somebody killed it, or there is no room on the disk"
        )
    return Probes(pairs[:, 0], pairs[:, 1])


def write_core_speed(folder: Path, origin_ns: int) -> None:
    """``core_speed.parquet`` of a run, where its core was watched; instants count from ``origin_ns`` of the monotonic clock.
    Raises OutputError."""
    path = folder / SAMPLES
    if not _size(path):
        return
    probes = probes_in(path)
    try:
        pq.write_table(
            pa.table([probes.at_ns - origin_ns, probes.took_ns], schema=CORE_SPEED), folder / NAME, compression="zstd"
        )
    except OSError as error:
        raise output_error(folder / NAME, error) from error
    path.unlink()


def probes_of(run: Path) -> Probes | None:
    """Of a run's folder, on the clock of its tables; None where its core was not watched. DataError: a broken file."""
    if not (run / NAME).exists():
        return None
    table = read_table(run / NAME, CORE_SPEED)
    if not table.num_rows:
        raise DataError(f"{run / NAME}: holds no probe; delete it, and the run is compared in seconds")
    return Probes(*(table.column(name).to_numpy().astype(np.int64) for name in ("at_ns", "probe_ns")))
