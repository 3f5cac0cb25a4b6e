"""What the benchmarks over HTTP share: the fake engine, programs pinned to a core, and the CPU time of a process tree.

The fake engine and the load generator are C++ (``benchmarks/http``); `tool` compiles them into ``.sage/bench``.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / ".sage" / "bench"
SOURCES = ROOT / "benchmarks" / "http"


@contextmanager
def fake_backend(*arguments: str) -> Iterator[int]:
    """The fake engine on a free port, on the first core."""
    with running([str(tool("fake_backend")), *arguments], core=0, log=None) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline().split()[1])


@contextmanager
def running(command: Sequence[str], core: int, log: Path | None) -> Iterator[subprocess.Popen[str]]:
    """A process group pinned to one core (0: the first that we may use, -1: the last); it ends with the block.

    Its output goes to `log`, or into a pipe.
    """
    # Proxy settings of the machine must not come between loopback addresses.
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    with ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else subprocess.PIPE
        process = subprocess.Popen(
            [*pinned(core), *command],
            stdout=output, stderr=subprocess.STDOUT, text=True, env=clean, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if process.stdout is not None:
                process.stdout.close()


def pinned(core: int) -> tuple[str, ...]:
    cores = sorted(os.sched_getaffinity(0))
    return ("taskset", "-c", str(cores[core]))


def tool(name: str) -> Path:
    """A program of benchmarks/http, compiled where it is missing or older than a source."""
    program = TOOLS / name
    sources = [SOURCES / f"{name}.cpp", SOURCES / "wire.hpp"]
    if not program.exists() or program.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        TOOLS.mkdir(parents=True, exist_ok=True)
        fresh = program.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-O2", "-std=c++20", "-Wall", "-Wextra", "-o", str(fresh), str(sources[0])]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"{sources[0]} could not be compiled with {compiler}: {error}") from None
        fresh.replace(program)
    return program


def cpu_ns(process: psutil.Process) -> int:
    """CPU time of a process tree so far, all threads, to the nanosecond."""
    libc = ctypes.CDLL(None)
    total = 0
    for each in (process, *process.children(recursive=True)):
        clock = ctypes.c_int()
        if libc.clock_getcpuclockid(each.pid, ctypes.byref(clock)) == 0:
            total += time.clock_gettime_ns(clock.value)
    return total


def cpu_seconds() -> tuple[float, float, float]:
    """The clock, the idle time of all cores, and the CPU time of this process and of its children that have ended."""
    times = psutil.cpu_times()
    mine = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.monotonic(), times.idle + times.iowait, sum(each.ru_utime + each.ru_stime for each in mine)


def others_share(before: tuple[float, float, float]) -> float:
    """The share of all cores that programs other than ours have had since: above a few per cent, measure again."""
    elapsed_s, idle_s, mine_s = (now - then for now, then in zip(cpu_seconds(), before, strict=True))
    whole = elapsed_s * (psutil.cpu_count() or 1)
    return max(0.0, whole - idle_s - mine_s) / whole


def set_pace(backend: int, ms: float, chunks: int) -> None:
    """Of streams of the fake engine that begin later: time between events, and content deltas."""
    url = f"http://127.0.0.1:{backend}/pace?ms={ms}&chunks={chunks}"
    request = urllib.request.Request(url, b"", method="POST")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5):
        pass


def last_line(text: str) -> str:
    """The last that says something: not the lower edge of a box."""
    lines = [line.strip(" │╰─╯") for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
