"""A load whose requests go through declared pipelines: the sizes of their results, which only backends may know.

Sizes are drawn from what the pipeline declares, one random stream a stage. What a request gets depends on its number
alone, so runs that compare policies compare them on the same sizes, in closed loops too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sage_core.declared import Branch, Chat, Declared, Generate, Size, StageDeclaration
from sage_core.load import AS_INPUT, Arrival, Load
from sage_core.rng import Streams
from sage_core.units import Nanos

BLOCK: Final = 1024
"""Requests drawn for at a time."""


class StagedLoad:
    """``load``, with the result sizes of the stages of ``pipelines`` (by name)."""

    def __init__(self, load: Load, pipelines: Mapping[str, Declared], streams: Streams) -> None:
        self._load = load
        self._sizes = {
            name: [_Drawn(f"pipeline/{name}/{stage.name}", placed[-1].declaration, streams) for stage, placed in zip(each.pipeline.stages, each.stages, strict=True)]
            for name, each in pipelines.items()
        }  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        """What else a load has to say of itself (its duration, files, notes) is what the load within says."""
        if name in ("columns", "_load"):  # a load in columns has no room for sizes of stages
            raise AttributeError(name)
        return getattr(self._load, name)

    def arrivals(self) -> Iterator[Arrival]:
        """Those of the load."""
        return map(self._staged, self._load.arrivals())

    def ended(self, now: Nanos, request: int) -> Arrival | None:
        """The next request of the same user, in a closed loop."""
        following = self._load.ended(now, request)
        return None if following is None else self._staged(following)

    def _staged(self, arrival: Arrival) -> Arrival:
        sizes = self._sizes.get(arrival.request.pipeline)
        if sizes is None or arrival.results:  # a recorded load knows them
            return arrival
        number = arrival.request.request
        return arrival._replace(results=tuple(each.of(number, arrival.output_tokens) for each in sizes))


class _Drawn:
    """Sizes of the results of one stage, by request."""

    def __init__(self, stream: str, declaration: StageDeclaration, streams: Streams) -> None:
        self._stream = stream
        self._streams = streams
        self._draw = _draw_of(declaration)
        self._as_load = isinstance(declaration, Chat | Generate) and declaration.output_tokens is None
        self._blocks: dict[int, NDArray[np.int64]] = {}

    def of(self, request: int, output_tokens: int) -> int:
        if self._as_load:
            return output_tokens
        if self._draw is None:
            return AS_INPUT
        block, at = divmod(request, BLOCK)
        if block not in self._blocks:
            if len(self._blocks) > 8:  # requests come about in order
                self._blocks.pop(min(self._blocks))
            self._blocks[block] = self._draw(self._streams.stream(f"{self._stream}/{block}").random(BLOCK))
        return int(self._blocks[block][at])


Draw = Callable[[NDArray[np.float64]], NDArray[np.int64]]
"""(n,) sizes from (n,) uniform numbers in [0, 1)."""


def _draw_of(declaration: StageDeclaration) -> Draw | None:
    if isinstance(declaration, Branch):
        ends = np.cumsum(declaration.chances)
        ends /= ends[-1]  # exactly 1 from the last outcome that has a chance
        return lambda u: np.searchsorted(ends, u, side="right").astype(np.int64)
    if isinstance(declaration, Chat | Generate):
        size: Size | None = declaration.output_tokens
        least = 1
    else:
        size, least = getattr(declaration, "size", None), 0
    if size is None:
        return None
    if size.uniform is not None:
        low, high = max(size.uniform.low, least), size.uniform.high
        return lambda u: (low + np.floor(u * (high - low + 1))).astype(np.int64)
    if (log := size.lognormal) is not None:
        from scipy.special import ndtri

        def lognormal(u: NDArray[np.float64]) -> NDArray[np.int64]:
            drawn = log.median * np.exp(log.sigma * ndtri(np.clip(u, 1e-12, 1 - 1e-12)))
            return np.clip(np.rint(drawn), max(log.low, least), log.high).astype(np.int64)

        return lognormal
    fixed = max(size.fixed or 0, least)
    return lambda u: np.full(len(u), fixed, np.int64)
