"""Token-length distributions, each drawn by inverse transform: one uniform number in, one length out.

One uniform a length means that the k-th request of a class has the k-th draw of its stream whatever the distribution:
changing one distribution moves no other number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from sage_bench.loads.check import number, whole
from sage_bench.traces.reader import Trace
from sage_core.errors import ConfigError, DataError

Uniforms: TypeAlias = NDArray[np.float64]
Tokens: TypeAlias = NDArray[np.int64]

TOKENS_MAX = 2**24


class Lengths(Protocol):
    """How many tokens."""

    def tokens(self, u: Uniforms) -> Tokens:
        """(n,) lengths in tokens, at least 1, one for each of ``u`` (n,) in [0, 1)."""


class Fixed:
    """Always ``value`` tokens."""

    def __init__(self, value: int) -> None:
        self.value = whole("lengths.value", value, 1, TOKENS_MAX)

    def tokens(self, u: Uniforms) -> Tokens:
        return np.full(len(u), self.value, np.int64)


class Uniform:
    """Whole numbers from ``low`` to ``high``, both included, equally likely."""

    def __init__(self, low: int, high: int) -> None:
        self.low = whole("lengths.low", low, 1, TOKENS_MAX)
        self.high = whole("lengths.high", high, self.low, TOKENS_MAX)

    def tokens(self, u: Uniforms) -> Tokens:
        return np.asarray(self.low + np.floor(u * (self.high - self.low + 1)), np.int64)


class Component(TypedDict):
    """One lognormal of a mixture: its share, its median (tokens) and the standard deviation of the log."""

    weight: float
    median: float
    sigma: float


class LognormalMixture:
    """A weighted mixture of lognormals, each conditioned on [``low``, ``high``] and rounded to whole tokens."""

    def __init__(self, components: Sequence[Component], low: int = 1, high: int = 131_072) -> None:
        self.low = whole("lengths.low", low, 1, TOKENS_MAX)
        self.high = whole("lengths.high", high, self.low, TOKENS_MAX)
        if not components:
            raise ConfigError("lengths.components: expected at least one of {weight, median, sigma}, got none")
        key = "lengths.components"
        weight = [number(f"{key}[{i}].weight", c["weight"], 0.0, above=True) for i, c in enumerate(components)]
        median = [number(f"{key}[{i}].median", c["median"], 0.0, above=True) for i, c in enumerate(components)]
        sigma = [number(f"{key}[{i}].sigma", c["sigma"], 0.0, above=True) for i, c in enumerate(components)]
        self._weight = np.array(weight) / sum(weight)
        self._mu, self._sigma = np.log(median), np.array(sigma)
        self._before = np.cumsum(self._weight) - self._weight
        self._cdf_low = ndtr((np.log(self.low - 0.5) - self._mu) / self._sigma)
        self._cdf_high = ndtr((np.log(self.high + 0.5) - self._mu) / self._sigma)
        if np.any(self._cdf_high - self._cdf_low < 1e-9):
            raise ConfigError(f"{key}: a component has no mass within low={self.low} .. high={self.high} tokens")

    def tokens(self, u: Uniforms) -> Tokens:
        part = np.searchsorted(self._before, u, side="right") - 1
        within = (u - self._before[part]) / self._weight[part]
        low, high = self._cdf_low[part], self._cdf_high[part]
        z = ndtri(low + within * (high - low))
        lengths = np.rint(np.exp(self._mu[part] + self._sigma[part] * z))
        return np.asarray(np.clip(lengths, self.low, self.high), np.int64)


class Lognormal(LognormalMixture):
    """One lognormal: half of the lengths lie below ``median``, and their log has standard deviation ``sigma``."""

    def __init__(self, median: float, sigma: float, low: int = 1, high: int = 131_072) -> None:
        super().__init__([Component(weight=1.0, median=median, sigma=sigma)], low, high)


class Empirical:
    """Lengths as they occur in a column of a trace file (``prompt_tokens`` or ``output_tokens``), drawn with
    replacement; ``kind`` keeps only rows of that kind."""

    def __init__(self, path: str | Path, column: str = "prompt_tokens", kind: str | None = None) -> None:
        if column not in ("prompt_tokens", "output_tokens"):
            raise ConfigError(f"lengths.column: expected prompt_tokens or output_tokens, got {column!r}")
        trace = Trace(path)
        lengths = [
            getattr(rows, column)[slice(None) if kind is None else rows.kind == trace.kind_code(kind)]
            for rows in trace.rows()
        ]
        self._sorted = np.sort(np.concatenate(lengths))
        if len(self._sorted) == 0 or self._sorted[0] < 1:
            raise DataError(
                f"{trace.path}: column {column} has no lengths of at least 1 token for kind {kind or 'any'}"
            )
        self.path = trace.path

    def tokens(self, u: Uniforms) -> Tokens:
        return np.asarray(self._sorted[(u * len(self._sorted)).astype(np.int64)])
