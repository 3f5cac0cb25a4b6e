"""Which queued task goes first: the classical orders, and their weighted sum.

Rules kept here. A lexicographic key is packed into one double by powers of two, so the classes never mix and instants
keep nanosecond resolution: an instant below 2**50 ns (13 days of run time) plus a class number below 8 is exact, and
beyond that only resolution within a class fades (equal scores fall back to the task id, which is arrival order).
Nothing but ``+ * min`` and comparisons, in the order written: the native twins give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sage_core.errors import ConfigError
from sage_core.policy import Order, Scores, TaskView
from sage_core.units import NEVER, Nanos
from sage_policies.bounds import require

CLASS_SPAN_NS: Final = 2.0**50
"""Distance between priority classes."""

INSTANT_NS_MAX: Final = 2.0**50 - 2.0**30
"""Instants are clipped to this within a class; the gap of a second keeps rounding from reaching the next class."""

NO_DUE_NS: Final = 2.0**52
"""Where tasks without a deadline begin; due times are clipped below it."""


@dataclass(frozen=True, slots=True)
class Fifo:
    """The request that arrived first goes first."""

    static = True

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """Arrival, ns."""
        return queued.arrived_at.astype(np.float64)

    def native(self) -> Any:
        from sage_core import _native

        return _native.Fifo()


@dataclass(frozen=True, slots=True)
class PriorityOrder:
    """Strict priority (0 first), then arrival: no lower class goes while a higher one is queued."""

    static = True

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """``priority * CLASS_SPAN_NS + min(arrived_at, INSTANT_NS_MAX)``."""
        arrived = np.minimum(queued.arrived_at.astype(np.float64), INSTANT_NS_MAX)
        return queued.priority.astype(np.float64) * CLASS_SPAN_NS + arrived

    def native(self) -> Any:
        from sage_core import _native

        return _native.PriorityOrder()


@dataclass(frozen=True, slots=True)
class EarliestDeadline:
    """Earliest of the first-token and response due times first; tasks without either follow, by arrival."""

    static = True

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """The due time, ns, or ``NO_DUE_NS + arrived_at``, each clipped below ``NO_DUE_NS``."""
        due = np.minimum(queued.ttft_due_at, queued.due_at)
        instant = np.where(due < NEVER, due, queued.arrived_at).astype(np.float64)
        return np.minimum(instant, NO_DUE_NS - 1.0) + np.where(due < NEVER, 0.0, NO_DUE_NS)

    def native(self) -> Any:
        from sage_core import _native

        return _native.EarliestDeadline()


@dataclass(frozen=True, slots=True)
class ShortestFirst:
    """Least predicted work first, on the pool's fastest replica. Starves long tasks: an ingredient, not a policy."""

    static = True

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """Predicted service time, ns."""
        speed = queued.speed
        return speed.input_token_ns * queued.input_tokens + speed.output_token_ns * queued.output_tokens


class WeightedSum:
    """A weighted sum of orders, as composed from YAML (with ``_convert_: all``); static when every part is.

    The scores of the parts are in ns, so a weight says how many ns of one part balance a ns of another. A packed order
    (:class:`PriorityOrder`, ``HybridOrder``) dominates any sum it is part of.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        if not orders or len(orders) != len(weights):
            raise ConfigError(
                f"policy.order: expected one weight for each of at least one order, got {len(orders)} orders and "
                f"{len(weights)} weights"
            )
        for weight, order in zip(weights, orders, strict=True):
            require("order.weights", weight, 0.0)
            if not callable(getattr(order, "score", None)):  # OmegaConf makes a config of a dataclass in a list
                raise ConfigError(f"policy.order.orders: expected orders, got {order!r}; in YAML add `_convert_: all`")
        # A zero weight drops its part: 0 * inf would be NaN.
        self.parts = [(float(weight), order) for weight, order in zip(weights, orders, strict=True) if weight > 0]
        self.static = all(order.static for _, order in self.parts)

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """``((0 + w0*s0) + w1*s1) + ...``, in the order given."""
        total = np.zeros(len(queued))
        for weight, order in self.parts:
            total = total + weight * order.score(now, queued)
        return total
