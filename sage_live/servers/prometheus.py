"""Prometheus text (exposition format 0.0.4) of an engine: samples with the engine's labels, and histograms.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"

SECONDS: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    30.0,
    60.0,
)
"""Upper edges of latency buckets."""


class Histogram:
    """Counts of values by bucket; a value equal to an upper edge is in its bucket."""

    __slots__ = ("_counts", "_edges", "sum")

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = tuple(edges)
        self._counts = [0] * (len(self._edges) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._edges, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def lines(self, name: str, labels: str) -> list[str]:
        """Samples, cumulative; ``labels`` without braces."""
        total = 0
        lines = []
        for edge, count in zip((*self._edges, "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels},le="{edge}"}} {total}')
        return [*lines, f"{name}_sum{{{labels}}} {self.sum!r}", f"{name}_count{{{labels}}} {total}"]


class Exposition:
    """Collects metrics; every sample has ``labels``."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._lines: list[str] = []

    def sample(self, name: str, kind: str, what: str, value: float, **labels: str) -> None:
        """One metric with one sample. ``kind``: gauge or counter; counters are named ``*_total``."""
        self.samples(name, kind, what, [(value, labels)])

    def samples(self, name: str, kind: str, what: str, values: Sequence[tuple[float, Mapping[str, str]]]) -> None:
        """One metric, a sample for each set of further labels."""
        self._head(name, kind, what)
        self._lines += [f"{name}{{{self._joined(labels)}}} {value!r}" for value, labels in values]

    def histogram(self, name: str, what: str, histogram: Histogram) -> None:
        self._head(name, "histogram", what)
        self._lines += histogram.lines(name, self._joined({}))

    def text(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()

    def _head(self, name: str, kind: str, what: str) -> None:
        self._lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]

    def _joined(self, labels: Mapping[str, str]) -> str:
        return ",".join(f'{key}="{_escaped(value)}"' for key, value in {**self._labels, **labels}.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
