"""Tools of a pipeline: Python callables with a time-out, that cannot hold up the event loop or each other.

Rules:

* A call ends in time, with a result or a :class:`ToolError`, whatever the function does; short of a coroutine function
  that blocks, which is its author's mistake.
* A tool has ``workers``. Python cannot end a thread, and a coroutine may ignore that it is cancelled: what goes on after
  its time-out keeps its worker until it ends, and ``hanging`` counts it. A hanging tool takes no worker of another.
* Waiting for a worker counts. What has not begun when its time is over never begins.
* Threads of tools do not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import difflib
import importlib
import inspect
import threading
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

from sage_core.errors import ConfigError, SageError
from sage_core.units import SECONDS_MAX

TIMEOUT_S: Final = 10.0
WORKERS: Final = 4


class ToolFault(StrEnum):
    """Why a call gave no result."""

    RAISED = "raised"
    TIMED_OUT = "timed out"
    WRONG_TYPE = "wrong type"


class ToolError(SageError, RuntimeError):
    """A call of ``tool`` gave no result; ``reason`` says which way, ``__cause__`` is what the function raised."""

    def __init__(self, tool: str, reason: ToolFault, detail: str) -> None:
        super().__init__(f"tool {tool}: {reason}: {detail}")
        self.tool = tool
        self.reason = reason
        self.detail = detail


class Tool:
    """``function``: a coroutine function is awaited, any other runs in a thread. ``timeout_s``: of a call, seconds.
    ``workers``: calls at once. ``returns``: what results have to be instances of; None takes anything.

    For one event loop. ConfigError for what cannot be a tool.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        timeout_s: float = TIMEOUT_S,
        workers: int = WORKERS,
        returns: type | tuple[type, ...] | None = None,
    ) -> None:
        if not callable(function):
            raise ConfigError(f"tool {name}: expected a function, got {type(function).__name__}")
        if not 0 < timeout_s <= SECONDS_MAX:
            raise ConfigError(f"tool {name}: timeout_s: expected seconds above 0, got {timeout_s!r}")
        if workers < 1:
            raise ConfigError(f"tool {name}: workers: expected 1 or more, got {workers!r}")
        self.name = name
        self.timeout_s = timeout_s
        self.workers = workers
        self.returns = returns
        self.hanging = 0
        self._run = _awaited if _is_async(function) else _in_thread
        self._function = function
        self._free = asyncio.Semaphore(workers)
        self._hanging: set[asyncio.Task[_Outcome]] = set()  # the loop itself holds tasks weakly

    @classmethod
    def load(
        cls,
        path: str,
        *,
        name: str | None = None,
        timeout_s: float = TIMEOUT_S,
        workers: int = WORKERS,
        returns: type | tuple[type, ...] | None = None,
    ) -> Tool:
        """The function at ``MODULE:FUNCTION``, under its own name unless ``name`` is given. ConfigError saying what is
        not there."""
        function = load_function(path)
        return cls(name or path.partition(":")[2], function, timeout_s=timeout_s, workers=workers, returns=returns)

    async def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns for these arguments. ToolError. If the caller is cancelled, the call is let go of as
        after its time-out."""
        begun = asyncio.Event()
        task = asyncio.ensure_future(self._begin(begun, args, kwargs))
        try:
            await asyncio.wait([task], timeout=self.timeout_s)
        finally:
            over = task.done()
            if not over:
                self._let_go(task, begun.is_set())
        if not over:
            raise ToolError(self.name, ToolFault.TIMED_OUT, self._late(begun.is_set()))
        value, error = task.result()
        if error is not None:
            raise ToolError(self.name, ToolFault.RAISED, f"{type(error).__name__}: {error}") from error
        if self.returns is not None and not isinstance(value, self.returns):
            wrong = f"expected {_named(self.returns)}, got {type(value).__name__}"
            raise ToolError(self.name, ToolFault.WRONG_TYPE, wrong)
        return value

    async def _begin(self, begun: asyncio.Event, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Outcome:
        async with self._free:
            begun.set()
            return await self._run(self._function, args, kwargs)

    def _let_go(self, task: asyncio.Task[_Outcome], begun: bool) -> None:
        if self._run is _awaited or not begun:  # to cancel the wait for a thread would free a worker that is not free
            task.cancel()
        if begun:
            self.hanging += 1
            self._hanging.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[_Outcome]) -> None:
        self.hanging -= 1
        self._hanging.discard(task)

    def _late(self, begun: bool) -> str:
        if begun:
            return f"no result within {self.timeout_s:g} s"
        return f"no free worker within {self.timeout_s:g} s; {self.hanging} of {self.workers} are held by calls that timed out"


def load_function(path: str) -> Callable[..., Any]:
    """What ``MODULE:FUNCTION`` names; the function may be an attribute, as in ``MODULE:CLASS.METHOD``. ConfigError."""
    module_name, colon, attributes = path.partition(":")
    if not module_name or not colon or not attributes:
        raise ConfigError(f"tool {path!r}: expected MODULE:FUNCTION, as in my_tools:search")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module does when it is imported
        raise ConfigError(
            f"tool {path!r}: {module_name} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            near = difflib.get_close_matches(attribute, dir(found), 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"tool {path!r}: there is no {attribute} in {module_name}{meant}") from error
    if not callable(found):
        raise ConfigError(f"tool {path!r}: expected a function, got {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


class _Outcome(NamedTuple):
    """Exceptions travel as values: some cannot be those of a future, StopIteration for one."""

    value: Any = None
    error: BaseException | None = None


async def _awaited(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Outcome:
    try:
        return _Outcome(await function(*args, **kwargs))
    except (Exception, asyncio.CancelledError, SystemExit) as error:
        return _Outcome(error=error)


async def _in_thread(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Outcome:
    """A thread of its own each time: pools of the standard library are waited for when the process ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Outcome] = loop.create_future()
    context = contextvars.copy_context()

    def tell(outcome: _Outcome) -> None:
        if not future.done():
            future.set_result(outcome)

    def work() -> None:
        try:
            outcome = _Outcome(context.run(function, *args, **kwargs))
        except BaseException as error:  # SystemExit too ends the call, not the process
            outcome = _Outcome(error=error)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            loop.call_soon_threadsafe(tell, outcome)

    threading.Thread(target=work, name=f"tool {getattr(function, '__name__', '')}", daemon=True).start()
    return await future


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _named(types: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (types if isinstance(types, tuple) else (types,)))
