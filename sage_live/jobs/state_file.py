"""Where a controller of this machine tells other commands that it runs, and what.

A lock says whether it lives: the kernel gives it back whatever way it ends, so a process id that was used again is never
taken for a controller.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from types import TracebackType

import msgspec

from sage_core.errors import ConfigError, OutputError
from sage_core.paths import user_paths
from sage_live.jobs.status import ClusterStatus


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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ConfigError(
                f"cluster {self.name}: is up already; `sage cluster down` it first, or give this one --name"
            ) from None
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, status: ClusterStatus) -> None:
        """Readers see the last one or this one, never a part."""
        draft = self.path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(status))
        draft.replace(self.path)

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
