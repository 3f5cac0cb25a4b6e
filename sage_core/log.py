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
        return self.encoded_step(now, _encode(events), commands)

    def encoded_step(self, now: int, events: bytes, commands: Sequence[AnyCommand]) -> Step:
        """The same for events as they were recorded: two encodings of one number are not the same log."""
        digest = _blake2b(
            b"".join((self.digest, now.to_bytes(8, "little"), events, _encode(commands))), digest_size=DIGEST_BYTES
        ).digest()
        self.digest = digest
        return Step(now, events, digest)


def decode_events(step: int, events: bytes) -> tuple[AnyEvent, ...]:
    """The events of a log entry; DataError naming the step when they cannot be read."""
    try:
        return _decoder.decode(events)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"log step {step}: events cannot be decoded ({error}); the log is damaged") from error
