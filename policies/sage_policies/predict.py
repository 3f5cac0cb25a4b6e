"""Expected output lengths. A prediction is made when a task is queued and never exceeds the client's own cap.

Only :class:`Oracle` knows the truth, and only because a simulation hands it the backend's table: its name goes into
every manifest, and its results are upper bounds, not policies.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sage_core.errors import ConfigError
from sage_policies.bounds import require

if TYPE_CHECKING:
    from sage_core import _native


class NoPrediction:
    """Nothing is known: 0 tokens, so decode work and KV growth are ignored."""

    name = "none"

    def native(self) -> _native.Predict:
        """Its native twin."""
        from sage_core import _native

        return _native.NoPrediction()

    def predict(self, request: int, tenant: str, kind: int, input_tokens: int, output_tokens_max: int) -> int:
        """0."""
        return 0

    def observe(self, tenant: str, kind: int, output_tokens: int) -> None:
        """Learns nothing."""


class MaxPrediction:
    """The client's cap: safe for memory, pessimistic for time."""

    name = "max"

    def native(self) -> _native.Predict:
        """Its native twin."""
        from sage_core import _native

        return _native.MaxPrediction()

    def predict(self, request: int, tenant: str, kind: int, input_tokens: int, output_tokens_max: int) -> int:
        """``output_tokens_max``."""
        return output_tokens_max

    def observe(self, tenant: str, kind: int, output_tokens: int) -> None:
        """Learns nothing."""


class TenantQuantile:
    """The exact ``q``-quantile (nearest rank) of the last ``window`` output lengths of the same tenant and kind.

    Until ``samples_min`` lengths were seen, ``prior`` tokens.
    """

    name = "tenant_quantile"

    def __init__(self, q: float = 0.75, window: int = 256, prior: int = 256, samples_min: int = 8) -> None:
        require("predict.q", q, 0.0, 1.0)
        require("predict.window", window, 1)
        require("predict.prior", prior, 0)
        require("predict.samples_min", samples_min, 1, window)
        self.q, self.window, self.prior, self.samples_min = q, window, prior, samples_min
        self._seen: dict[tuple[str, int], _Window] = {}

    def native(self) -> _native.Predict:
        """Its native twin, which has seen nothing yet."""
        from sage_core import _native

        return _native.TenantQuantile(self.q, self.window, self.prior, self.samples_min)

    def predict(self, request: int, tenant: str, kind: int, input_tokens: int, output_tokens_max: int) -> int:
        """Tokens, at most ``output_tokens_max``."""
        seen = self._seen.get((tenant, kind))
        if seen is None or len(seen.ranked) < self.samples_min:
            return min(self.prior, output_tokens_max)
        rank = min(int(self.q * len(seen.ranked)), len(seen.ranked) - 1)
        return min(seen.ranked[rank], output_tokens_max)

    def observe(self, tenant: str, kind: int, output_tokens: int) -> None:
        """Take one true length in, and the oldest out of a full window."""
        seen = self._seen.setdefault((tenant, kind), _Window())
        if len(seen.arrived) == self.window:
            del seen.ranked[bisect_left(seen.ranked, seen.arrived.popleft())]
        seen.arrived.append(output_tokens)
        insort(seen.ranked, output_tokens)


class Oracle:
    """The truth, from ``lookup(request) -> output tokens``, which the composition root binds in a simulation."""

    name = "oracle"

    def __init__(self, lookup: Callable[[int], int] | None = None) -> None:
        self._lookup = lookup

    def bind(self, lookup: Callable[[int], int]) -> None:
        """Give it the truth."""
        self._lookup = lookup

    def predict(self, request: int, tenant: str, kind: int, input_tokens: int, output_tokens_max: int) -> int:
        """The true length, at most ``output_tokens_max``; 0 where nothing is generated."""
        if self._lookup is None:
            raise ConfigError(
                "policy.predict: the oracle was given no true lengths; it works only in simulation. "
                "Choose sage_policies.predict.TenantQuantile for a live run"
            )
        return min(self._lookup(request), output_tokens_max)

    def observe(self, tenant: str, kind: int, output_tokens: int) -> None:
        """Learns nothing; it knows."""


@dataclass(slots=True)
class _Window:
    arrived: deque[int] = field(default_factory=deque)  # oldest first
    ranked: list[int] = field(default_factory=list)  # the same lengths, ascending
