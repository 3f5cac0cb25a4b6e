"""The file of API keys: entries with hashes; the keys themselves are printed once, when they are made.

A key reads ``sage-ID-SECRET``: ID finds the entry and is no secret, SECRET is 256 bits from the operating system. What is
kept is the SHA-256 of the whole key, unsalted and unstretched: both exist to slow down the guessing of what people choose,
and nobody guesses 256 random bits.

The file is JSON, or YAML if its name says so: ``{"keys": [{"id", "tenant", "hash", "created", ...}]}``. It is replaced as a
whole, so a reader sees the old one or the new one; only its owner may read it.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import msgspec
import yaml

from sage_core.errors import ConfigError, DataError, OutputError
from sage_core.paths import user_paths
from sage_live.gateway.rate import Limits

PREFIX: Final = "sage-"
_YAML: Final = (".yaml", ".yml")


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry. Limits are the tenant's: the keys of one tenant must not contradict each other."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}$")]
    tenant: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    hash: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    created: str  # ISO 8601, for people
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    priority_min: int = 0  # the most urgent priority it may ask for; the lower is served first
    manage: bool = False  # may use /v1/management

    @property
    def limits(self) -> Limits:
        """What the entry states; empty where the gateway's default holds."""
        return Limits(self.requests_per_minute, self.tokens_per_minute)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Key] = []


def default_path(env: Mapping[str, str]) -> Path:
    """``keys.json`` in the user's configuration folder."""
    return user_paths(env).config / "keys.json"


def read_keys(path: Path) -> list[Key]:
    """The entries of a key file. Raises ``DataError``: not there, not of this form, or contradicting itself."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); `sage gateway key add TENANT` makes one") from None
    try:
        if path.suffix in _YAML:
            keys = msgspec.convert(yaml.safe_load(data) or {}, _File).keys
        else:
            keys = msgspec.json.decode(data, type=_File).keys
        tenant_limits(keys)
    except (msgspec.MsgspecError, yaml.YAMLError, UnicodeDecodeError, ConfigError) as error:
        raise DataError(f"{path}: not a key file ({' '.join(str(error).split())})") from None
    return keys


def tenant_limits(keys: Iterable[Key]) -> dict[str, Limits]:
    """Tenant to its limits, where its keys state any. Raises ``ConfigError`` if they contradict each other."""
    limits: dict[str, Limits] = {}
    repeated = [identifier for identifier, count in Counter(key.id for key in keys).items() if count > 1]
    if repeated:
        raise ConfigError(f"key id {repeated[0]} stands there twice")
    for key in keys:
        if limits.setdefault(key.tenant, key.limits) != key.limits:
            raise ConfigError(f"keys of tenant {key.tenant!r} state different limits; they share one allowance")
    return {tenant: stated for tenant, stated in limits.items() if stated != Limits()}


def add_key(
    path: Path, tenant: str, limits: Limits | None = None, priority_min: int = 0, manage: bool = False
) -> tuple[Key, str]:
    """Make a key for ``tenant``: its entry, and the key itself, which stands nowhere else.

    limits: the tenant's, set for all its keys; None leaves what they state. Raises ``ConfigError``, ``DataError``,
    ``OutputError``.
    """
    if not 1 <= len(tenant) <= 128:
        raise ConfigError("tenant: expected a name of 1 to 128 characters")
    with _locked(path):
        keys = read_keys(path) if path.exists() else []
        if limits is None:
            limits = tenant_limits(keys).get(tenant, Limits())
        taken = {key.id for key in keys}
        identifier = next(i for i in iter(lambda: secrets.token_hex(4), "") if i not in taken)
        secret = f"{PREFIX}{identifier}-{secrets.token_urlsafe(32)}"
        entry = Key(
            id=identifier,
            tenant=tenant,
            hash=hashlib.sha256(secret.encode()).hexdigest(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            priority_min=priority_min,
            manage=manage,
        )
        _write(path, [_with(key, limits) if key.tenant == tenant else key for key in keys] + [entry])
    return entry, secret


def revoke_key(path: Path, identifier: str) -> Key:
    """Take a key out of the file; a running gateway refuses it about a second later. ``ConfigError`` if it is unknown."""
    if not path.exists():
        raise ConfigError(f"key: there is no key file {path}")
    with _locked(path):
        keys = read_keys(path)
        for key in keys:
            if key.id == identifier:
                _write(path, [other for other in keys if other is not key])
                return key
    known = ", ".join(key.id for key in keys) or "none"
    raise ConfigError(f"key: unknown id {identifier!r} in {path}; known: {known}")


def _with(key: Key, limits: Limits) -> Key:
    return msgspec.structs.replace(
        key, requests_per_minute=limits.requests_per_minute, tokens_per_minute=limits.tokens_per_minute
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two commands at once change the file one after the other: the folder is the lock, it outlives the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be used for API keys ({error.strerror})") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, keys: list[Key]) -> None:
    content = _File(keys)
    if path.suffix in _YAML:
        data = yaml.safe_dump(msgspec.to_builtins(content), sort_keys=False).encode()
    else:
        data = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
    try:
        # mkstemp makes the file with mode 0600, before anything is in it.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
