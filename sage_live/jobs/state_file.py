"""Where a controller of this machine tells other commands that it runs, and what.

A lock says whether it lives: the kernel gives it back whatever way it ends, so a process id that was used again is never
taken for a controller.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Final

import msgspec

from sage_core.errors import ConfigError, OutputError
from sage_core.paths import user_paths
from sage_live.jobs.status import ClusterStatus

_READERS_S: Final = 1.0
"""Who asks whether a controller lives holds the lock for a moment."""

_log = logging.getLogger(__name__)


class StateFile:
    """Of the cluster ``name``. As a context: held by its controller; ConfigError where another one holds it."""

    def __init__(self, name: str, env: Mapping[str, str]) -> None:
        self.name = name
        self.path = user_paths(env).logs.parent / "clusters" / f"{name}.json"
        self._lock: int | None = None

    def __enter__(self) -> StateFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OutputError(f"{self.path.parent}: cannot be written ({error.strerror})") from error
        if not _locked(lock):
            os.close(lock)
            raise ConfigError(
                f"cluster {self.name}: is up already; `sage cluster down` it first, or give this one --name"
            )
        self._lock = lock
        self.path.unlink(missing_ok=True)  # of one that was killed: its process id may be anybody's by now
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, status: ClusterStatus) -> None:
        """Readers see the last one or this one, never a part. Where it cannot be written a warning says so: engines that
        serve are worth more than what is told of them."""
        draft = self.path.with_suffix(".new")
        try:
            draft.write_bytes(msgspec.json.encode(status))
            draft.replace(self.path)
        except OSError as error:
            _log.warning(
                "%s: cannot be written (%s): `sage cluster status` does not see this", self.path, error.strerror
            )

    def read(self) -> ClusterStatus | None:
        """None: no controller lives."""
        if not self.held:
            return None
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=ClusterStatus)
        except FileNotFoundError:
            return None

    @property
    def held(self) -> bool:
        """Whether a controller lives."""
        try:
            lock = os.open(self.path.with_suffix(".lock"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(lock)
        return False


def _locked(lock: int) -> bool:
    """Whether it could be had for us alone."""
    deadline = time.monotonic() + _READERS_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
