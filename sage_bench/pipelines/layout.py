"""Where the nodes of a layered graph are drawn: longest-path layers, few crossings, neighbours above one another.

The method is Sugiyama's: an edge over several layers bends at a point in each of them, layers are ordered by the mean place
of their neighbours, and nodes then move towards them as far as their order and width allow. Deterministic.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

SWEEPS = 12
GAP = 0.25
"""Between neighbours of a layer, in the unit of the widths."""


class Bend(NamedTuple):
    """Where the edge ``of`` passes the layer ``layer``."""

    of: tuple[Hashable, Hashable]
    layer: int


class Layout(NamedTuple):
    """x of every node, its layer (0 at the top), and the x of each edge at every layer from its first to its last node."""

    x: Mapping[Hashable, float]
    layer: Mapping[Hashable, int]
    edges: Mapping[tuple[Hashable, Hashable], list[float]]


def laid_out(
    widths: Mapping[Hashable, float], edges: Sequence[tuple[Hashable, Hashable]], bend_width: float = 0.1
) -> Layout:
    """Places of the nodes in ``widths``, which stand in topological order. edges: (from, to)."""
    layer: dict[Hashable, int] = {}
    for node in widths:
        layer[node] = max((layer[a] + 1 for a, b in edges if b == node), default=0)
    chains = {(a, b): [a, *(Bend((a, b), at) for at in range(layer[a] + 1, layer[b])), b] for a, b in edges}
    rows: list[list[Hashable]] = [[] for _ in range(max(layer.values()) + 1)]
    for node in widths:
        rows[layer[node]].append(node)
    for chain in chains.values():
        for bend in chain[1:-1]:
            assert isinstance(bend, Bend)
            rows[bend.layer].append(bend)
    above: dict[Hashable, list[Hashable]] = {node: [] for row in rows for node in row}
    below: dict[Hashable, list[Hashable]] = {node: [] for row in rows for node in row}
    for chain in chains.values():
        for a, b in pairwise(chain):
            below[a].append(b)
            above[b].append(a)
    _order(rows, above, below)
    x = _places(rows, above, below, {node: widths.get(node, bend_width) for row in rows for node in row})
    return Layout(x, layer, {edge: [x[node] for node in chain] for edge, chain in chains.items()})


Neighbours = Mapping[Hashable, Sequence[Hashable]]


def _order(rows: list[list[Hashable]], above: Neighbours, below: Neighbours) -> None:
    """Order each row by the mean place of its neighbours, up and down; the order with the fewest crossings stays."""
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(SWEEPS):
        near = above if sweep % 2 == 0 else below
        for row in rows if sweep % 2 == 0 else reversed(rows):
            place = {node: i for each in rows for i, node in enumerate(each)}
            means = {node: sum(map(place.__getitem__, near[node])) / len(near[node]) for node in row if near[node]}
            row.sort(key=lambda node: means.get(node, place[node]))
        if (crossings := _crossings(rows, below)) < fewest:
            best, fewest = [list(row) for row in rows], crossings
    rows[:] = best


def _crossings(rows: Sequence[Sequence[Hashable]], below: Neighbours) -> int:
    count = 0
    for upper, lower in pairwise(rows):
        place = {node: i for i, node in enumerate(lower)}
        ends = [(i, place[to]) for i, node in enumerate(upper) for to in below[node]]
        count += sum((a - c) * (b - d) < 0 for k, (a, b) in enumerate(ends) for c, d in ends[:k])
    return count


def _places(
    rows: Sequence[Sequence[Hashable]], above: Neighbours, below: Neighbours, widths: Mapping[Hashable, float]
) -> dict[Hashable, float]:
    """x of the middle of every node: near its neighbours, in order, none over another."""
    x: dict[Hashable, float] = {}
    for row in rows:
        _spread(row, dict.fromkeys(row, 0.0), widths, x)
    for sweep in range(2 * SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {}
            for node in row:
                near = [*above[node], *below[node]]
                wanted[node] = sum(map(x.__getitem__, near)) / len(near) if near else x[node]
            _spread(row, wanted, widths, x)
    return x


def _spread(
    row: Sequence[Hashable],
    wanted: Mapping[Hashable, float],
    widths: Mapping[Hashable, float],
    x: dict[Hashable, float],
) -> None:
    """Put ``row`` where it is wanted, as far as order and widths allow: the mean of as far left and as far right."""

    def packed(nodes: Sequence[Hashable], sign: int) -> dict[Hashable, float]:
        at: dict[Hashable, float] = {}
        edge: float | None = None
        for node in nodes:
            half = widths[node] / 2
            place = sign * wanted[node]
            at[node] = place if edge is None else max(place, edge + half)
            edge = at[node] + half + GAP
        return {node: sign * place for node, place in at.items()}

    left, right = packed(row, 1), packed(row[::-1], -1)
    for node in row:
        x[node] = (left[node] + right[node]) / 2
