"""API keys: who is asking.

The ID within a presented key finds the entry; the hash of the whole key is compared with the entry's in constant time, and
an unknown ID takes the same path. The file (``keyfile.py``) is looked at again when it changes, at most once a second; one
that became unreadable changes nothing but the log.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from sage_core.errors import DataError
from sage_core.units import SECOND
from sage_live.gateway.keyfile import Key, read_keys, tenant_limits
from sage_live.gateway.rate import Limits

AUTHORIZATION_BYTES_MAX: Final = 256
_SCHEME: Final = b"bearer "  # RFC 9110, 11.1: the scheme is case-insensitive
_NOBODY: Final = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
_log = logging.getLogger(__name__)


class ApiKeys:
    """The keys of a file, kept current. Raises ``DataError`` if it cannot be read to begin with.

    clock: monotonic ns.
    """

    def __init__(self, path: Path, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._path = path
        self._clock = clock
        self._limits: dict[str, Limits] = {}
        self._version = _version(path)
        self._take(read_keys(path))
        self._look_at = clock() + SECOND

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def limits(self) -> Mapping[str, Limits]:
        """Tenant to limits, where its keys state them: always the same object, so ``RateLimits`` sees what changes."""
        return self._limits

    def check(self, authorization: bytes | None) -> Key | None:
        """Whose key the header's value, ``Bearer KEY``, holds; None if it is missing, malformed or unknown."""
        if self._clock() >= self._look_at:
            self._look_again()
        if authorization is None or len(authorization) > AUTHORIZATION_BYTES_MAX:
            return None
        if authorization[:7].lower() != _SCHEME:
            return None
        presented = authorization[7:].strip()
        parts = presented.split(b"-", 2)
        entry = self._keys.get(parts[1]) if len(parts) == 3 else None
        expected = _NOBODY if entry is None else entry.hash
        return entry if hmac.compare_digest(hashlib.sha256(presented).hexdigest(), expected) else None

    def _look_again(self) -> None:
        self._look_at = self._clock() + SECOND
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._take(read_keys(self._path))
        except DataError as error:
            _log.error("%s; the %d keys read before stay valid", error, len(self._keys))
        else:
            _log.info("%s: read again, %d keys", self._path, len(self._keys))

    def _take(self, keys: list[Key]) -> None:
        self._keys = {key.id.encode(): key for key in keys}
        self._limits.clear()
        self._limits.update(tenant_limits(keys))


def _version(path: Path) -> tuple[int, ...] | None:
    """What differs once the file was written or replaced; None while it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
