"""The load of a gateway in service: whoever asks."""

from __future__ import annotations

from collections.abc import Iterator

from sage_core.errors import ConfigError
from sage_core.load import Arrival
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_core.units import Nanos


class Clients:
    """Has no requests of its own; what came is in the log. A :class:`sage_core.load.Load` that cannot be run."""

    def __init__(self, streams: Streams, slo: SloTable) -> None:
        pass

    def arrivals(self) -> Iterator[Arrival]:
        """ConfigError: there is nothing to run."""
        raise ConfigError(
            "load=clients: a gateway's requests come from outside; re-run what it recorded: sage whatif RUN"
        )

    def ended(self, now: Nanos, request: int) -> None:
        """Nobody follows."""
