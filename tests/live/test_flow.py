"""Streaming flows: what goes in comes out or is counted, queues hold what they may, and every end is a clear one."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.errors import ConfigError
from sage_core.units import SECOND, Nanos, seconds
from sage_live.flow import Flow, FlowClosed, FlowError, FlowRun, Inlet, Outcome, sliding, tumbling
from sage_live.flow.aggregate import Count, Quantile
from sage_live.flow.edge import Edge

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
    return asyncio.run(asyncio.wait_for(main, timeout_s))


def collected(flow: Flow[T], **options: Any) -> list[T]:
    """What reaches the sink of a flow that ends by itself."""
    got: list[T] = []
    report = run(flow.to(got.append, **options).run())
    assert report.outcome == Outcome.COMPLETED
    conserved(report.stages)
    return got


def conserved(stages: Any) -> None:
    """What a stage gave the next one took, or it was counted as dropped."""
    for before, after in pairwise(stages):
        assert before.items_out == after.items_in + after.dropped - (after.items_in - after.items_finished)
        assert after.queue_depth_max <= after.queue_limit


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


class ManualClock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.at = Nanos(0)
        self.timers: list[tuple[Nanos, Callable[[], None], list[bool]]] = []

    def now(self) -> Nanos:
        return self.at

    def call_at(self, at: Nanos, callback: Callable[[], None]) -> Any:
        cancelled: list[bool] = []
        self.timers.append((at, callback, cancelled))

        class Handle:
            def cancel(self) -> None:
                cancelled.append(True)

        return Handle()

    def advance(self, s: float) -> None:
        self.at = Nanos(self.at + seconds(s))
        due = [timer for timer in self.timers if timer[0] <= self.at]
        self.timers = [timer for timer in self.timers if timer[0] > self.at]
        for _, callback, cancelled in due:
            if not cancelled:
                callback()

    @property
    def armed(self) -> int:
        return sum(not cancelled for _, _, cancelled in self.timers)


# --- stages -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-50, 50)), st.integers(1, 5), st.integers(1, 4))
def test_a_flow_computes_what_a_loop_would(items: list[int], limit: int, size: int) -> None:
    flow = (
        Flow.of(items)
        .map(lambda n: n * 3, queue_limit=limit)
        .filter(lambda n: n % 2, queue_limit=limit)
        .flat_map(lambda n: range(abs(n) % 4), queue_limit=limit)
        .batch(size, queue_limit=limit)
    )
    flat = [each for n in items if n * 3 % 2 for each in range(abs(n * 3) % 4)]
    assert collected(flow) == [flat[start : start + size] for start in range(0, len(flat), size)]


def test_a_flow_can_run_again_and_a_run_cannot() -> None:
    flow = Flow.of([1, 2]).map(str)
    assert collected(flow) == collected(flow) == ["1", "2"]
    again = flow.to(print)

    async def twice() -> None:
        await again.run()
        await again.run()

    with pytest.raises(ConfigError, match="another to"):
        run(twice())


@pytest.mark.parametrize("ordered", [True, False])
def test_parallel_coroutines_are_in_flight_together_and_no_more_than_allowed(ordered: bool) -> None:
    async def main() -> None:
        now = most = 0
        gates = [asyncio.Event() for _ in range(8)]
        got: list[int] = []

        async def slow(n: int) -> int:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await gates[n].wait()
            now -= 1
            return n

        task = asyncio.create_task(Flow.of(range(8)).map(slow, parallelism=4, ordered=ordered).to(got.append).run())
        await until(lambda: now == 4)
        gates[2].set()  # the third is ready first
        if ordered:
            await until(lambda: now == 3)
            assert got == []
        else:
            await until(lambda: got == [2])
        for gate in gates:
            gate.set()
        await task
        assert sorted(got) == list(range(8)) and most == 4
        assert not ordered or got == list(range(8))

    run(main())


@given(st.data())
def test_order_is_kept_whatever_the_order_of_completion(data: st.DataObject) -> None:
    turns = data.draw(st.lists(st.integers(0, 5), max_size=30))
    parallelism = data.draw(st.integers(1, 6))

    async def late(pair: tuple[int, int]) -> int:
        for _ in range(pair[1]):
            await asyncio.sleep(0)
        return pair[0]

    flow = Flow.of(list(enumerate(turns))).map(late, parallelism=parallelism, queue_limit=2)
    assert collected(flow) == list(range(len(turns)))


def test_a_function_with_parallelism_runs_in_so_many_threads() -> None:
    meeting = threading.Barrier(3, timeout=10)  # passes only if three are there at once

    def work(n: int) -> tuple[int, str]:
        meeting.wait()
        return n, threading.current_thread().name

    got = collected(Flow.of(range(9)).map(work, parallelism=3))
    assert [n for n, _ in got] == list(range(9))
    assert len({name for _, name in got}) == 3


def test_a_thread_that_raises_stop_iteration_fails_the_flow() -> None:
    with pytest.raises(FlowError, match="StopIteration"):
        collected(Flow.of([1]).map(lambda n: next(iter(())), parallelism=2))


def test_batches_close_by_size_by_time_and_at_the_end() -> None:
    async def main() -> None:
        clock, inlet, got = ManualClock(), Inlet[int](), list[list[int]]()
        task = asyncio.create_task(Flow.of(inlet).batch(3, max_wait_s=1.0).to(got.append, clock=clock).run())
        for n in range(4):
            await inlet.put(n)
        await until(lambda: clock.armed)
        assert got == [[0, 1, 2]]
        clock.advance(0.999)
        await inlet.put(4)  # does not prolong the wait of the first
        await asyncio.sleep(0)
        assert got == [[0, 1, 2]]
        clock.advance(0.001)
        await until(lambda: len(got) == 2)
        await inlet.put(5)
        inlet.close()
        report = await task
        assert got == [[0, 1, 2], [3, 4], [5]]
        conserved(report.stages)

    run(main())


def test_an_asynchronous_source_is_closed() -> None:
    closed = []

    async def source() -> AsyncIterator[int]:
        try:
            for n in range(100):
                yield n
        finally:
            closed.append(True)

    assert collected(Flow.of(source()).map(lambda n: n + 1, queue_limit=7)) == list(range(1, 101))
    assert closed == [True]

    async def failing() -> None:
        iterator = source()  # held here, so that nobody else closes it
        with pytest.raises(FlowError):
            await Flow.of(iterator).map(lambda n: 1 // (n - 1), queue_limit=2).to(print).run()
        assert closed == [True, True]

    run(failing())


def test_busy_time_is_what_the_function_took() -> None:
    clock = ManualClock()

    def work(n: int) -> int:
        clock.advance(0.5)
        return n

    execution = Flow.of(range(4)).map(work).to(lambda n: None, clock=clock)
    report = run(execution.run())
    assert [stage.busy_ns for stage in report.stages] == [0, 2 * SECOND, 0]
    assert report.elapsed_s == 2.0


# --- limits -----------------------------------------------------------------------------------------------------------


class Tracked:
    """An item that knows how many of its kind are alive."""

    alive = 0
    most = 0

    def __init__(self) -> None:
        Tracked.alive += 1
        Tracked.most = max(Tracked.most, Tracked.alive)

    def __del__(self) -> None:
        Tracked.alive -= 1


def test_a_fast_source_and_a_slow_sink_keep_no_more_than_the_limits_in_memory() -> None:
    Tracked.alive = Tracked.most = 0
    count = 100_000

    def source() -> Iterator[Tracked]:
        for _ in range(count):
            yield Tracked()

    async def slow(batch: list[Tracked]) -> None:
        for _ in range(12):  # turns of the loop, in which everybody else could run ahead
            await asyncio.sleep(0)

    async def same(item: Tracked) -> Tracked:
        return item

    flow = Flow.of(source()).map(same, parallelism=4, queue_limit=16).filter(lambda _: True, queue_limit=8)
    report = run(flow.batch(5, queue_limit=8).to(slow, queue_limit=2).run())
    assert report.stages[0].items_out == count
    assert [stage.queue_depth_max for stage in report.stages] == [0, 16, 8, 8, 2]
    queues = 16 + 8 + 8 + 2 * 5
    hands = 1 + 4 + 1 + 5 + 5  # source, workers, filter, the batch being made, the batch in the sink
    assert queues < Tracked.most <= queues + hands + 8  # 8: names of frames that still hold the item before
    assert Tracked.alive == 0


def test_a_full_queue_holds_up_the_source() -> None:
    async def main() -> None:
        asked = 0
        gate = asyncio.Event()

        def source() -> Iterator[int]:
            nonlocal asked
            while True:
                asked += 1
                yield asked

        async def hold(n: int) -> None:
            await gate.wait()

        execution = Flow.of(source()).map(str, queue_limit=3).to(hold, queue_limit=2, on_cancel="drop")
        task = asyncio.create_task(execution.run())
        await until(lambda: execution.stats[0].items_in == 8)
        for _ in range(50):
            await asyncio.sleep(0)
        assert asked == 8  # 1 in the sink, 2 and 3 in the queues, 1 in each other hand
        task.cancel()
        await asyncio.wait([task])

    run(main())


def test_an_inlet_that_rejects_says_so_and_counts() -> None:
    async def main() -> None:
        inlet, got, gate = Inlet[int]("reject"), list[int](), asyncio.Event()

        async def hold(n: int) -> None:
            await gate.wait()
            got.append(n)

        execution = Flow.of(inlet).to(hold, queue_limit=4)
        task = asyncio.create_task(execution.run())
        taken = [n for n in range(100) if await inlet.put(n)]
        assert len(taken) == 5  # 4 in the queue and 1 in the sink
        assert execution.stats[0].rejected == 95
        assert not inlet.offer(100)
        gate.set()
        inlet.close()
        with pytest.raises(FlowClosed, match="no more"):
            inlet.offer(101)
        report = await task
        assert got == taken
        assert (report.stages[0].items_out, report.stages[0].rejected) == (5, 96)

    run(main())


def test_an_inlet_that_blocks_loses_nothing_with_many_producers() -> None:
    async def main() -> None:
        inlet, got = Inlet[int](), list[int]()
        task = asyncio.create_task(Flow.of(inlet).map(lambda n: n, queue_limit=2).to(got.append, queue_limit=1).run())
        await asyncio.gather(*(inlet.put(n) for n in range(500)))
        inlet.close()
        report = await task
        assert sorted(got) == list(range(500))
        assert report.stages[0].rejected == 0

    run(main())


def test_a_producer_that_gives_up_waiting_passes_its_turn_on() -> None:
    async def main() -> None:
        inlet, gate, got = Inlet[int](), asyncio.Event(), list[int]()

        async def hold(n: int) -> None:
            await gate.wait()
            got.append(n)

        task = asyncio.create_task(Flow.of(inlet).to(hold, queue_limit=1).run())
        await inlet.put(0)
        await asyncio.sleep(0)
        await inlet.put(1)
        waiting = [asyncio.create_task(inlet.put(n)) for n in (2, 3, 4)]
        await asyncio.sleep(0)
        gate.set()
        waiting[0].cancel()
        await asyncio.wait(waiting)
        inlet.close()
        await task
        assert got == [0, 1, 3, 4]

    run(main())


def test_one_that_was_woken_and_gives_up_in_the_same_turn_wakes_the_next() -> None:
    async def main() -> None:
        edge = Edge[int](1)
        await edge.put(0)
        waiting = [asyncio.create_task(edge.put(n)) for n in (1, 2)]
        await asyncio.sleep(0)
        assert edge.take() == 0  # wakes the first
        waiting[0].cancel()
        await asyncio.wait_for(waiting[1], 10)
        assert list(edge.items) == [2]

    run(main())


def test_an_inlet_says_when_nobody_listens() -> None:
    async def main() -> None:
        inlet = Inlet[int]()
        with pytest.raises(FlowClosed, match="not connected"):
            inlet.offer(1)
        execution = Flow.of(inlet).to(lambda n: 1 // n, queue_limit=1)
        with pytest.raises(ConfigError, match="source of one run"):
            Flow.of(inlet).to(print)
        await inlet.put(0)
        waiting = asyncio.create_task(inlet.put(1))
        with pytest.raises(FlowError, match="ZeroDivisionError"):
            await execution.run()
        await asyncio.wait([waiting])
        assert waiting.exception() is None or isinstance(waiting.exception(), FlowClosed)
        with pytest.raises(FlowClosed):
            await inlet.put(2)

    run(main())


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_failing_stage_ends_the_flow_and_is_named() -> None:
    async def parse(n: int) -> int:
        if n == 50:
            raise ValueError("no such number")
        return n

    execution = Flow.of(range(1000)).map(parse, parallelism=3, queue_limit=5).to(lambda n: None)
    with pytest.raises(FlowError, match=r"^stage 1 \(parse\) failed: ValueError: no such number; \d+ items") as raised:
        run(execution.run())
    assert isinstance(raised.value.__cause__, ValueError)
    assert (raised.value.stage, raised.value.position) == ("parse", 1)
    assert execution.outcome == Outcome.FAILED
    conserved(execution.stats)
    let_in = execution.stats[0].items_in
    assert raised.value.dropped == let_in - execution.stats[-1].items_finished


@pytest.mark.parametrize("position", range(4))
def test_every_position_can_fail(position: int) -> None:
    def fail(at: int) -> Callable[[int], int]:
        def maybe(n: int) -> int:
            if at == position and n == 10:
                raise KeyError("ten")
            return n

        return maybe

    def source() -> Iterator[int]:
        yield from map(fail(0), range(100))

    flow = Flow.of(source()).map(fail(1)).flat_map(lambda n: [fail(2)(n)]).to(fail(3))
    with pytest.raises(FlowError) as raised:
        run(flow.run())
    assert raised.value.position == position


def test_a_worker_whose_request_was_cancelled_by_another_fails_the_flow() -> None:
    async def main() -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def ask(n: int) -> None:
            await answer

        task = asyncio.create_task(Flow.of([1]).to(ask).run())
        await asyncio.sleep(0.001)
        answer.cancel()
        with pytest.raises(FlowError, match="CancelledError"):
            await task

    run(main())


def test_a_coroutine_that_nobody_awaits_is_an_error() -> None:
    async def slow(n: int) -> int:
        return n

    with pytest.raises(FlowError, match="async def"):
        collected(Flow.of([1]).map(lambda n: slow(n)))


def endless(inlet_like: list[int]) -> Iterator[int]:
    while True:
        inlet_like.append(len(inlet_like))
        yield inlet_like[-1]


async def cancelled_in_the_middle(execution: FlowRun, reached: Callable[[], object]) -> None:
    task = asyncio.create_task(execution.run())
    await until(reached)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


def test_cancelling_drains_what_was_let_in() -> None:
    async def main() -> None:
        got: list[list[int]] = []
        asked: list[int] = []

        async def slow(n: int) -> int:
            await asyncio.sleep(0)
            return n

        execution = Flow.of(endless(asked)).map(slow, parallelism=3).batch(7).to(got.append)
        await cancelled_in_the_middle(execution, lambda: len(got) >= 5)
        assert execution.outcome == Outcome.DRAINED
        assert [n for batch in got for n in batch] == asked
        assert sum(stage.dropped for stage in execution.stats) == 0

    run(main())


def test_cancelling_drops_and_counts_by_choice() -> None:
    async def main() -> None:
        got: list[list[int]] = []
        asked: list[int] = []

        async def slow(n: int) -> int:
            await asyncio.sleep(0)
            return n

        flow = Flow.of(endless(asked)).map(slow, parallelism=3).batch(7)
        execution = flow.to(got.append, on_cancel="drop")
        await cancelled_in_the_middle(execution, lambda: len(got) >= 5)
        assert execution.outcome == Outcome.DROPPED
        conserved(execution.stats)
        done = sum(map(len, got))
        assert done < len(asked)
        *_, batches = dropped = [stage.dropped for stage in execution.stats]  # the last counts batches
        assert done + sum(dropped[:-1]) + 7 * batches == len(asked)

    run(main())


def test_a_second_cancellation_ends_the_draining() -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def stuck(n: int) -> None:
            started.set()
            await asyncio.get_running_loop().create_future()

        execution = Flow.of(range(10)).to(stuck)
        task = asyncio.create_task(execution.run())
        await started.wait()
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and execution.outcome == Outcome.DROPPED
        assert sum(stage.dropped for stage in execution.stats) == 10

    run(main())


def test_draining_does_not_wait_for_a_source_that_is_silent() -> None:
    async def main() -> None:
        got: list[int] = []

        async def source() -> AsyncIterator[int]:
            yield 1
            await asyncio.get_running_loop().create_future()

        execution = Flow.of(source()).to(got.append)
        await cancelled_in_the_middle(execution, lambda: got)
        assert execution.outcome == Outcome.DRAINED

        inlet = Inlet[int]()
        execution = Flow.of(inlet).to(got.append)
        await inlet.put(2)
        await cancelled_in_the_middle(execution, lambda: got == [1, 2])
        assert execution.outcome == Outcome.DRAINED
        with pytest.raises(FlowClosed):
            inlet.offer(3)

    run(main())


PROGRAM = """
import asyncio, itertools, sys
from sage_live.flow import Flow
seen, got = [], []
def source():
    for n in itertools.count():
        seen.append(n)
        yield n
async def work(n):
    await asyncio.sleep(0.001)
    return n
execution = Flow.of(source()).map(work, parallelism=8).to(got.append, on_cancel=sys.argv[1])
async def main():
    task = asyncio.create_task(execution.run())
    while len(got) < 20:
        await asyncio.sleep(0.001)
    print("ready", flush=True)
    await task
try:
    asyncio.run(main())
except KeyboardInterrupt:
    lost = sum(stage.dropped for stage in execution.stats)
    print(execution.outcome, len(seen) == len(got) + lost, lost > 0)
"""


@pytest.mark.parametrize(("choice", "told"), [("drain", "drained True False"), ("drop", "dropped True True")])
def test_ctrl_c_drains_or_drops(choice: str, told: str) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, choice], stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        out, _ = program.communicate(timeout=20)
        assert out.strip() == told
    finally:
        program.kill()
        program.communicate()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda flow: flow.map(str, queue_limit=0), "queue_limit: expected at least 1, got 0"),
        (lambda flow: flow.map(str, parallelism=0), "parallelism: expected at least 1"),
        (lambda flow: flow.map(3), "map: expected a function, got int"),
        (lambda flow: flow.batch(0), "max_size: expected at least 1"),
        (lambda flow: flow.batch(1, max_wait_s=-1), "max_wait_s: expected 0 or more, got -1"),
        (lambda flow: flow.window(tumbling(1), int, {}), "aggregates: expected at least one"),
        (lambda flow: flow.window(tumbling(1), int, {"n": Count()}, lateness_s=-1), "lateness_s: expected 0 or more"),
        (lambda flow: flow.to(print, on_cancel="ask"), "on_cancel: expected drain or drop, got 'ask'"),
        (lambda flow: tumbling(0), "windows: expected at least 1 ns"),
        (lambda flow: sliding(1, 2), "windows: every_s=2 leaves gaps"),
        (lambda flow: Quantile(1.5, float), "q: expected 0 to 1, got 1.5"),
        (lambda flow: Inlet("drop"), "full: expected block or reject, got 'drop'"),
        (lambda flow: Flow.of(5).to(print), "source: expected an iterable, an async iterable or an Inlet, got int"),
    ],
)
def test_mistakes_are_told_before_anything_runs(wrong: Callable[[Flow[int]], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong(Flow.of([1]))
