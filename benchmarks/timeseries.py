"""Time-series windows: what an aggregated item costs, by items, width, overlap and keys; ``results/bench/timeseries.json``.

Count, mean and a 90 % quantile of each window, computed twice: item by item as the stream passes (``sage_live.flow``), and by
pandas over all items at once, which has the whole series in memory and answers at the end. Both must find the same, or
the benchmark fails. CPU time of this process, the best of the rounds; peak memory by tracemalloc in a round of its own. These
machines are noisy: compare figures of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sage_core.units import SECOND
from sage_live.flow import Aggregate, Count, Flow, Mean, Quantile, Window, sliding

OUT: Final = Path("results/bench/timeseries.json")
QUANTILE: Final = 0.9
AGREE: Final = 1e-9
"""Relative difference between both computations that is rounding."""


@dataclass(frozen=True, slots=True)
class Series:
    """items: in all. per_window: items of all keys in a window. overlap: windows that an item is in. keys: series side by side."""

    items: int
    per_window: int = 1_000
    overlap: int = 1
    keys: int = 1


def scenarios(items: int) -> list[Series]:
    """One thing varies at a time."""
    sizes = [Series(items // 10), Series(items)]
    widths = [Series(items, per_window=count) for count in (10, 100, 10_000)]
    overlaps = [Series(items, overlap=count) for count in (4, 16)]
    keys = [Series(items, keys=count) for count in (10, 100)]
    return [*sizes, *widths, *overlaps, *keys]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    figures: dict[str, Any] = {"load_average": os.getloadavg()[0], "rounds": options.rounds}
    figures["series"] = [measured(series, options.rounds) for series in scenarios(options.items)]
    figures["load_average_end"] = os.getloadavg()[0]
    Console(width=110).print(shown(figures["series"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


def measured(series: Series, rounds: int) -> dict[str, Any]:
    """CPU time an item of both, peak memory of both. SystemExit if they disagree."""
    rows = drawn(series)
    if not agree(as_frame(streamed(rows, series)), by_pandas(rows, series)):
        raise SystemExit(f"{series}: the stream and pandas found different windows; that is a defect")
    return {
        **asdict(series),
        "stream_us": 1e6 * cpu_s(lambda: streamed(rows, series), rounds) / series.items,
        "pandas_us": 1e6 * cpu_s(lambda: by_pandas(rows, series), rounds) / series.items,
        "stream_peak_bytes": peak_bytes(lambda: streamed_away(rows, series)),
        "pandas_peak_bytes": peak_bytes(lambda: by_pandas(rows, series)),
    }


def drawn(series: Series) -> pd.DataFrame:
    """Event times in ns, in order, one a millisecond on average; keys and values at random."""
    draw = np.random.Generator(np.random.PCG64(series.items))
    at = np.sort(draw.integers(0, series.items * SECOND // 1000, series.items))
    return pd.DataFrame(
        {"at": at, "key": draw.integers(0, series.keys, series.items), "value": draw.standard_normal(series.items)}
    )


def streamed(rows: pd.DataFrame, series: Series, sink: Callable[[Window], object] | None = None) -> list[Window]:
    """Through a flow, one item after the other."""
    got: list[Window] = []
    size_s = series.per_window / 1000
    aggregates: dict[str, Aggregate[Any]] = {
        "count": Count(),
        "mean": Mean(value),
        "quantile": Quantile(QUANTILE, value),
    }
    flow = Flow.of(rows.itertuples(index=False, name=None)).window(
        sliding(size_s, size_s / series.overlap), event_time, aggregates, key=key
    )
    asyncio.run(flow.to(sink or got.append).run())
    return got


def streamed_away(rows: pd.DataFrame, series: Series) -> None:
    """The same, and no window is kept: what the stream itself needs."""
    streamed(rows, series, sink=lambda window: None)


def by_pandas(rows: pd.DataFrame, series: Series) -> pd.DataFrame:
    """The same windows, all at once: an item is copied into each window that it is in."""
    every = series.per_window * SECOND // 1000 // series.overlap
    parts = [rows.assign(start=(rows["at"] // every - shift) * every) for shift in range(series.overlap)]
    grouped = pd.concat(parts).groupby(["start", "key"])["value"]
    return pd.DataFrame({"count": grouped.count(), "mean": grouped.mean(), "quantile": grouped.quantile(QUANTILE)})


def as_frame(windows: list[Window]) -> pd.DataFrame:
    """Indexed as :func:`by_pandas`."""
    rows = [{"start": each.start, "key": each.key, **each.values} for each in windows]
    return pd.DataFrame(rows).set_index(["start", "key"]).sort_index()


def agree(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    return one.index.equals(other.index) and bool(
        np.allclose(one[other.columns].to_numpy(float), other.to_numpy(float), rtol=AGREE, atol=AGREE)
    )


def cpu_s(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def event_time(item: tuple[int, int, float]) -> int:
    return item[0]


def key(item: tuple[int, int, float]) -> int:
    return item[1]


def value(item: tuple[int, int, float]) -> float:
    return item[2]


def shown(series: list[dict[str, Any]]) -> Table:
    columns = ("items", "a window", "overlap", "keys", "stream, us/item", "pandas, us/item", "stream, MB", "pandas, MB")
    table = Table(*columns, box=SIMPLE, title="windowed count, mean and quantile: CPU time an item, peak memory")
    for each in series:
        table.add_row(
            *(f"{each[name]:,}" for name in ("items", "per_window", "overlap", "keys")),
            *(f"{each[name]:.2f}" for name in ("stream_us", "pandas_us")),
            *(f"{each[name] / 1e6:.1f}" for name in ("stream_peak_bytes", "pandas_peak_bytes")),
        )
    return table


if __name__ == "__main__":
    main()
