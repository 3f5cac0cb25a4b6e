"""A recorded trace as a load: real arrivals and lengths, scaled, cut to a window, with embeddings mixed in.

The cap on output tokens (what a policy sees) must not tell the true length. A trace does not record the client's cap,
so one cap is used for all requests of a kind: the configured one, or else the smallest power of two that no output of
that kind in the window exceeds. It says nothing about any single request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from sage_bench.loads.arrivals import Instants, renewals
from sage_bench.loads.check import number, shares, whole
from sage_bench.loads.mix import (
    Batch,
    Limits,
    Mix,
    before,
    generates,
    in_columns,
    issued,
    kind_of,
    limited,
    merged,
    pick,
    sorted_batch,
)
from sage_bench.loads.open_loop import ClassStreams, check_drawable, files_of, own_flow
from sage_bench.loads.request_class import RequestClass
from sage_bench.traces.reader import ARRIVAL_S_MAX, Trace
from sage_bench.traces.schema import KINDS, REQUEST_KINDS
from sage_core.errors import ConfigError
from sage_core.load import Arrival, Arrivals
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_core.units import SECOND, RequestKind


class TraceLoad:
    """Requests of a trace file.

    window_s: [from, to) in the trace's own seconds; the window's start becomes instant 0. rate_scale: 2 plays the trace
    twice as fast. limit: read at most this many rows of the window. classes: how the rows are labelled; the rows of a
    kind are split over the classes of that kind by share (a kind without a class gets a plain one named after it).
    embedding_share: fraction of the load that is embedding requests, added to a trace that has none, as class
    ``embedding``: its own arrival process at the matching mean rate, or, without one, a Poisson process whose clock is
    the trace itself, so that embeddings come faster when the trace does. requests, duration_s: limits of the whole
    load, embeddings included, in the load's own (scaled) time.

    notes: what a user should know of the trace before believing a run of it.
    """

    def __init__(
        self,
        path: str | None,
        rate_scale: float = 1.0,
        window_s: tuple[float, float] | None = None,
        limit: int | None = None,
        requests: int | None = None,
        duration_s: float | None = None,
        classes: Mapping[str, RequestClass] | None = None,
        embedding_share: float = 0.0,
        embedding: RequestClass | None = None,
        *,
        streams: Streams,
        slo: SloTable,
    ) -> None:
        if path is None:
            raise ConfigError(
                "load.path: expected a trace file, as in load=trace load.path=trace.parquet; make one with "
                "`sage trace import` or `sage trace synth`"
            )
        self.trace = Trace(path)
        self.rate_scale = number("load.rate_scale", rate_scale, 0.0, above=True)
        self.window_s = None if window_s is None else _window(window_s)
        self.limit = None if limit is None else whole("load.limit", limit, 1)
        self.limits = Limits.of(requests, duration_s, needed=False)
        self.summary = self.trace.scan(self.window_s, prefix=True)
        if self.summary.rows == 0:
            last_s = self.trace.scan().last_s
            raise ConfigError(f"load.window_s: no request in {list(window_s or ())}; {path} ends at {last_s:.3f} s")
        if self.summary.last_s / self.rate_scale > ARRIVAL_S_MAX:
            raise ConfigError(
                f"load.rate_scale: {self.rate_scale:g} stretches the trace beyond {ARRIVAL_S_MAX:g} s; raise it"
            )
        self.ratio = self._embeddings_per_row(embedding_share, embedding)
        named, self._classes_of = self._by_kind(classes or {})
        if self.ratio and embedding is not None:
            if "embedding" in named:
                raise ConfigError(
                    "load.classes.embedding: the name is taken by load.embedding; call the class something else"
                )
            check_drawable("embedding", embedding)
            named["embedding"] = embedding
        self.mix = Mix(named, slo, self._caps(named))
        self.notes = self._doubts()
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
        return list(dict.fromkeys([str(self.trace.path), *files_of(self.mix.classes)]))

    def batches(self) -> Iterator[Batch]:
        """The load as columns."""
        return limited(self._mixed(), self.limits)

    def _mixed(self) -> Iterator[Batch]:
        """The rows of the window and the embeddings added to them."""
        rows = self._rows()
        if not self.ratio:
            return rows
        drawer, c = ClassStreams(self.mix, self._streams), len(self.mix.classes) - 1
        process = self.mix.classes[c].arrivals
        if process is None:
            return self._with_followers(rows, c, drawer)
        rows_used = min(self.summary.rows, self.limit or self.summary.rows)
        span_s = max(self._end_ns() / SECOND, 1e-9)
        return merged([rows, _until(self._end_ns(), own_flow(process, self.ratio * rows_used / span_s, c, drawer))])

    def _rows(self) -> Iterator[Batch]:
        """The rows of the window, labelled."""
        origin_s = 0.0 if self.window_s is None else self.window_s[0]
        left = self.limit
        open_streams: dict[str, np.random.Generator] = {}

        def uniforms(name: str, n: int) -> NDArray[np.float64]:
            if name not in open_streams:
                open_streams[name] = self._streams.stream(f"load/{name}")
            return open_streams[name].random(n)

        for rows in self.trace.rows(self.window_s, prefix=True, contents=True):
            kept = rows if left is None else rows.between(0, left)
            at = np.rint((kept.arrival_s - origin_s) * (SECOND / self.rate_scale)).astype(np.int64)
            n = len(at)
            batch = Batch(
                at,
                np.zeros(n, np.int64),
                np.empty(n, np.int64),
                kept.prompt_tokens,
                kept.output_tokens,
                kept.prefix,
                kept.contents,
            )
            for kind, (candidates, start) in self._classes_of.items():
                of_kind = np.flatnonzero(kept.kind == kind)
                batch.cls[of_kind] = candidates[pick(start, uniforms(f"{KINDS[kind]}/class", len(of_kind)))]
            for c in np.unique(batch.cls).tolist():
                of_class = np.flatnonzero(batch.cls == c)
                u = uniforms(f"{self.mix.names[c]}/tenant", len(of_class))
                batch.tenant[of_class] = self.mix.tenants(c, u)
            yield batch
            if left is not None:
                left -= n
                if left == 0:
                    return

    def _with_followers(self, rows: Iterator[Batch], c: int, drawer: ClassStreams) -> Iterator[Batch]:
        """``rows`` and, on average, ``ratio`` embeddings in the gap after each of them.

        The k-th row is position k of a clock; embeddings are a Poisson process of rate ``ratio`` on that clock.
        """
        positions = (chunk / self.ratio for chunk in renewals(1.0, drawer.fresh(c, "arrivals/gaps")))
        ahead = next(positions)
        first, carry = 0, np.empty(0, np.int64)
        for batch in rows:
            at = np.concatenate((carry, batch.at))
            last = first + len(at) - 1
            parts = []
            while ahead[-1] < last:
                parts.append(ahead)
                ahead = next(positions)
            n = int(np.searchsorted(ahead, last))
            parts.append(ahead[:n])
            ahead = ahead[n:] if n < len(ahead) else next(positions)
            position = np.concatenate(parts)
            followers: Instants = np.rint(np.interp(position - first, np.arange(len(at)), at)).astype(np.int64)
            yield sorted_batch([batch, drawer.filled(followers, np.full(len(followers), c, np.int64))])
            first, carry = last, at[-1:]

    def _by_kind(
        self, classes: Mapping[str, RequestClass]
    ) -> tuple[dict[str, RequestClass], dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]]]:
        """Classes of the mix, and for each kind in the trace which of them its rows belong to."""
        named = {}
        for name, c in classes.items():
            if c.input_tokens is not None or c.output_tokens is not None or c.arrivals is not None or c.prefixes:
                raise ConfigError(
                    f"load.classes.{name}: the trace brings lengths, prefixes and arrivals; leave input_tokens, "
                    "output_tokens, prefixes and arrivals out"
                )
            named[name] = c
        of_kind = {}
        for kind in self.summary.rows_of:
            code = KINDS.index(kind)
            label = SloTable.KINDS[REQUEST_KINDS[code]]
            members = {name: c.share for name, c in named.items() if c.kind is REQUEST_KINDS[code]}
            if not members:
                named[label] = RequestClass(label)
                members = {label: None}
            share = shares(f"load.classes.<{label} classes>.share", members)
            names = list(named)
            of_kind[code] = (np.array([names.index(name) for name in share], np.int64), before(list(share.values())))
        return named, of_kind

    def _embeddings_per_row(self, share: float, embedding: RequestClass | None) -> float:
        fraction = number("load.embedding_share", share, 0.0, 0.99)
        if fraction == 0:
            return 0.0
        if "embedding" in self.summary.rows_of:
            raise ConfigError(
                f"load.embedding_share: {self.trace.path} has {self.summary.rows_of['embedding']} embedding requests of its "
                "own; set load.embedding_share=0"
            )
        if embedding is None or embedding.kind is not RequestKind.EMBEDDING:
            raise ConfigError(
                "load.embedding: expected a request class of kind embedding, as load.embedding_share is above 0"
            )
        return fraction / (1.0 - fraction)

    def _doubts(self) -> list[str]:
        if not self.summary.with_blocks or self.trace.block_tokens:
            return []
        stated = self.trace.metadata.get("hash_block_tokens")
        return [
            f"{self.trace.path}: {self.summary.with_blocks:,} rows have hash_ids, but the metadata key hash_block_tokens "
            f"{'is missing' if stated is None else f'is {stated!r}'}; expected the tokens of a block, so prompts share nothing "
            "in a prefix cache"
        ]

    def _caps(self, named: Mapping[str, RequestClass]) -> dict[str, int]:
        caps = {}
        for name, c in named.items():
            longest = self.summary.output_tokens_max.get(KINDS[REQUEST_KINDS.index(c.kind)], 1)
            if not generates(c):
                continue
            if c.output_tokens_max is not None and c.output_tokens_max < longest:
                raise ConfigError(
                    f"load.classes.{name}.output_tokens_max: {c.output_tokens_max} is below the longest {kind_of(c)} output in "
                    f"{self.trace.path}, {longest} tokens; raise it, or set null for the next power of two"
                )
            caps[name] = 1 << (longest - 1).bit_length()
        return caps

    def _end_ns(self) -> int:
        """Instant of the last row used; with a limit, found by reading up to it."""
        if self.limit is None or self.limit >= self.summary.rows:
            origin_s = 0.0 if self.window_s is None else self.window_s[0]
            return round((self.summary.last_s - origin_s) * (SECOND / self.rate_scale))
        last = 0
        for batch in self._rows():
            last = int(batch.at[-1])
        return last


def _until(end_ns: int, flow: Iterator[Batch]) -> Iterator[Batch]:
    """``flow`` up to and including ``end_ns``."""
    for batch in flow:
        n = int(np.searchsorted(batch.at, end_ns, side="right"))
        if n:
            yield batch.head(n)
        if n < len(batch.at):
            return


def _window(window_s: tuple[float, float]) -> tuple[float, float]:
    if len(window_s) != 2:
        raise ConfigError(f"load.window_s: expected [from, to] in seconds of the trace, got {window_s!r}")
    start = number("load.window_s[0]", window_s[0], 0.0)
    return start, number("load.window_s[1]", window_s[1], start, above=True)
