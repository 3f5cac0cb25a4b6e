"""Windowed aggregation against pandas: random event times, out of order within the lateness and beyond it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.units import SECOND
from sage_live.flow import (
    Count,
    Flow,
    FlowError,
    Inlet,
    Max,
    Mean,
    Min,
    Outcome,
    Quantile,
    Sum,
    Window,
    Windows,
    sliding,
    tumbling,
)
from sage_live.flow.run import FlowReport

Item = tuple[int, str, float]
"""Event time in ns, key, value."""


def value(item: Item) -> float:
    return item[2]


AGGREGATES = {
    "count": Count(),
    "sum": Sum(value),
    "mean": Mean(value),
    "min": Min(value),
    "max": Max(value),
    "p90": Quantile(0.9, value),
}
COLUMNS = list(AGGREGATES)

values = st.one_of(st.floats(-1e6, 1e6), st.integers(-5, 5).map(float))
times = st.integers(-20 * SECOND, 20 * SECOND)
items = st.lists(st.tuples(times, st.sampled_from("ab"), values), max_size=60)


def windowed(given_items: list[Item], windows: Windows, **options: Any) -> tuple[list[Window], FlowReport]:
    got: list[Window] = []
    flow = Flow.of(given_items).window(windows, lambda item: item[0], AGGREGATES, **options)
    return got, asyncio.run(flow.to(got.append).run())


def as_frame(got: list[Window]) -> pd.DataFrame:
    rows = [[window.start, window.key, *window.values.values()] for window in got]
    return pd.DataFrame(rows, columns=["start", "key", *COLUMNS]).set_index(["key", "start"]).sort_index()


def same(got: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(got.index) == list(expected.index)
    np.testing.assert_allclose(got[COLUMNS].to_numpy(float), expected[COLUMNS].to_numpy(float), rtol=1e-9, atol=1e-6)


def aggregated(groups: Any) -> pd.DataFrame:
    """The same aggregates by pandas."""
    column = groups["value"]
    frame = pd.DataFrame(
        {"count": column.size(), "sum": column.sum(), "mean": column.mean(), "min": column.min(), "max": column.max()}
    )
    frame["p90"] = column.quantile(0.9)
    return frame


def tumbling_by_pandas(rows: list[Item], size_s: float) -> pd.DataFrame:
    """``resample``, of each key; without the empty windows."""
    frames = []
    for key in sorted({row[1] for row in rows}):
        mine = [row for row in rows if row[1] == key]
        index = pd.to_datetime([row[0] for row in mine])
        frame = pd.DataFrame({"value": [row[2] for row in mine]}, index=index)
        told = aggregated(frame.resample(pd.Timedelta(round(size_s * SECOND), "ns"), origin="epoch"))
        told = told[told["count"] > 0]
        told.index = pd.MultiIndex.from_product([[key], told.index.as_unit("ns").asi8], names=["key", "start"])
        frames.append(told)
    return pd.concat(frames)


@given(items, st.sampled_from([0.7, 1.0, 6.0]))
def test_tumbling_windows_are_pandas_resample(rows: list[Item], size_s: float) -> None:
    got, report = windowed(rows, tumbling(size_s), key=lambda item: item[1], lateness_s=40.0)
    assert report.stages[1].late == 0
    if rows:
        same(as_frame(got), tumbling_by_pandas(rows, size_s))
    else:
        assert got == []


@given(items, st.sampled_from([(2.0, 1.0), (3.0, 0.5), (5.0, 2.0), (1.0, 1.0)]))
def test_sliding_windows_are_pandas_rolling(rows: list[Item], shape: tuple[float, float]) -> None:
    """A row without a value at each end: what ``rolling`` says there is of the window that ends there."""
    size_s, every_s = shape
    size, every = round(size_s * SECOND), round(every_s * SECOND)
    got, report = windowed(rows, sliding(size_s, every_s), lateness_s=40.0)
    assert report.stages[1].late == 0
    if not rows:
        assert got == []
        return
    first, last = min(row[0] for row in rows), max(row[0] for row in rows)
    ends = [start + size for start in range((first - size) // every * every, last + every, every)]
    marked = [(row[0], row[2]) for row in rows] + [(end, np.nan) for end in ends]
    marked.sort(key=lambda row: row[0])
    frame = pd.DataFrame({"value": [row[1] for row in marked]}, index=pd.to_datetime([row[0] for row in marked]))
    rolling = frame["value"].rolling(pd.Timedelta(size, "ns"), min_periods=1, closed="left")
    expected = pd.DataFrame(
        {
            "count": rolling.count(),
            "sum": rolling.sum(),
            "mean": rolling.mean(),
            "min": rolling.min(),
            "max": rolling.max(),
            "p90": rolling.quantile(0.9),
        }
    )
    expected = expected[frame["value"].isna().to_numpy()].groupby(level=0).first()
    expected = expected[expected["count"] > 0]
    starts = expected.index.as_unit("ns").asi8 - size
    expected.index = pd.MultiIndex.from_product([[None], starts], names=["key", "start"])
    mine = as_frame(got)
    assert [start for _, start in mine.index] == list(starts)
    np.testing.assert_allclose(mine[COLUMNS].to_numpy(float), expected[COLUMNS].to_numpy(float), rtol=1e-7, atol=1e-4)


@given(items, st.floats(0, 15), st.sampled_from([0.7, 1.0, 6.0]))
def test_late_items_are_counted_told_and_left_out(rows: list[Item], lateness_s: float, size_s: float) -> None:
    """Which are late is worked out with pandas: the running maximum of event times against the end of the window."""
    late: list[Item] = []
    got, report = windowed(rows, tumbling(size_s), key=lambda item: item[1], lateness_s=lateness_s, on_late=late.append)
    stats = report.stages[1]
    assert stats.late == len(late)
    assert stats.late + sum(window.values["count"] for window in got) == stats.items_in == len(rows)
    if not rows:
        return
    at = pd.Series([row[0] for row in rows], dtype="int64")
    size = round(size_s * SECOND)
    beyond = at // size * size + size <= at.cummax() - round(lateness_s * SECOND)
    assert late == [row for row, is_late in zip(rows, beyond, strict=True) if is_late]
    kept = [row for row, is_late in zip(rows, beyond, strict=True) if not is_late]
    same(as_frame(got), tumbling_by_pandas(kept, size_s))  # the latest item is never late


@given(items.filter(bool), st.randoms(use_true_random=False))
def test_order_within_the_lateness_does_not_matter(rows: list[Item], random: Any) -> None:
    in_order = sorted(rows)
    jittered = sorted(in_order, key=lambda item: item[0] + random.uniform(0, 2 * SECOND))
    one, first = windowed(in_order, tumbling(1.0), key=lambda item: item[1])
    other, second = windowed(jittered, tumbling(1.0), key=lambda item: item[1], lateness_s=2.0)
    assert first.stages[1].late == second.stages[1].late == 0
    same(as_frame(other), as_frame(one))
    assert [window.start for window in other] == sorted(window.start for window in other)


def test_a_window_leaves_when_the_watermark_reaches_its_end() -> None:
    async def main() -> None:
        inlet, got = Inlet[int](), list[tuple[int, int, float]]()
        flow = Flow.of(inlet).window(tumbling(10e-9), lambda at: at, {"n": Count()}, lateness_s=2e-9)
        execution = flow.to(lambda window: got.append((window.start, window.end, window.values["n"])))
        task = asyncio.create_task(execution.run())
        left: list[int] = []
        for at in (0, 9, 10, 11, 8, 12, 21, 22, 35):
            await inlet.put(at)
            for _ in range(20):  # turns of the loop, more than there are stages
                await asyncio.sleep(0)
            left.append(len(got))
        assert left == [0, 0, 0, 0, 0, 1, 1, 2, 3]  # 12 is 2 past the end of the first
        inlet.close()
        await task
        assert got == [(0, 10, 3), (10, 20, 3), (20, 30, 2), (30, 40, 1)]

    asyncio.run(main())


def test_values_that_are_nan_are_left_out() -> None:
    nan = float("nan")
    got, _ = windowed([(0, "a", nan), (1, "a", 2.0), (SECOND, "a", nan)], tumbling(1.0))
    full, empty = (dict(window.values) for window in got)
    assert full == {"count": 2, "sum": 2, "mean": 2, "min": 2, "max": 2, "p90": 2}
    assert empty["count"] == 1 and empty["sum"] == 0
    assert all(np.isnan(empty[name]) for name in ("mean", "min", "max", "p90"))


def test_an_event_time_that_is_no_whole_number_is_an_error() -> None:
    with pytest.raises(FlowError, match=r"time_of: expected a whole number of nanoseconds"):
        windowed([(1.5, "a", 0.0)], tumbling(1.0))  # type: ignore[list-item]


def test_open_windows_are_passed_on_when_draining_and_counted_when_dropped() -> None:
    async def cancelled(choice: Any) -> tuple[list[Window], Any]:
        got: list[Window] = []

        async def source() -> Any:
            for at in range(3):
                yield (at, "ab"[at % 2], 1.0)
            await asyncio.get_running_loop().create_future()

        flow = Flow.of(source()).window(tumbling(1.0), lambda item: item[0], {"n": Count()}, key=lambda item: item[1])
        execution = flow.to(got.append, on_cancel=choice)
        task = asyncio.create_task(execution.run())
        async with asyncio.timeout(10):
            while execution.stats[1].items_in < 3:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return got, execution

    got, execution = asyncio.run(cancelled("drain"))
    assert execution.outcome == Outcome.DRAINED
    assert {(window.key, window.values["n"]) for window in got} == {("a", 2), ("b", 1)}
    got, execution = asyncio.run(cancelled("drop"))
    assert got == []
    assert execution.stats[1].windows_dropped == 2
