"""What a window says of its items. A value that is NaN is left out, as pandas does; ``Count`` counts items.

Each is a recipe that may be shared; ``start`` makes what adds up one window. All but ``Quantile`` keep one or two numbers a
window, ``Quantile`` 8 bytes for each value, because it is exact.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from sage_core.errors import ConfigError

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Accumulator(Protocol[T_contra]):
    """Of one window."""

    def add(self, item: T_contra) -> None: ...

    def result(self) -> float: ...


class Aggregate(Protocol[T_contra]):
    """A recipe."""

    def start(self) -> Accumulator[T_contra]: ...


@dataclass(frozen=True, slots=True)
class Count:
    """Number of items."""

    def start(self) -> Accumulator[object]:
        return _Count()


@dataclass(frozen=True, slots=True)
class Sum(Generic[T]):
    """Of ``of(item)``; 0 of nothing."""

    of: Callable[[T], float]

    def start(self) -> Accumulator[T]:
        return _Sum(self.of)


@dataclass(frozen=True, slots=True)
class Mean(Generic[T]):
    """Of ``of(item)``; NaN of nothing."""

    of: Callable[[T], float]

    def start(self) -> Accumulator[T]:
        return _Mean(self.of)


@dataclass(frozen=True, slots=True)
class Min(Generic[T]):
    """Of ``of(item)``; NaN of nothing."""

    of: Callable[[T], float]

    def start(self) -> Accumulator[T]:
        return _Extreme(self.of, min)


@dataclass(frozen=True, slots=True)
class Max(Generic[T]):
    """Of ``of(item)``; NaN of nothing."""

    of: Callable[[T], float]

    def start(self) -> Accumulator[T]:
        return _Extreme(self.of, max)


@dataclass(frozen=True, slots=True)
class Quantile(Generic[T]):
    """Of ``of(item)``, 0 <= q <= 1, linear between neighbours; NaN of nothing. ConfigError for another q."""

    q: float
    of: Callable[[T], float]

    def __post_init__(self) -> None:
        if not 0 <= self.q <= 1:
            raise ConfigError(f"Quantile: q: expected 0 to 1, got {self.q}")

    def start(self) -> Accumulator[T]:
        return _Quantile(self.of, self.q)


class _Count:
    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = 0

    def add(self, item: object) -> None:
        self._count += 1

    def result(self) -> float:
        return self._count


class _Sum(Generic[T]):
    __slots__ = ("_of", "_sum")

    def __init__(self, of: Callable[[T], float]) -> None:
        self._of = of
        self._sum = 0.0

    def add(self, item: T) -> None:
        value = self._of(item)
        if value == value:
            self._sum += value

    def result(self) -> float:
        return self._sum


class _Mean(Generic[T]):
    __slots__ = ("_count", "_of", "_sum")

    def __init__(self, of: Callable[[T], float]) -> None:
        self._of = of
        self._sum = 0.0
        self._count = 0

    def add(self, item: T) -> None:
        value = self._of(item)
        if value == value:
            self._sum += value
            self._count += 1

    def result(self) -> float:
        return self._sum / self._count if self._count else math.nan


class _Extreme(Generic[T]):
    __slots__ = ("_choose", "_of", "_value")

    def __init__(self, of: Callable[[T], float], choose: Callable[[float, float], float]) -> None:
        self._of = of
        self._choose = choose
        self._value = math.nan

    def add(self, item: T) -> None:
        value = self._of(item)
        if value == value:
            self._value = self._choose(self._value, value) if self._value == self._value else value

    def result(self) -> float:
        return self._value


class _Quantile(Generic[T]):
    __slots__ = ("_of", "_q", "_values")

    def __init__(self, of: Callable[[T], float], q: float) -> None:
        self._of = of
        self._q = q
        self._values = array("d")

    def add(self, item: T) -> None:
        value = self._of(item)
        if value == value:
            self._values.append(value)

    def result(self) -> float:
        return float(np.quantile(self._values, self._q)) if self._values else math.nan
