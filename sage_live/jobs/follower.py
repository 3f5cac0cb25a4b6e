"""A gateway's engines, kept in step with what runs, through its management API.

What is wanted is a table; whoever changes it wakes the follower, which compares it with what the gateway lists. So a
gateway that was started again, or was away, gets its engines back.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

import msgspec

from sage_core.errors import EngineError
from sage_live.jobs.ask import ask

ENGINES: Final = "/v1/management/engines"
LOOK_S: Final = 2.0
"""Between two looks where nothing changed."""
AGAIN_S: Final = 0.2
"""After one that failed."""

_log = logging.getLogger(__name__)


class _Listed(msgspec.Struct):
    name: str


class _List(msgspec.Struct):
    data: list[_Listed]


class Follower:
    """Of the gateway at ``url``. :meth:`run` is its life."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._wanted: dict[str, dict[str, Any]] = {}
        self._ours: set[str] = set()  # all that we added: what others put in service is theirs
        self._leaving: set[str] = set()
        self._adding = asyncio.Lock()
        self._woken = asyncio.Event()
        self._trouble = ""  # that was told last

    def add(self, name: str, url: str, model: str, kind: str, adapter: str) -> None:
        """Send it work from now on. kind: "llm" or "embedding"."""
        self._wanted[name] = {"name": name, "url": url, "model": model, "kind": kind, "adapter": adapter}
        self._woken.set()

    def remove(self, name: str) -> None:
        """It is gone."""
        self._wanted.pop(name, None)
        self._woken.set()

    async def drain(self, name: str) -> None:
        """Give it no more work; returns when it has finished what it has, or the gateway cannot be asked."""
        self._leaving.add(name)
        self._wanted.pop(name, None)
        try:
            async with self._adding:  # it may be on its way in
                pass
            await self._delete(name, timeout_s=3600.0)
        except EngineError as error:
            _log.warning("gateway: %s is not drained: %s", name, error)
        finally:
            self._leaving.discard(name)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._woken.clear()
            try:
                await self._look()
                self._trouble = ""
                wait_s = LOOK_S
            except (EngineError, msgspec.DecodeError) as error:
                if str(error) != self._trouble:
                    _log.warning("gateway: %s", error)
                self._trouble = str(error)
                wait_s = AGAIN_S
            with suppress(TimeoutError):  # not wait_for: that of 3.11 may lose a cancellation
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()

    async def _look(self) -> None:
        status, body = await ask(self.url, ENGINES)
        if status != 200:
            raise EngineError(f"{self.url}{ENGINES}: answered {status}")
        listed = {each.name for each in msgspec.json.decode(body, type=_List).data}
        for name in listed & self._ours - self._wanted.keys() - self._leaving:
            await self._delete(name, "?force=true")
        refused = ""
        for name in [each for each in self._wanted if each not in listed]:
            refused = await self._add(name) or refused
        if refused:
            raise EngineError(refused)

    async def _add(self, name: str) -> str:
        """Unless it is wanted no more by now; "", or why the gateway did not take it."""
        async with self._adding:
            if name not in self._wanted:
                return ""
            engine = msgspec.json.encode(self._wanted[name])
            self._ours.add(name)  # before: an answer that is lost says nothing
            status, told = await ask(self.url, ENGINES, method="POST", body=engine)
        if name not in self._wanted:
            self._woken.set()  # removed meanwhile: look again at once
        return "" if status == 201 else f"{self.url}: engine {name} was not taken ({status}): {told.decode()[:300]}"

    async def _delete(self, name: str, query: str = "", timeout_s: float = 5.0) -> None:
        path = f"{ENGINES}/{quote(name, safe='')}{query}"
        status, _ = await ask(self.url, path, method="DELETE", timeout_s=timeout_s)
        if status not in (204, 404):
            raise EngineError(f"{self.url}{path}: answered {status}")
