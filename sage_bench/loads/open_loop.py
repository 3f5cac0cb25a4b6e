"""Open loop: arrivals that do not wait for anybody.

Arrivals, mix and content come from separate named streams: a class added at the end of the mix, another length
distribution or another rate leaves every other draw where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from sage_bench.loads.arrivals import ArrivalProcess, Instants, Poisson
from sage_bench.loads.check import number, shares
from sage_bench.loads.lengths import Uniforms
from sage_bench.loads.mix import (
    Batch,
    Limits,
    Mix,
    before,
    empty_batch,
    generates,
    in_columns,
    issued,
    limited,
    merged,
    pick,
)
from sage_bench.loads.request_class import RequestClass
from sage_core.errors import ConfigError
from sage_core.load import Arrival, Arrivals
from sage_core.rng import Streams
from sage_core.slo import SloTable


class OpenLoop:
    """Requests of a mix of classes at a mean of ``rate`` requests/s, until ``requests`` or ``duration_s`` is reached.

    Classes without an arrival process of their own share ``arrivals``: each of its arrivals belongs to a class drawn by
    share. ``arrivals()`` starts afresh each time it is called.
    """

    def __init__(
        self,
        rate: float,
        classes: Mapping[str, RequestClass],
        arrivals: ArrivalProcess | None = None,
        requests: int | None = None,
        duration_s: float | None = None,
        *,
        streams: Streams,
        slo: SloTable,
    ) -> None:
        self.rate = number("load.rate", rate, 0.0, above=True)
        self.limits = Limits.of(requests, duration_s, needed=True)
        self.process = Poisson() if arrivals is None else arrivals
        self.shares = shares("load.classes.<name>.share", {name: c.share for name, c in classes.items()})
        for name, c in classes.items():
            check_drawable(name, c)
        self.mix = Mix(classes, slo)
        self._streams = streams

    def arrivals(self) -> Iterator[Arrival]:
        """Arrivals in time order."""
        return issued(self.mix, self.batches())

    def columns(self) -> Iterator[Arrivals]:
        """The same in columns."""
        return in_columns(self.mix, self.batches())

    def ended(self, now: int, request: int) -> Arrival | None:
        """None: nobody waits."""
        return None

    def files(self) -> list[str]:
        """Files the load reads: what a manifest has to give checksums of."""
        return files_of(self.mix.classes, self.process)

    def batches(self) -> Iterator[Batch]:
        """The load as columns."""
        drawer = ClassStreams(self.mix, self._streams)
        share = list(self.shares.values())
        common = [c for c, of in enumerate(self.mix.classes) if of.arrivals is None and share[c] > 0]
        flows = []
        if common:
            # Exactly 1 when no class has a process of its own, however the shares round.
            total = 1.0 - math.fsum(share[c] for c, of in enumerate(self.mix.classes) if of.arrivals is not None)
            start = before([share[c] / total for c in common])
            flows.append(self._common(self.rate * total, np.array(common, np.int64), start, drawer))
        for c, of in enumerate(self.mix.classes):
            if of.arrivals is not None and share[c] > 0:
                flows.append(own_flow(of.arrivals, self.rate * share[c], c, drawer))
        return limited(flows[0] if len(flows) == 1 else merged(flows), self.limits)

    def _common(
        self, rate: float, common: NDArray[np.int64], start: NDArray[np.float64], drawer: ClassStreams
    ) -> Iterator[Batch]:
        which = self._streams.stream("load/mix")
        for at in self.process.instants(rate, lambda name: self._streams.stream(f"load/arrivals/{name}")):
            yield drawer.filled(at, common[pick(start, which.random(len(at)))])


class ClassStreams:
    """Content of requests drawn from the named streams of each class: ``load/<class>/<quantity>``."""

    def __init__(self, mix: Mix, streams: Streams) -> None:
        self._mix = mix
        self._streams = streams
        self._open: dict[tuple[int, str], np.random.Generator] = {}

    def filled(self, at: Instants, cls: NDArray[np.int64]) -> Batch:
        """Requests of classes ``cls`` (n,) at instants ``at`` (n,)."""
        batch = empty_batch(at, cls)
        for c in np.unique(cls).tolist():
            rows = np.flatnonzero(cls == c)
            for column, values in zip(batch[2:], self._mix.draw(c, self.uniforms(c, len(rows))), strict=True):
                column[rows] = values
        return batch

    def uniforms(self, c: int, n: int) -> Callable[[str], Uniforms]:
        """The next ``n`` uniform numbers of class ``c`` for a quantity, by name."""
        return lambda quantity: self.stream(c, quantity).random(n)

    def stream(self, c: int, quantity: str) -> np.random.Generator:
        """The stream of a quantity of class ``c``, where its last reader left it."""
        if (c, quantity) not in self._open:
            self._open[c, quantity] = self.fresh(c, quantity)
        return self._open[c, quantity]

    def fresh(self, c: int, quantity: str) -> np.random.Generator:
        """The stream of a quantity of class ``c``, from its beginning."""
        return self._streams.stream(f"load/{self._mix.names[c]}/{quantity}")


def own_flow(process: ArrivalProcess, rate: float, c: int, drawer: ClassStreams) -> Iterator[Batch]:
    """Requests of class ``c`` alone, from a process of its own at ``rate`` requests/s."""
    for at in process.instants(rate, lambda name: drawer.fresh(c, f"arrivals/{name}")):
        yield drawer.filled(at, np.full(len(at), c, np.int64))


def check_drawable(name: str, c: RequestClass) -> None:
    """A class whose requests are drawn, not read from a trace, needs its length distributions."""
    if c.input_tokens is None:
        raise ConfigError(f"load.classes.{name}.input_tokens: expected a length distribution, got none")
    if generates(c) and (c.output_tokens is None or c.output_tokens_max is None):
        raise ConfigError(
            f"load.classes.{name}: a generating class needs output_tokens (a length distribution) and output_tokens_max "
            "(the client's cap)"
        )


def files_of(*parts: object) -> list[str]:
    """Paths of the files behind arrival processes, lengths and classes, each once, in order."""
    found: dict[str, None] = {}
    for part in parts:
        if isinstance(part, list):
            found.update(dict.fromkeys(files_of(*part)))
        elif isinstance(part, RequestClass):
            found.update(dict.fromkeys(files_of(part.input_tokens, part.output_tokens, part.arrivals)))
        elif (path := getattr(part, "path", None)) is not None:
            found[str(path)] = None
    return list(found)
