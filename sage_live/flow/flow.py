"""A flow, declared: what follows what, checked before anything runs."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Hashable, Iterable, Mapping
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar, cast, overload

from sage_core.errors import ConfigError
from sage_core.units import Nanos, seconds
from sage_live.flow.aggregate import Aggregate
from sage_live.flow.clock import Clock, RealClock
from sage_live.flow.operators import Batch, Filter, FlatMap, Map, ParallelMap
from sage_live.flow.run import FlowRun
from sage_live.flow.source import Inlet, source_stage
from sage_live.flow.stage import Stage
from sage_live.flow.window import Window, Windows, WindowStage

QUEUE_LIMIT: Final = 64
"""Items between two stages, where nothing else is said."""

T = TypeVar("T")
U = TypeVar("U")

_Make: TypeAlias = Callable[[], Stage]


class Flow(Generic[T]):
    """A source and stages, of which the last gives ``T``. Begun by :meth:`of`; each verb gives a new flow, and :meth:`to` a
    run of it, so that a flow may be run again as often as its source may.

    Every stage takes ``name``, by which statistics and errors know it (else its function's), and ``queue_limit``, the most
    items that wait before it. ConfigError for a number that cannot be.
    """

    def __init__(self, makes: tuple[tuple[_Make, int], ...]) -> None:
        self._makes = makes

    @classmethod
    def of(cls, source: Iterable[T] | AsyncIterable[T] | Inlet[T], *, name: str = "source") -> Flow[T]:
        """An iterable is asked for the next item when there is room for it. An :class:`Inlet` is pushed into."""
        return cls(((partial(source_stage, name, source), 1),))

    @overload
    def map(
        self,
        function: Callable[[T], Awaitable[U]],
        *,
        parallelism: int | None = None,
        ordered: bool = True,
        queue_limit: int = QUEUE_LIMIT,
        name: str | None = None,
    ) -> Flow[U]: ...

    @overload
    def map(
        self,
        function: Callable[[T], U],
        *,
        parallelism: int | None = None,
        ordered: bool = True,
        queue_limit: int = QUEUE_LIMIT,
        name: str | None = None,
    ) -> Flow[U]: ...

    def map(
        self,
        function: Callable[[T], Any],
        *,
        parallelism: int | None = None,
        ordered: bool = True,
        queue_limit: int = QUEUE_LIMIT,
        name: str | None = None,
    ) -> Flow[Any]:
        """What a function makes of each item.

        A coroutine function is awaited for ``parallelism`` items at once, 1 unless said. Another function is called in
        the event loop, which suits microseconds; with ``parallelism`` it is called in as many threads. A thread cannot
        be interrupted: a flow that is cut leaves it to finish.

        ordered: results in the order of items; else in the order in which they are ready.
        """
        return self._then(self._mapping("map", function, parallelism, ordered, name), queue_limit)

    def filter(
        self, predicate: Callable[[T], object], *, queue_limit: int = QUEUE_LIMIT, name: str | None = None
    ) -> Flow[T]:
        """The items for which it is true. Called in the event loop."""
        return self._then(partial(Filter, _name("filter", predicate, name), predicate), queue_limit)

    def flat_map(
        self, function: Callable[[T], Iterable[U]], *, queue_limit: int = QUEUE_LIMIT, name: str | None = None
    ) -> Flow[U]:
        """Each of what a function makes of an item, none or many. Called in the event loop."""
        return self._then(partial(FlatMap, _name("flat_map", function, name), function), queue_limit)

    def batch(
        self,
        max_size: int,
        *,
        max_wait_s: float | None = None,
        queue_limit: int = QUEUE_LIMIT,
        name: str = "batch",
    ) -> Flow[list[T]]:
        """Lists of ``max_size`` items; of fewer once their first has waited ``max_wait_s`` here (None: for ever), and at
        the end."""
        _at_least_one("max_size", max_size)
        if max_wait_s is not None and not max_wait_s >= 0:
            raise ConfigError(f"max_wait_s: expected 0 or more, got {max_wait_s:g}")
        wait = None if max_wait_s is None else seconds(max_wait_s)
        return self._then(partial(Batch, name, max_size, wait), queue_limit)

    def window(
        self,
        windows: Windows,
        time_of: Callable[[T], Nanos | int],
        aggregates: Mapping[str, Aggregate[T]],
        *,
        key: Callable[[T], Hashable] | None = None,
        lateness_s: float = 0.0,
        on_late: Callable[[T], object] | None = None,
        queue_limit: int = QUEUE_LIMIT,
        name: str = "window",
    ) -> Flow[Window]:
        """Aggregates over windows of event time, for each key apart. :mod:`sage_live.flow.window` has the rules.

        Args:
            time_of: of an item, in whole nanoseconds from any origin.
            lateness_s: how far behind the latest event an item may be and still be counted.
            on_late: told of each item that was further behind.
        """
        if not lateness_s >= 0:
            raise ConfigError(f"lateness_s: expected 0 or more, got {lateness_s:g}")
        if not aggregates:
            raise ConfigError("aggregates: expected at least one, as in {'items': Count()}")
        make = partial(
            WindowStage, name, windows, cast(Callable[[Any], Nanos], time_of), dict(aggregates), key, seconds(lateness_s),
            on_late,
        )  # fmt: skip
        return self._then(make, queue_limit)

    def to(
        self,
        sink: Callable[[T], object],
        *,
        parallelism: int | None = None,
        queue_limit: int = QUEUE_LIMIT,
        name: str | None = None,
        on_cancel: Literal["drain", "drop"] = "drain",
        clock: Clock | None = None,
    ) -> FlowRun:
        """A run that ends in ``sink``, a function or coroutine function as for :meth:`map`; what it returns is ignored.

        on_cancel: what becomes of the items that are in the flow when it is cancelled. ``drain``: the source is asked no
        more, and what was let in goes through to the sink; a second cancellation drops. ``drop``: nothing more is done;
        what is lost is counted.
        """
        if on_cancel not in ("drain", "drop"):
            raise ConfigError(f"on_cancel: expected drain or drop, got {on_cancel!r}")
        whole = self._then(self._mapping("sink", sink, parallelism, False, name), queue_limit)
        stages = [make() for make, _ in whole._makes]
        return FlowRun(stages, [limit for _, limit in whole._makes[1:]], on_cancel, clock or RealClock())

    def _mapping(
        self, verb: str, function: Callable[[T], Any], parallelism: int | None, ordered: bool, name: str | None
    ) -> _Make:
        if parallelism is not None:
            _at_least_one("parallelism", parallelism)
        name = _name(verb, function, name)
        if iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004  # not whether it can be called: what its call gives
            return partial(ParallelMap, name, function, parallelism or 1, ordered, threads=False)
        if parallelism is not None:
            return partial(ParallelMap, name, function, parallelism, ordered, threads=True)
        return partial(Map, name, function)

    def _then(self, make: _Make, queue_limit: int) -> Flow[Any]:
        _at_least_one("queue_limit", queue_limit)
        return Flow((*self._makes, (make, queue_limit)))


def _name(verb: str, function: Callable[..., object], name: str | None) -> str:
    if not callable(function):
        raise ConfigError(f"{verb}: expected a function, got {type(function).__name__}")
    if name is not None:
        return name
    own = getattr(function, "__name__", verb)
    return verb if own == "<lambda>" else own


def _at_least_one(what: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{what}: expected at least 1, got {value}")
