"""Arrival processes: when requests come, apart from what they ask for.

Rules every process keeps:

1. Its mean rate is the nominal rate it is given; it only chooses how arrivals clump around that mean.
2. It draws *unit-rate* positions and stretches them, so two rates under one seed see the same pattern (common random
   numbers along a rate sweep).
3. It is stationary where it is random: a renewal process starts from its equilibrium law, so the first seconds are no
   different from later ones. Periodic shapes start at their own phase.

Time-varying processes are renewal processes run through a clock whose speed is the momentary rate, so ``cv`` (local
burstiness) and the shape (slow variation) are set independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sage_bench.loads.check import number, whole
from sage_core.errors import ConfigError
from sage_core.units import SECOND

Instants: TypeAlias = NDArray[np.int64]
"""(n,) non-decreasing instants, ns since run start."""

Stream: TypeAlias = Callable[[str], np.random.Generator]
"""A named random stream of the load's own scope."""

CHUNK = 8192
"""Arrivals drawn at a time. Part of what a seed means only through rounding: draws do not depend on it."""


class ArrivalProcess(Protocol):
    """When requests come."""

    def instants(self, rate: float, stream: Stream) -> Iterator[Instants]:
        """Endless chunks of instants (ns) with a mean of ``rate`` requests/s."""


class Poisson:
    """Independent exponential gaps: many clients that know nothing of each other."""

    def instants(self, rate: float, stream: Stream) -> Iterator[Instants]:
        return _in_order(position / rate for position in renewals(1.0, stream("gaps")))


class Gamma:
    """Independent gamma gaps with coefficient of variation ``cv``: above 1 clumped, 1 Poisson, below 1 regular."""

    def __init__(self, cv: float) -> None:
        self.cv = number("load.arrivals.cv", cv, 0.0, above=True)

    def instants(self, rate: float, stream: Stream) -> Iterator[Instants]:
        return _in_order(position / rate for position in renewals(self.cv, stream("gaps")))


class Constant:
    """Equal gaps, the first request at 0. The gap is a whole number of ns, so its variance is exactly zero."""

    def instants(self, rate: float, stream: Stream) -> Iterator[Instants]:
        gap_ns = round(SECOND / rate)
        k = np.arange(CHUNK, dtype=np.int64)
        while True:
            yield k * gap_ns
            k = k + CHUNK


class Bulk:
    """``size`` requests at the same instant: a thundering herd. Herds come with gaps of coefficient ``cv``."""

    def __init__(self, size: int, cv: float = 1.0) -> None:
        self.size = whole("load.arrivals.size", size, 1)
        self.cv = number("load.arrivals.cv", cv, 0.0)

    def instants(self, rate: float, stream: Stream) -> Iterator[Instants]:
        herds = max(CHUNK // self.size, 1)
        for at in _in_order(position * self.size / rate for position in renewals(self.cv, stream("gaps"))):
            for first in range(0, len(at), herds):
                yield np.repeat(at[first : first + herds], self.size)


class Periodic:
    """A rate that repeats every ``step_s * len(levels)`` seconds: one relative level a step, scaled to a mean of 1."""

    def __init__(self, levels: Sequence[float], step_s: float, cv: float = 1.0) -> None:
        step = number("load.arrivals.step_s", step_s, 0.0, above=True)
        heights = [number(f"load.arrivals.levels[{i}]", level, 0.0) for i, level in enumerate(levels)]
        if not any(heights):
            raise ConfigError("load.arrivals.levels: expected at least one level above 0")
        self._set([step] * len(heights), heights, cv)

    def _set(self, spans_s: Sequence[float], levels: Sequence[float], cv: float) -> None:
        self.cv = number("load.arrivals.cv", cv, 0.0)
        spans, heights = np.array(spans_s, np.float64), np.array(levels, np.float64)
        self.period_s = float(spans.sum())
        heights = heights * (self.period_s / float(spans @ heights))
        busy = heights * spans > 0  # nothing arrives elsewhere: leave it out, so that the inverse is defined
        self._start_s = (np.cumsum(spans) - spans)[busy]
        self._level = heights[busy]
        mass = heights * spans
        self._mass_before = (np.cumsum(mass) - mass)[busy]

    def instants(self, rate: float, stream: Stream) -> Iterator[Instants]:
        return _in_order(self._at(position / rate) for position in renewals(self.cv, stream("gaps")))

    def _at(self, mass: NDArray[np.float64]) -> NDArray[np.float64]:
        """Instant (s) at which the integral of the relative rate reaches ``mass`` (s); one period has mass period_s."""
        cycle, rest = np.divmod(mass, self.period_s)
        step = np.searchsorted(self._mass_before, rest, side="right") - 1
        return np.asarray(
            cycle * self.period_s + self._start_s[step] + (rest - self._mass_before[step]) / self._level[step]
        )


class OnOff(Periodic):
    """Bursts of ``on_s`` seconds that begin ``start_s`` into every period of ``on_s + off_s``.

    The mean over a period is the nominal rate, so within a burst the rate is ``(on_s + off_s) / on_s`` times as high
    when ``off_share`` (the fraction of requests that come between bursts) is zero.
    """

    def __init__(
        self, on_s: float, off_s: float, start_s: float = 0.0, off_share: float = 0.0, cv: float = 1.0
    ) -> None:
        on = number("load.arrivals.on_s", on_s, 0.0, above=True)
        off = number("load.arrivals.off_s", off_s, 0.0, above=True)
        start = number("load.arrivals.start_s", start_s, 0.0, off)  # so that a burst never wraps around the period
        idle = number("load.arrivals.off_share", off_share, 0.0, 1.0)
        low, high = idle / off, (1.0 - idle) / on
        self._set([start, on, off - start], [low, high, low], cv)


class Sinusoid(Periodic):
    """A rate of ``1 + amplitude * sin(2 pi (t / period_s + phase))`` in ``STEPS`` steps: day and night, compressed."""

    STEPS = 360

    def __init__(self, period_s: float, amplitude: float, phase: float = 0.0, cv: float = 1.0) -> None:
        period = number("load.arrivals.period_s", period_s, 0.0, above=True)
        swing = number("load.arrivals.amplitude", amplitude, 0.0, 1.0)
        turn = number("load.arrivals.phase", phase, 0.0, 1.0)
        middle = (np.arange(self.STEPS) + 0.5) / self.STEPS
        levels = 1.0 + swing * np.sin(2.0 * math.pi * (middle + turn))
        self._set([period / self.STEPS] * self.STEPS, levels.tolist(), cv)


class Modulated:
    """Gamma gaps of ``cv`` under a rate that wanders: what measured traffic looks like beyond a minute.

    The log of the rate is a stationary first-order autoregression in steps of ``step_s`` with correlation
    ``exp(-step_s / correlation_s)``; the rate has mean 1 and coefficient of variation ``rate_cv``. Over a run not much
    longer than ``correlation_s`` the realised mean differs from the nominal one, as it does in reality.
    """

    def __init__(self, rate_cv: float, correlation_s: float, step_s: float = 10.0, cv: float = 1.0) -> None:
        self.rate_cv = number("load.arrivals.rate_cv", rate_cv, 0.0)
        self.correlation_s = number("load.arrivals.correlation_s", correlation_s, 0.0, above=True)
        self.step_s = number("load.arrivals.step_s", step_s, 0.0, above=True)
        self.cv = number("load.arrivals.cv", cv, 0.0)

    def instants(self, rate: float, stream: Stream) -> Iterator[Instants]:
        return _in_order(self._at(rate, stream))

    def _at(self, rate: float, stream: Stream) -> Iterator[NDArray[np.float64]]:
        levels = self._levels(stream("rate"))
        level = next(levels)
        start_s = np.arange(len(level)) * self.step_s
        mass_before = np.cumsum(level * self.step_s) - level * self.step_s
        end_s, end_mass = len(level) * self.step_s, float(np.sum(level)) * self.step_s
        for position in renewals(self.cv, stream("gaps")):
            mass = position / rate
            gone = max(int(np.searchsorted(mass_before, mass[0], side="right")) - 1, 0)
            parts = [(start_s[gone:], mass_before[gone:], level[gone:])]
            while end_mass <= mass[-1]:
                more = next(levels)
                parts.append(
                    (
                        end_s + np.arange(len(more)) * self.step_s,
                        end_mass + (np.cumsum(more) - more) * self.step_s,
                        more,
                    )
                )
                end_s += len(more) * self.step_s
                end_mass += float(np.sum(more)) * self.step_s
            start_s, mass_before, level = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            step = np.searchsorted(mass_before, mass, side="right") - 1
            yield start_s[step] + (mass - mass_before[step]) / level[step]

    def _levels(self, rng: np.random.Generator, steps: int = 512) -> Iterator[NDArray[np.float64]]:
        sigma = math.sqrt(math.log1p(self.rate_cv**2))
        keep = math.exp(-self.step_s / self.correlation_s)
        fresh = math.sqrt(1.0 - keep**2)
        state = float(rng.standard_normal())
        while True:
            walk = np.empty(steps)
            for i, shock in enumerate(rng.standard_normal(steps).tolist()):
                walk[i] = state
                state = keep * state + fresh * shock
            yield np.exp(sigma * walk - 0.5 * sigma**2)


def renewals(cv: float, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Points of a stationary renewal process of unit rate whose gaps have coefficient of variation ``cv``.

    The first point follows the residual life of a gap, uniform over a length-biased one (Cox, Renewal Theory, 1962,
    section 5.1); a length-biased gamma(k) gap is a gamma(k + 1) one.
    """
    shape = math.inf if cv == 0 else cv**-2
    residual = rng.random()
    if cv > 0:
        residual *= rng.standard_gamma(shape + 1.0) / shape
    last = residual
    while True:
        if cv == 0:
            gaps = np.ones(CHUNK)
        elif cv == 1:
            gaps = rng.standard_exponential(CHUNK)
        else:
            gaps = rng.standard_gamma(shape, CHUNK) / shape
        points = last + np.concatenate(([0.0], np.cumsum(gaps)))
        last = float(points[-1])
        yield points[:-1]


def _in_order(chunks_s: Iterator[NDArray[np.float64]]) -> Iterator[Instants]:
    """Seconds to ns. Rounding never swaps two arrivals."""
    last = 0
    for chunk in chunks_s:
        at = np.rint(chunk * SECOND).astype(np.int64)
        at = np.maximum(np.maximum.accumulate(at), last)
        last = int(at[-1])
        yield at
