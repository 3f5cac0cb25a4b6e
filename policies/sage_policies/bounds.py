"""One check and one wording for every number a user can set on a policy."""

from __future__ import annotations

from sage_core.errors import ConfigError


def require(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """``low <= value <= high``, or a :class:`ConfigError` that names the parameter. NaN and non-numbers are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        wanted = f"a number from {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        raise ConfigError(f"policy.{name}: expected {wanted}, got {value!r}")
