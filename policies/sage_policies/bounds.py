"""One check and one wording for every number a user can set on a policy."""

from __future__ import annotations

import math

from sage_core.errors import ConfigError


def require(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """``low <= value <= high`` and finite, or a :class:`ConfigError` that names the parameter; NaN and non-numbers too."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        wanted = f"a number from {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        raise ConfigError(f"policy.{name}: expected {wanted}, got {value!r}")
