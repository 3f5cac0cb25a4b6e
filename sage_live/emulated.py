"""An emulated engine: a backend model in real time.

The model keeps its own exact instants; what it tells arrives when the event loop gets to it, a fraction of a millisecond
late on an idle machine. Live code paths are exercised at scale without a GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sage_core.backend import BackendModel
from sage_core.commands import Cancel, Dispatch
from sage_core.events import ReplicaJoined
from sage_core.units import NEVER, Nanos
from sage_live.driver import Post


class EmulatedBackend:
    """A :class:`sage_live.driver.Backend`."""

    def __init__(self, model: BackendModel) -> None:
        self._model = model
        self._alarm: asyncio.TimerHandle | None = None

    def joined(self) -> list[ReplicaJoined]:
        """What each replica says when it becomes healthy."""
        return self._model.joined()

    def start(self, post: Post, now: Callable[[], Nanos]) -> None:
        """From now on commands come, and events go to ``post``."""
        self._post, self._now = post, now

    def carry_out(self, command: Dispatch | Cancel) -> None:
        """The model takes the command."""
        now = self._catch_up()
        for event in self._model.step(now, (command,)):
            self._post(event)
        self._arm()

    async def close(self) -> None:
        """Nothing more is told."""
        if self._alarm is not None:
            self._alarm.cancel()

    def _catch_up(self) -> Nanos:
        """Everything that has happened by now, at the model's own instants."""
        now = self._now()
        while (at := self._model.wakeup_at) <= now:
            for event in self._model.step(at, ()):
                self._post(event)
        return now

    def _on_alarm(self) -> None:
        self._alarm = None
        self._catch_up()
        self._arm()

    def _arm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        wakeup = self._model.wakeup_at
        if wakeup < NEVER:
            delay_s = max(0, wakeup - self._now()) / 1e9
            self._alarm = asyncio.get_running_loop().call_later(delay_s, self._on_alarm)
