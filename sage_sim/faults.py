"""Things that go wrong at a stated time; faults are just events."""

from __future__ import annotations

from dataclasses import dataclass

from sage_core.errors import ConfigError
from sage_core.units import SECONDS_MAX

KINDS = ("crash", "drain")


@dataclass(frozen=True, slots=True)
class Fault:
    """``crash``: the device dies with all it holds. ``drain``: it finishes what it has and leaves.

    With ``restart_after_s`` its replicas come back, empty and under new ids, that long after the fault.
    """

    at_s: float
    device: int
    kind: str = "crash"
    restart_after_s: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"fault.kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("at_s", "restart_after_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= SECONDS_MAX:
                raise ConfigError(f"fault.{name}: expected seconds from 0 to {SECONDS_MAX:g}, got {value!r}")
