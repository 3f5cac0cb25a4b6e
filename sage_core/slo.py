"""Service-level objectives per request kind and priority."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sage_core.errors import ConfigError
from sage_core.units import NEVER, SECONDS_MAX, Nanos, seconds


@dataclass(frozen=True, slots=True)
class Slo:
    """Thresholds one request must meet; ``None`` means no such objective.

    ttft_s: scheduled arrival to first token. tpot_s: mean seconds per output token after the first.
    e2e_s: scheduled arrival to the complete response.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= SECONDS_MAX):
                raise ConfigError(
                    f"slo.{name}: expected seconds above 0 or null, got {value!r} (at most {SECONDS_MAX:g})"
                )

    def ttft_due_at(self, scheduled_at: int) -> Nanos:
        """Instant by which the first token is due, or NEVER."""
        return NEVER if self.ttft_s is None else Nanos(scheduled_at + seconds(self.ttft_s))

    def due_at(self, scheduled_at: int, output_tokens_max: int) -> Nanos:
        """Instant by which the response is due: the end-to-end threshold, else TTFT and TPOT together, else NEVER.

        With no end-to-end threshold the due time follows from the client's own cap on output tokens, which is all that
        anybody knows when the request arrives.
        """
        if self.e2e_s is not None:
            return Nanos(scheduled_at + seconds(self.e2e_s))
        if self.ttft_s is not None and self.tpot_s is not None:
            return Nanos(scheduled_at + seconds(self.ttft_s + self.tpot_s * max(output_tokens_max - 1, 0)))
        return NEVER


@dataclass(frozen=True, slots=True)
class SloTable:
    """The objective of each class of request. Keys: ``<kind>`` or ``<kind>/<priority>``, kinds ``chat``, ``generate``,
    ``embedding``; the more specific key wins, and a class without an entry has no objective."""

    classes: Mapping[str, Slo] = field(default_factory=dict)

    KINDS = ("chat", "generate", "embedding")

    def __post_init__(self) -> None:
        for key, slo in self.classes.items():
            kind, slash, priority = key.partition("/")
            number = priority.isascii() and priority.isdigit() and str(int(priority)) == priority
            if kind not in self.KINDS or (slash and not number):
                raise ConfigError(
                    f"slo.classes: unknown class {key!r}; expected <kind> or <kind>/<priority>, "
                    f"kind one of {', '.join(self.KINDS)}"
                )
            if not isinstance(slo, Slo):
                raise ConfigError(f"slo.classes.{key}: expected a sage_core.slo.Slo, got {slo!r}")

    def of(self, kind: int, priority: int) -> Slo:
        """The objective of requests of this kind (units.RequestKind) and priority."""
        name = self.KINDS[kind]
        return self.classes.get(f"{name}/{priority}") or self.classes.get(name) or _NONE


_NONE = Slo()
