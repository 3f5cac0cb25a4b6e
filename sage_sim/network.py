"""The way between the plane and its replicas, in nanoseconds each way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sage_core.errors import ConfigError
from sage_core.units import Nanos, seconds

DELAY_S_MAX = 3600.0
"""A delay beyond this is a mistake in the units."""

_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """One-way delay: ``delay_s`` plus a uniform share of ``jitter_s``. Messages on one way are never reordered."""

    delay_s: float = 0.0002
    jitter_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("delay_s", "jitter_s"):
            value = getattr(self, name)
            if not 0 <= value <= DELAY_S_MAX:
                raise ConfigError(f"network.{name}: expected seconds from 0 to {DELAY_S_MAX:g}, got {value!r}")


class Way:
    """One direction of one link, as TCP gives it: first in, first out."""

    def __init__(self, config: NetworkConfig, random: np.random.Generator) -> None:
        self.delay_ns = seconds(config.delay_s)
        self._jitter = seconds(config.jitter_s)
        self._random = random
        self._drawn: list[int] = []
        self._last = 0

    @property
    def draw(self) -> Callable[[], list[int]] | None:
        """Draws the next shares of the jitter (ns), of which the last is used first; None without jitter."""
        return self._draw if self._jitter else None

    def arrives_at(self, now: int) -> Nanos:
        """When a message sent now arrives."""
        if not self._jitter:
            return Nanos(now + self.delay_ns)
        if not self._drawn:
            self._drawn = self._draw()
        self._last = max(self._last, now + self.delay_ns + self._drawn.pop())
        return Nanos(self._last)

    def _draw(self) -> list[int]:
        drawn: list[int] = self._random.integers(0, self._jitter + 1, size=_CHUNK).tolist()
        return drawn
