"""Who used the machine while a run went on: ``python -m sage_bench.host_sampler FILE``, a process of its own.

A look at all processes takes milliseconds, which a load generator must not spend between two requests. What is sampled comes
as JSON on the first line of standard input: the process ids at the head of each group, by name. A process belongs to the
nearest of them among its ancestors. Rows are JSON lines; the first line of the file says what there is to sample. It ends
when its standard input does, so nothing outlives whoever started it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import psutil

INTERVAL_S: Final = 1.0
MACHINE: Final = "machine"

Row: TypeAlias = tuple[int, str, float | None, int, float | None, float | None]
"""Instant (ns of the monotonic clock), what, cores' worth of CPU time since the row before, bytes, share of a GPU's time,
watts."""


class Processes:
    """CPU time and memory of groups of processes. heads: process id to the name of its group."""

    def __init__(self, heads: Mapping[int, str]) -> None:
        self._heads = heads
        self._before: dict[psutil.Process, float] = {}
        self._machine_before = _machine_busy_s()
        self._at = time.monotonic_ns()
        self.rows()

    def rows(self) -> list[Row]:
        """One of the machine and one of each group that has a process, since the call before."""
        parents, found = {}, {}
        for process in psutil.process_iter(["ppid", "cpu_times", "memory_info"]):
            parents[process.pid], found[process.pid] = process.info["ppid"], process
        now, busy_s = time.monotonic_ns(), _machine_busy_s()
        span_s = max((now - self._at) / 1e9, 1e-9)
        cpu_s, memory, spent = dict[str, float](), dict[str, int](), dict[psutil.Process, float]()
        for process in found.values():
            group = self._group(process.pid, parents)
            times, used = process.info["cpu_times"], process.info["memory_info"]
            if group is None or times is None or used is None:  # none of ours, or it ended just now
                continue
            spent[process] = times.user + times.system
            cpu_s[group] = cpu_s.get(group, 0.0) + spent[process] - self._before.get(process, 0.0)
            memory[group] = memory.get(group, 0) + used.rss
        whole = psutil.virtual_memory()
        rows: list[Row] = [
            (now, MACHINE, (busy_s - self._machine_before) / span_s, whole.total - whole.available, None, None)
        ]
        rows += [(now, group, cpu_s[group] / span_s, memory[group], None, None) for group in cpu_s]
        self._before, self._machine_before, self._at = spent, busy_s, now
        return rows

    def _group(self, pid: int | None, parents: Mapping[int, int | None]) -> str | None:
        seen = 0
        while pid is not None and seen < len(parents):
            if pid in self._heads:
                return self._heads[pid]
            pid, seen = parents.get(pid), seen + 1
        return None


def _machine_busy_s() -> float:
    """CPU time that all cores have not been idle for."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def gpus() -> tuple[Callable[[], list[Row]], int, str | None]:
    """What samples the GPUs of this machine, how many there are, and why there are none."""
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:
        return list, 0, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return list, 0, f"NVML: {error}"
    if not handles:
        return list, 0, "NVML finds no GPU"

    def rows() -> list[Row]:
        now = time.monotonic_ns()
        return [_gpu_row(pynvml, now, n, handle) for n, handle in enumerate(handles)]

    return rows, len(handles), None


def _gpu_row(nvml: Any, now: int, number: int, handle: Any) -> Row:
    def of(ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(handle)
        except nvml.NVMLError:  # not every device tells everything
            return None

    rates, memory = of(nvml.nvmlDeviceGetUtilizationRates), of(nvml.nvmlDeviceGetMemoryInfo)
    power_mw = of(nvml.nvmlDeviceGetPowerUsage)
    share = None if rates is None else rates.gpu / 100
    return now, f"gpu{number}", None, 0 if memory is None else memory.used, share, power_mw and power_mw / 1e3


def main(file: Path) -> None:
    """Sample until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us, and ends our input
    heads = {int(pid): name for pid, name in json.loads(sys.stdin.readline()).items()} | {os.getpid(): "sampler"}
    gpu_rows, count, reason = gpus()
    with file.open("w", encoding="utf-8") as out:
        print(json.dumps({"interval_s": INTERVAL_S, "gpus": count, "no_gpu": reason}), file=out, flush=True)
        processes = Processes(heads)
        due = time.monotonic() + INTERVAL_S
        while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
            due += INTERVAL_S
            for row in [*processes.rows(), *gpu_rows()]:
                print(json.dumps(row), file=out)
            out.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
