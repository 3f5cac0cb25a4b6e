"""From columns to arrivals: requests are drawn, merged and numbered in arrays, and become objects only when yielded.

Rules: a batch is sorted by instant; ids are dense from zero in the order of yielding; nothing is held but the batches
being merged, so a load of any length needs the memory of a few thousand requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sage_bench.loads.check import number, whole
from sage_bench.loads.lengths import Uniforms
from sage_bench.loads.request_class import BLOCK_TOKENS, RequestClass
from sage_core.errors import ConfigError
from sage_core.events import RequestArrived
from sage_core.load import Arrival, Arrivals, Contents
from sage_core.slo import SloTable
from sage_core.units import NEVER, SECONDS_MAX, RequestKind, seconds

_BLOCKS_MAX = 1 << 31  # of one prefix


class Batch(NamedTuple):
    """Requests as columns; row i of each is the same request. ``at`` (ns) is non-decreasing."""

    at: NDArray[np.int64]
    cls: NDArray[np.int64]  # index of the class in the mix
    tenant: NDArray[np.int64]  # index of the name in the mix
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]  # the truth: stays on the backends' side of the oracle boundary
    prefix: NDArray[np.int64]
    contents: NDArray[np.object_]  # Contents or None: as output_tokens, for backends only

    def head(self, n: int) -> Batch:
        """The first ``n`` rows."""
        return Batch._make(column[:n] for column in self)

    def tail(self, n: int) -> Batch:
        """All rows but the first ``n``."""
        return Batch._make(column[n:] for column in self)


class Drawn(NamedTuple):
    """What the requests of one class look like."""

    tenant: NDArray[np.int64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix: NDArray[np.int64]
    contents: NDArray[np.object_]


def empty_batch(at: NDArray[np.int64], cls: NDArray[np.int64]) -> Batch:
    """Requests of classes ``cls`` (n,) at ``at`` (n,), with everything else 0 or None."""
    n = len(at)
    zeros = [np.zeros(n, np.int64) for _ in range(4)]
    return Batch._make([at, cls, *zeros, np.full(n, None, np.object_)])


class Mix:
    """Classes by name, in order, and how their columns become requests with deadlines.

    caps: the cap on output tokens of classes that do not set one (a trace load finds it in the trace).
    """

    def __init__(
        self, classes: Mapping[str, RequestClass], slo: SloTable, caps: Mapping[str, int] | None = None
    ) -> None:
        self.names = list(classes)
        self.classes = list(classes.values())
        self._cap = np.array(
            [c.output_tokens_max or (caps or {}).get(name, 0) for name, c in classes.items()], np.int64
        )
        self._pipelines = [c.pipeline for c in self.classes]  # by class
        self._kind = np.array([int(c.kind) for c in self.classes], np.int64)
        self._priority = np.array([c.priority for c in self.classes], np.int64)
        objectives = [slo.of(c.kind, c.priority) for c in self.classes]
        caps_of = self._cap.tolist()
        # Deadlines are fixed spans after the scheduled instant, because the cap is fixed per class.
        self._ttft_span = np.array([o.ttft_due_at(0) for o in objectives], np.int64)
        self._due_span = np.array([o.due_at(0, cap) for o, cap in zip(objectives, caps_of, strict=True)], np.int64)
        self._tenant_names = list(dict.fromkeys(name for c in self.classes for name in c.tenants))
        self._tenants = [
            (
                np.array([self._tenant_names.index(name) for name in c.tenants], np.int64),
                before(list(c.tenants.values())),
            )
            for c in self.classes
        ]
        weights = [1.0 / np.arange(1, c.prefixes + 1) for c in self.classes]
        self._prefix_before = [before(weight / weight.sum()) if len(weight) else None for weight in weights]
        self._shared: dict[tuple[int, int], Contents | None] = {}  # by prefix and number of blocks
        self._prefix_first = 1 + np.cumsum([0] + [c.prefixes for c in self.classes])

    def tenants(self, c: int, u: Uniforms) -> NDArray[np.int64]:
        """(n,) tenants (indices of names) of class ``c`` from (n,) uniform numbers."""
        names, start = self._tenants[c]
        return np.asarray(names[pick(start, u)])

    def prefixes(self, c: int, u: Uniforms) -> NDArray[np.int64]:
        """(n,) prefix ids of class ``c`` from (n,) uniform numbers; zeros where the class shares none."""
        start = self._prefix_before[c]
        return np.zeros(len(u), np.int64) if start is None else np.asarray(self._prefix_first[c] + pick(start, u))

    def draw(self, c: int, uniforms: Callable[[str], Uniforms]) -> Drawn:
        """Requests of class ``c``; ``uniforms(quantity)`` gives (n,) uniform numbers for tenant, input_tokens,
        output_tokens and prefix. Each is asked for at most once, and not at all where it decides nothing."""
        of = self.classes[c]
        assert of.input_tokens is not None
        length_in = of.input_tokens.tokens(uniforms("input_tokens"))
        n = len(length_in)
        if of.output_tokens is None:
            length_out = np.zeros(n, np.int64)
        else:
            length_out = np.minimum(of.output_tokens.tokens(uniforms("output_tokens")), self._cap[c])
        tenant = self.tenants(c, uniforms("tenant") if len(of.tenants) > 1 else np.zeros(n))
        prefix = self.prefixes(c, uniforms("prefix") if of.prefixes else np.zeros(n))
        return Drawn(tenant, length_in, length_out, prefix, self._contents(of.prefix_tokens, prefix, length_in))

    def _contents(
        self, prefix_tokens: int, prefix: NDArray[np.int64], length_in: NDArray[np.int64]
    ) -> NDArray[np.object_]:
        contents = np.full(len(prefix), None, np.object_)
        if prefix_tokens:
            blocks = np.minimum(length_in, prefix_tokens) // BLOCK_TOKENS
            for row, key in enumerate(zip(prefix.tolist(), blocks.tolist(), strict=True)):
                if key not in self._shared:
                    first, n = key[0] * _BLOCKS_MAX, key[1]
                    self._shared[key] = Contents(BLOCK_TOKENS, tuple(range(first, first + n))) if n else None
                contents[row] = self._shared[key]
        return contents

    def issue(self, batch: Batch, first_id: int) -> Iterator[Arrival]:
        """The rows of ``batch`` as arrivals numbered from ``first_id``."""
        c = self.columns(batch, first_id)
        at = c.at.tolist()
        requests = map(
            RequestArrived,
            range(first_id, first_id + len(at)),
            map(c.pipelines.__getitem__, c.pipeline.tolist()),
            c.kind.tolist(),
            map(c.tenants.__getitem__, c.tenant.tolist()),
            c.priority.tolist(),
            c.input_tokens.tolist(),
            c.output_tokens_max.tolist(),
            at,
            c.ttft_due_at.tolist(),
            c.due_at.tolist(),
            c.prefix.tolist(),
        )
        return map(Arrival, at, requests, c.output_tokens.tolist(), batch.contents.tolist())

    def columns(self, batch: Batch, first_id: int) -> Arrivals:
        """The rows of ``batch`` as columns, numbered from ``first_id``."""
        return Arrivals(
            self._pipelines,
            self._tenant_names,
            first_id,
            batch.at,
            batch.cls,
            self._kind[batch.cls],
            batch.tenant,
            self._priority[batch.cls],
            batch.input_tokens,
            self._cap[batch.cls],
            _after(batch.at, self._ttft_span[batch.cls]),
            _after(batch.at, self._due_span[batch.cls]),
            batch.prefix,
            batch.output_tokens,
            batch.contents.tolist() if batch.contents.any() else None,
        )


class Limits(NamedTuple):
    """Where a load ends: after ``requests`` requests, or at the first instant from ``until`` (ns); None = no limit."""

    requests: int | None
    until: int | None

    @staticmethod
    def of(requests: int | None, duration_s: float | None, *, needed: bool) -> Limits:
        """Checked limits; ``needed``: the load is endless without one."""
        if needed and requests is None and duration_s is None:
            raise ConfigError("load.requests, load.duration_s: set at least one, or the load never ends")
        return Limits(
            None if requests is None else whole("load.requests", requests, 1),
            None
            if duration_s is None
            else seconds(number("load.duration_s", duration_s, 0.0, SECONDS_MAX, above=True)),
        )


def limited(batches: Iterable[Batch], limits: Limits) -> Iterator[Batch]:
    """``batches`` up to ``limits``."""
    left = limits.requests
    for batch in batches:
        kept = batch
        if limits.until is not None:
            kept = kept.head(int(np.searchsorted(kept.at, limits.until)))
        if left is not None:
            kept = kept.head(left)
            left -= len(kept.at)
        yield kept
        if len(kept.at) < len(batch.at) or left == 0:
            return


def issued(mix: Mix, batches: Iterable[Batch]) -> Iterator[Arrival]:
    """The rows of ``batches`` as arrivals numbered from zero."""
    first_id = 0
    for batch in batches:
        yield from mix.issue(batch, first_id)
        first_id += len(batch.at)


def in_columns(mix: Mix, batches: Iterable[Batch]) -> Iterator[Arrivals]:
    """The same as columns."""
    first_id = 0
    for batch in batches:
        yield mix.columns(batch, first_id)
        first_id += len(batch.at)


def merged(flows: Sequence[Iterator[Batch]]) -> Iterator[Batch]:
    """Sorted flows as one sorted flow. At equal instants the earlier flow goes first, within a merged stretch."""
    heads = [next(flow, None) for flow in flows]
    while any(head is not None for head in heads):
        horizon = min(int(head.at[-1]) for head in heads if head is not None)
        parts = []
        for i, head in enumerate(heads):
            if head is None:
                continue
            n = int(np.searchsorted(head.at, horizon, side="right"))
            parts.append(head.head(n))
            heads[i] = head.tail(n) if n < len(head.at) else next(flows[i], None)
        yield sorted_batch(parts)


def sorted_batch(parts: Sequence[Batch]) -> Batch:
    """The rows of ``parts`` by instant; equal instants keep the order of the parts."""
    if len(parts) == 1:
        return parts[0]
    at = np.concatenate([part.at for part in parts])
    order = np.argsort(at, kind="stable")
    return Batch._make(np.concatenate(columns)[order] for columns in zip(*parts, strict=True))


def before(shares: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) where in [0, 1) each of the n shares begins. An empty share begins where the next one does."""
    values = np.asarray(shares, np.float64)
    return np.asarray(np.cumsum(values) - values)


def pick(start: NDArray[np.float64], u: Uniforms) -> NDArray[np.int64]:
    """Index of the share that each of ``u`` falls into."""
    return np.asarray(np.searchsorted(start, u, side="right") - 1, np.int64)


def kind_of(c: RequestClass) -> str:
    """The kind's name in configurations and results."""
    return SloTable.KINDS[c.kind]


def generates(c: RequestClass) -> bool:
    """Whether requests of the class produce output tokens."""
    return c.kind is not RequestKind.EMBEDDING


def _after(at: NDArray[np.int64], span: NDArray[np.int64]) -> NDArray[np.int64]:
    """``at + span``, NEVER where the span is NEVER."""
    return np.asarray(np.where(span == NEVER, NEVER, at + np.where(span == NEVER, 0, span)))
