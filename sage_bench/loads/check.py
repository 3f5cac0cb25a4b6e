"""Argument checks of loads: one clear :class:`ConfigError` that names the key as the configuration spells it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

from sage_core.errors import ConfigError


def number(key: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """``value`` as a float in [low, high], or in (low, high] with ``above``; infinity and NaN are refused."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if fits:
        fits = (value > low if above else value >= low) and value <= high  # type: ignore[operator]
    if not fits:
        bound = f"above {low:g}" if above else f"of at least {low:g}"
        raise ConfigError(f"{key}: expected a number {bound}{_at_most(high)}, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def whole(key: str, value: object, low: int, high: float = math.inf) -> int:
    """``value`` as an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{key}: expected a whole number of at least {low}{_at_most(high)}, got {value!r}")
    return value


def shares(key: str, values: Mapping[str, float | None]) -> dict[str, float]:
    """Fractions of one that sum to one. One of them may be null: it takes what the others leave."""
    if not values:
        raise ConfigError(f"{key}: expected at least one entry, got none")
    given = {name: number(f"{key}.{name}", value, 0.0, 1.0) for name, value in values.items() if value is not None}
    open_names = [name for name in values if values[name] is None]
    rest = 1.0 - math.fsum(given.values())
    if len(open_names) > 1:
        raise ConfigError(f"{key}: only one share may be null (it takes the rest); null now: {', '.join(open_names)}")
    if rest < -1e-9 or (not open_names and rest > 1e-9):
        listed = ", ".join(f"{name} {value:g}" for name, value in given.items())
        raise ConfigError(
            f"{key}: shares must sum to 1, they sum to {1.0 - rest:g} ({listed}); set one to null for 'the rest'"
        )
    return {name: max(rest, 0.0) if value is None else given[name] for name, value in values.items()}


def _at_most(high: float) -> str:
    return "" if math.isinf(high) else f" and at most {high:g}"
