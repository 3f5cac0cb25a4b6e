"""Tools: results, and every way not to have one."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from sage_core.errors import ConfigError
from sage_live.tools import Tool, ToolError, ToolFault, load_function

LONG_S = 20.0
SHORT_S = 0.1


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, LONG_S))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not holds():
            await asyncio.sleep(0.002)


async def fails(tool: Tool, *args: Any) -> ToolError:
    with pytest.raises(ToolError) as caught:
        await tool.call(*args)
    return caught.value


class Gate:
    """A function that hangs until it is opened."""

    def __init__(self) -> None:
        self.entered = 0
        self.open = threading.Event()

    def hang(self) -> str:
        self.entered += 1
        assert self.open.wait(LONG_S)
        return "late"


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def add(a: int, b: int = 1) -> int:
    return a + b


async def add_soon(a: int, b: int = 1) -> int:
    await asyncio.sleep(0)
    return a + b


class AddSoon:
    async def __call__(self, a: int, b: int = 1) -> int:
        return a + b


@pytest.mark.parametrize("function", [add, add_soon, AddSoon(), functools.partial(add_soon)])
def test_what_a_function_returns(function: Callable[..., Any]) -> None:
    async def main() -> None:
        tool = Tool("add", function, returns=int)
        assert await tool.call(2) == 3
        assert await tool.call(2, b=5) == 7
        assert await asyncio.gather(*(tool.call(number) for number in range(20))) == list(range(1, 21))
        assert tool.hanging == 0

    run(main())


def test_sync_functions_run_beside_the_loop_and_each_other() -> None:
    async def main() -> None:
        meeting = threading.Barrier(3)  # which three have to reach at once
        tool = Tool("meet", lambda: meeting.wait(LONG_S), workers=3)
        assert sorted(await asyncio.gather(*(tool.call() for _ in range(3)))) == [0, 1, 2]

    run(main())


def test_no_more_at_once_than_workers() -> None:
    async def main() -> None:
        guard = threading.Lock()
        running = most = 0

        def work() -> None:
            nonlocal running, most
            with guard:
                running += 1
                most = max(most, running)
            time.sleep(0.002)
            with guard:
                running -= 1

        tool = Tool("work", work, workers=2)
        await asyncio.gather(*(tool.call() for _ in range(20)))
        assert most == 2

    run(main())


def raises(error: BaseException) -> Callable[[], Any]:
    def function() -> Any:
        raise error

    return function


def raises_soon(error: BaseException) -> Callable[[], Any]:
    async def function() -> Any:
        raise error

    return function


@pytest.mark.parametrize("made", [raises, raises_soon])
@pytest.mark.parametrize(
    "error", [KeyError("city"), SystemExit(3), asyncio.CancelledError(), TimeoutError("upstream")], ids=repr
)
def test_what_a_function_raises(made: Callable[..., Any], error: BaseException) -> None:
    async def main() -> None:
        told = await fails(Tool("weather", made(error)))
        assert told.reason is ToolFault.RAISED and told.tool == "weather" and told.__cause__ is error
        assert str(told) == f"tool weather: raised: {type(error).__name__}: {error}"

    run(main())


def test_even_what_no_future_can_hold() -> None:
    async def main() -> None:
        told = await fails(Tool("first", lambda: next(iter([]))))
        assert told.reason is ToolFault.RAISED and isinstance(told.__cause__, StopIteration)

    run(main())


def test_wrong_arguments_and_results() -> None:
    async def main() -> None:
        assert "add() missing 1 required positional argument: 'a'" in str(await fails(Tool("add", add)))
        told = await fails(Tool("add", add, returns=(str, bytes)), 1)
        assert told.reason is ToolFault.WRONG_TYPE
        assert str(told) == "tool add: wrong type: expected str or bytes, got int"

    run(main())


def test_a_hanging_function_is_told_and_keeps_its_worker_only(gate: Gate) -> None:
    async def main() -> None:
        slow = Tool("slow", gate.hang, timeout_s=SHORT_S, workers=1)
        quick = Tool("quick", add, timeout_s=LONG_S, workers=1)
        told = await fails(slow)
        assert told.reason is ToolFault.TIMED_OUT and str(told) == "tool slow: timed out: no result within 0.1 s"
        assert slow.hanging == 1
        assert await quick.call(1) == 2
        told = await fails(slow)
        assert "no free worker within 0.1 s; 1 of 1 are held by calls that timed out" in str(told)
        gate.open.set()
        await until(lambda: slow.hanging == 0)
        assert gate.entered == 1, "what had not begun in time began later"
        assert await slow.call() == "late"

    run(main())


def test_one_of_several_workers_hangs(gate: Gate) -> None:
    async def main() -> None:
        tool = Tool("maybe", lambda hang: gate.hang() if hang else "quick", timeout_s=SHORT_S, workers=2)
        await fails(tool, True)
        assert [await tool.call(False) for _ in range(5)] == ["quick"] * 5
        assert tool.hanging == 1

    run(main())


def test_a_coroutine_is_cancelled_at_its_time_out() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def forever() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        tool = Tool("forever", forever, timeout_s=SHORT_S, workers=1)
        assert (await fails(tool)).reason is ToolFault.TIMED_OUT
        await ended.wait()
        await until(lambda: tool.hanging == 0)
        assert (await fails(tool)).detail == "no result within 0.1 s", "its worker is free again"

    run(main())


def test_a_coroutine_that_ignores_it_hangs_too() -> None:
    async def main() -> None:
        leave = asyncio.Event()

        async def stubborn() -> None:
            while not leave.is_set():
                try:
                    await leave.wait()
                except asyncio.CancelledError:
                    continue

        tool = Tool("stubborn", stubborn, timeout_s=SHORT_S, workers=1)
        try:
            await fails(tool)
            assert "no free worker" in (await fails(tool)).detail and tool.hanging == 1
        finally:
            leave.set()
        await until(lambda: tool.hanging == 0)
        assert await tool.call() is None

    run(main())


def test_a_caller_that_is_cancelled_does_not_wait(gate: Gate) -> None:
    async def main() -> None:
        tool = Tool("slow", gate.hang, timeout_s=LONG_S, workers=1)
        task = asyncio.create_task(tool.call())
        await until(lambda: gate.entered == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tool.hanging == 1
        gate.open.set()
        await until(lambda: tool.hanging == 0)

    run(main())


def test_a_process_ends_although_a_tool_hangs() -> None:
    program = """
import asyncio, threading
from sage_live.tools import Tool, ToolError

async def main():
    try:
        await Tool("slow", threading.Event().wait, timeout_s=0.05).call()
    except ToolError as error:
        print(error)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LONG_S, check=True)
    assert done.stdout == "tool slow: timed out: no result within 0.05 s\n" and done.stderr == ""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "sage_test_my_tools.py").write_text(
        "def search(what):\n    return [what]\n\nclass Db:\n    @staticmethod\n    def look(up):\n        return up\n\nLIMIT = 3\n"
    )
    (tmp_path / "sage_test_broken.py").write_text("def broken(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "sage_test_my_tools"
    sys.modules.pop("sage_test_my_tools", None)


def test_tools_are_loaded_by_name(module: str) -> None:
    async def main() -> None:
        tool = Tool.load(f"{module}:search", timeout_s=2, workers=1, returns=list)
        assert tool.name == "search" and await tool.call("x") == ["x"]
        assert await Tool.load(f"{module}:Db.look", name="look").call("y") == "y"

    run(main())


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("search", "expected MODULE:FUNCTION"),
        (":search", "expected MODULE:FUNCTION"),
        ("sage_test_my_tools:", "expected MODULE:FUNCTION"),
        ("sage_test_absent:search", r"sage_test_absent cannot be imported \(ModuleNotFoundError"),
        ("sage_test_broken:broken", r"sage_test_broken cannot be imported \(SyntaxError"),
        ("sage_test_my_tools:serach", "there is no serach in sage_test_my_tools; did you mean search"),
        ("sage_test_my_tools:LIMIT", "expected a function, got int"),
    ],
)
def test_what_cannot_be_loaded(path: str, told: str, module: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        load_function(path)
    assert repr(path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"timeout_s": 0}, "tool t: timeout_s: expected seconds above 0"),
        ({"timeout_s": float("nan")}, "tool t: timeout_s"),
        ({"workers": 0}, "tool t: workers: expected 1 or more"),
    ],
)
def test_what_cannot_be_a_tool(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Tool("t", add, **options)
    with pytest.raises(ConfigError, match="tool t: expected a function, got int"):
        Tool("t", 3)  # type: ignore[arg-type]
