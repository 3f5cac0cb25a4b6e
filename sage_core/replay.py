"""Re-deciding a log: a fresh plane is given the recorded events, and must give the recorded commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sage_core.commands import AnyCommand
from sage_core.events import AnyEvent
from sage_core.log import Chain, Step, decode_events
from sage_core.native_plane import Plane
from sage_core.units import Nanos


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first step that was decided differently, with what was decided now."""

    step: int
    now: int
    expected: bytes
    actual: bytes
    events: tuple[AnyEvent, ...]
    commands: tuple[AnyCommand, ...]
    error: str | None = None  # the step could not be taken at all

    def __str__(self) -> str:
        head = f"step {self.step} at {self.now} ns: recorded {self.expected.hex()}, re-decided {self.actual.hex()}"
        if self.error is not None:
            return f"step {self.step} at {self.now} ns cannot be taken: {self.error}"
        return "\n".join(
            [
                head,
                *(f"  event   {event}" for event in self.events),
                *(f"  command {command}" for command in self.commands),
            ]
        )


@dataclass(frozen=True, slots=True)
class Replayed:
    """Steps taken, the last digest, and where it parted, if it did."""

    steps: int
    digest: bytes
    divergence: Divergence | None


def replay(log: Iterable[Step], plane: Plane) -> Replayed:
    """Feed ``log`` to ``plane``, a fresh one, up to the first divergence. Raises DataError for a damaged log."""
    chain = Chain()
    number = 0
    for number, step in enumerate(log, start=1):
        events = decode_events(number, step.events)
        try:
            commands = plane.step(Nanos(step.now), events)
        except Exception as error:  # whatever a changed log, another policy or our own defect makes of it
            parted = Divergence(number, step.now, step.digest, b"", events, (), f"{type(error).__name__}: {error}")
            return Replayed(number, chain.digest, parted)
        actual = chain.encoded_step(step.now, step.events, commands).digest
        if actual != step.digest:
            return Replayed(number, actual, Divergence(number, step.now, step.digest, actual, events, tuple(commands)))
    return Replayed(number, chain.digest, None)
