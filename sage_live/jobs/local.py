"""Engines as processes of this machine, which stands for every node of the cluster."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from sage_core.errors import EngineError
from sage_core.job_events import Start
from sage_live.jobs.engine_ports import EnginePorts
from sage_live.jobs.launch import Launch
from sage_live.processes import STOP_GRACE_S, EngineProcess


class JobProcess(EngineProcess):
    """One that can be killed as well."""

    def kill(self) -> None:
        """SIGKILL to the engine and all it started. Its guard sees that, clears up, and ends."""
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            for leader in psutil.Process(self._process.pid).children():
                os.killpg(leader.pid, signal.SIGKILL)  # the guard made it the head of a group

    async def stop(self) -> None:
        """As any. One that is cancelled kills, and returns when nothing is left all the same: what is told of as gone
        has given back its GPU."""
        try:
            await super().stop()
        except asyncio.CancelledError:
            while self.running:
                self.kill()
                with suppress(asyncio.CancelledError):
                    await self._process.wait()
            raise

    async def ended(self) -> str:
        """Waits for the end; how it was: the exit code, and the last line it printed."""
        code = await self.wait()
        how = f"killed by signal {code - 128}" if code > 128 else f"exit code {code}"
        last = self.tail(1).strip()
        return f"{how}: {last}" if last else how


class LocalEngine:
    """A process and its port."""

    def __init__(self, process: JobProcess, port: int, ports: EnginePorts) -> None:
        self.url = process.url
        self._process = process
        self._port = port
        self._ports = ports

    async def wait(self) -> str:
        try:
            return await self._process.ended()
        finally:
            self._ports.release(self._port)

    async def stop(self) -> None:
        await self._process.stop()

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()


class LocalActuator:
    """logs: their folder; None: that of the user (sage_core.paths). grace_s: from SIGTERM to SIGKILL, if no Kill comes."""

    def __init__(self, logs: Path | None = None, host: str = "127.0.0.1", grace_s: float = STOP_GRACE_S) -> None:
        self._logs = logs
        self._host = host
        self._grace_s = grace_s
        self._ports = EnginePorts()

    async def start(self, name: str, launch: Launch, placed: Start) -> LocalEngine:
        port = self._ports.take(launch.service)
        try:
            process = await start_process(name, launch, placed.gpus, self._host, port, self._logs, self._grace_s)
        except BaseException:
            self._ports.release(port)
            raise
        return LocalEngine(process, port, self._ports)

    async def nodes(self) -> None:
        """They are this machine."""


async def start_process(
    name: str,
    launch: Launch,
    gpus: tuple[int, ...],
    host: str,
    port: int,
    logs: Path | None,
    grace_s: float = STOP_GRACE_S,
) -> JobProcess:
    """Until it is healthy. EngineError."""
    try:
        process = await JobProcess.start(
            name,
            launch.words(host, port),
            port=port,
            host=host,
            env=launch.environment(gpus),
            logs=logs,
            health=launch.health,
            timeout_s=launch.start_timeout_s,
            grace_s=grace_s,
        )
    except OSError as error:  # its log cannot be written; EngineError is one too
        if isinstance(error, EngineError):
            raise
        raise EngineError(f"{name}: cannot be started: {error}") from error
    assert isinstance(process, JobProcess)
    return process
