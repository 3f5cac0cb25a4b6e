"""A gateway beside a controller: started, started again when it ends, stopped with it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path

from sage_core.errors import EngineError
from sage_live.jobs.launch import Launch
from sage_live.jobs.local import JobProcess, start_process

AGAIN_S = 1.0
"""From its end to its next start."""

_log = logging.getLogger(__name__)


class GatewayService:
    """On one port for good, so that clients find it again; the engines it served come back through a follower."""

    def __init__(self, launch: Launch, host: str, port: int, logs: Path | None = None) -> None:
        self.url = f"http://{host}:{port}"
        self._launch = launch
        self._host = host
        self._port = port
        self._logs = logs
        self._process: JobProcess | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Until it listens. EngineError."""
        self._process = await self._start()
        self._keeping = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """SIGTERM: it drains."""
        if self._keeping is not None:
            self._keeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeping
        if self._process is not None:
            await self._process.stop()

    async def _start(self) -> JobProcess:
        return await start_process("gateway", self._launch, (), self._host, self._port, self._logs)

    async def _keep(self) -> None:
        while True:
            assert self._process is not None
            _log.warning("gateway: %s; starting it again", await self._process.ended())
            started = False
            while not started:
                await asyncio.sleep(AGAIN_S)
                try:
                    self._process = await self._start()
                    started = True
                except EngineError as error:
                    _log.warning("gateway: %s", error)
