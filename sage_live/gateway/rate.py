"""How much a tenant may ask for: requests and tokens a minute, as two leaky buckets (GCRA, ITU-T I.371).

A bucket is one integer, the instant at which it will be empty again ("theoretical arrival time"); taking n units moves it
n intervals on. There is no refill job, and a bucket whose instant has passed equals one never used, so forgetting it
changes nothing: memory is bounded by the tenants that are in debt now.

What is promised: in any window of w seconds a tenant is allowed at most ``limit * (w + BURST_S) / 60`` units, or
``limit * w / 60`` and one single request where that alone is larger (it has to wait for an empty bucket, and pays after).
So a limit is kept at all times, not once a minute; OpenAI enforces its own the same way, in parts of a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from sage_core.errors import ConfigError
from sage_core.units import SECOND

BURST_S: Final = 10
"""How much of a minute's allowance may be used at once, in seconds of it: never less than one unit."""

SWEEP_MIN: Final = 1024
"""Tenants remembered before the first look at which of them may be forgotten."""


class Limits(msgspec.Struct, frozen=True):
    """What one tenant may use; None is without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 10**12:
                raise ConfigError(f"{name}: expected a number from 1 to 10^12 or none at all, got {value}")


class RateLimits:
    """Per-tenant limits. ``overrides`` is looked at on every call: a mapping that changes is obeyed at once."""

    def __init__(self, default: Limits | None = None, overrides: Mapping[str, Limits] | None = None) -> None:
        self._default = default or Limits()
        self._overrides: Mapping[str, Limits] = {} if overrides is None else overrides
        self._empty_at: dict[str, list[int]] = {}  # tenant: when its buckets of requests and of tokens will be empty
        self._sweep_at = SWEEP_MIN

    def __len__(self) -> int:
        return len(self._empty_at)

    def take(self, tenant: str, now_ns: int, tokens: int) -> int:
        """0: allowed, and counted. Else nothing is counted and this is when to come back, in ns from ``now_ns``.

        tokens: what the request may cost, input and the most it may generate. ``now_ns``: of a clock that never goes back.
        """
        limits = self._overrides.get(tenant, self._default)
        requests_max, tokens_max = limits.requests_per_minute, limits.tokens_per_minute
        if requests_max is None and tokens_max is None:
            return 0
        buckets = self._empty_at.get(tenant)
        if buckets is None:
            buckets = self._remember(tenant, now_ns)
        wait_ns = requests_at = tokens_at = 0
        if requests_max is not None:
            requests_at, wait_ns = _after(buckets[0], now_ns, 1, requests_max)
        if tokens_max is not None:
            tokens_at, wait_tokens_ns = _after(buckets[1], now_ns, tokens, tokens_max)
            wait_ns = max(wait_ns, wait_tokens_ns)
        if wait_ns > 0:
            return wait_ns
        buckets[0] = requests_at
        buckets[1] = tokens_at
        return 0

    def _remember(self, tenant: str, now_ns: int) -> list[int]:
        if len(self._empty_at) >= self._sweep_at:
            self._empty_at = {name: at for name, at in self._empty_at.items() if max(at) > now_ns}
            # Twice what is left: each sweep is paid for by as many newcomers as it looks at.
            self._sweep_at = max(SWEEP_MIN, 2 * len(self._empty_at))
        buckets = self._empty_at[tenant] = [0, 0]
        return buckets


def _after(empty_at: int, now_ns: int, units: int, per_minute: int) -> tuple[int, int]:
    """When the bucket would be empty after ``units`` more, and how long to wait before they fit (<= 0: they do)."""
    # Rounded up: a bucket may be a nanosecond a request too strict, never too generous.
    cost_ns = -(-units * 60 * SECOND // per_minute)
    if empty_at <= now_ns:
        return now_ns + cost_ns, 0
    burst_ns = max(BURST_S * SECOND, -(-60 * SECOND // per_minute))
    return empty_at + cost_ns, min(empty_at + cost_ns - now_ns - burst_ns, empty_at - now_ns)
