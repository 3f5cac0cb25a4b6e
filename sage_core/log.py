"""The log of a run: ordered steps, each ``(now, events, digest)``, and the digest that chains them.

The digest of a step covers the one before it, the instant, the events and the commands. Two runs with equal last
digests made the same decisions from the same facts; the first step whose digest differs is where they parted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from sage_core.commands import AnyCommand
from sage_core.errors import DataError
from sage_core.events import AnyEvent

DIGEST_BYTES: Final = 16
GENESIS: Final = bytes(DIGEST_BYTES)

_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(tuple[AnyEvent, ...])
_blake2b = hashlib.blake2b


class Step(NamedTuple):
    """One call of ``ControlPlane.step``: MessagePack array of its events, digest of what it decided."""

    now: int
    events: bytes
    digest: bytes


class Chain:
    """Digests step after step. ``digest`` is the last one."""

    __slots__ = ("digest",)

    def __init__(self) -> None:
        self.digest = GENESIS

    def step(self, now: int, events: Sequence[AnyEvent], commands: Sequence[AnyCommand]) -> Step:
        """The log entry of this step; advances the chain."""
        encoded = _encode(events)
        digest = _blake2b(
            b"".join((self.digest, now.to_bytes(8, "little"), encoded, _encode(commands))), digest_size=DIGEST_BYTES
        ).digest()
        self.digest = digest
        return Step(now, encoded, digest)


def decode_events(step: int, events: bytes) -> tuple[AnyEvent, ...]:
    """The events of a log entry; DataError naming the step when they cannot be read."""
    try:
        return _decoder.decode(events)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"log step {step}: events cannot be decoded ({error}); the log is damaged") from error
