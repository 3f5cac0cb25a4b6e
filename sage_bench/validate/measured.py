"""A measured run as files: one row per request with its instants, and the engine's state over time.

Rules: nothing is repaired. The first row that cannot be is an error with its number (counted from 0), its column, what
was expected and what to do. All instants of one file are seconds on one clock; which clock does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sage_bench.validate.compare import tpot_s
from sage_core.errors import DataError

Seconds: TypeAlias = NDArray[np.float64]
Arrivals: TypeAlias = Literal["queued", "arrival"]

ROUNDING_S: Final = 1e-6
"""Instants of one row may be out of order by so much: files are written with microseconds."""

SPAN_S_MAX: Final = 30 * 86_400.0
"""Longer than this is a mistake in the units."""

TOKENS_MAX: Final = 2**31 - 1

SERIES: Final = ("running", "waiting", "kv_cache_pct")
"""What a time series holds beside ``t``: sequences in the batch, sequences waiting, KV-cache usage in per cent."""

_INSTANTS: Final = ("arrival_s", "queued_s", "scheduled_s", "first_token_s", "last_token_s")
_TOKENS: Final = ("prompt_tokens", "output_tokens")
_LATENCIES: Final = ("ttft_ms", "tpot_ms", "e2e_ms")
_SETTINGS: Final = ("max_num_seqs", "max_num_batched_tokens", "kv_tokens", "tensor_parallel", "data_parallel")
_NAMES: Final = ("gpu", "model", "vllm_version")


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """Requests in the order of the file; every array is (n,).

    arrival_s: the client sent it. queued_s: the engine's core had it. first_token_s, last_token_s: the engine told them.
    priority: zeros where the file has no such column. settings: engine settings the file states, by column name.
    names: gpu, model and vllm_version where the file states them.
    """

    path: Path
    arrival_s: Seconds
    queued_s: Seconds
    first_token_s: Seconds
    last_token_s: Seconds
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    priority: NDArray[np.int64] | None
    settings: Mapping[str, int]
    names: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.queued_s)

    def start_s(self, arrivals: Arrivals) -> Seconds:
        """(n,) instants that latencies count from."""
        return self.queued_s if arrivals == "queued" else self.arrival_s

    def origin_s(self, arrivals: Arrivals) -> float:
        """Instant of the file's clock that is 0 in the simulation: the whole second before the first request."""
        return float(np.floor(self.start_s(arrivals).min()))


@dataclass(frozen=True, slots=True)
class MeasuredSeries:
    """The engine's state at ``t`` (seconds, on the clock of the requests), each array (n,); see :data:`SERIES`."""

    path: Path
    t: Seconds
    running: Seconds
    waiting: Seconds
    kv_cache_pct: Seconds


def read_run(path: Path) -> MeasuredRun:
    """The requests of a measured run. Raises :class:`DataError`."""
    file = _File(path, (*_INSTANTS, *_TOKENS))
    instants = {name: file.numbers(name, "a finite number of seconds") for name in _INSTANTS}
    tokens = {name: file.whole(name, 1, TOKENS_MAX) for name in _TOKENS}
    arrival_s = instants["arrival_s"]
    file.require(
        np.diff(arrival_s, prepend=-np.inf) >= 0,
        "arrival_s",
        arrival_s,
        "no less than the row before",
        "sort the rows by arrival_s",
    )
    order = ("arrival_s", "queued_s", "scheduled_s", "first_token_s", "last_token_s")
    for before, after in itertools.pairwise(order):
        file.require(
            instants[after] >= instants[before] - ROUNDING_S,
            after,
            instants[after],
            f"no less than {before} of the same row",
            "check which clock each column was read from",
        )
    span_s = instants["last_token_s"].max() - min(arrival_s.min(), instants["queued_s"].min())
    if span_s > SPAN_S_MAX:
        raise DataError(
            f"{path}: the run spans {span_s:,.0f} s; expected at most {SPAN_S_MAX:,.0f} s: instants are in seconds"
        )
    run = MeasuredRun(
        path,
        arrival_s,
        instants["queued_s"],
        instants["first_token_s"],
        instants["last_token_s"],
        tokens["prompt_tokens"],
        tokens["output_tokens"],
        file.whole("priority", 0, TOKENS_MAX) if file.has("priority") else None,
        {name: value for name in _SETTINGS if (value := file.setting(name)) is not None},
        {name: label for name in _NAMES if (label := file.label(name)) is not None},
    )
    _check_latencies(file, run)
    return run


def read_series(path: Path) -> MeasuredSeries:
    """The time series of a measured run. Raises :class:`DataError`."""
    file = _File(path, ("t", *SERIES))
    t = file.numbers("t", "a finite number of seconds")
    file.require(
        np.diff(t, prepend=-np.inf) > 0, "t", t, "more than the row before", "sort the rows by t and drop repeated ones"
    )
    columns = {}
    for name in SERIES:
        column = columns[name] = file.numbers(name, "a finite number from 0")
        highest = 100.0 if name == "kv_cache_pct" else np.inf
        file.require(
            (column >= 0) & (column <= highest),
            name,
            column,
            "0 to 100 (per cent)" if name == "kv_cache_pct" else "a number from 0",
        )
    return MeasuredSeries(path, t, **columns)


def check_series(series: MeasuredSeries, run: MeasuredRun, arrivals: Arrivals) -> list[str]:
    """Notes on the units of ``series``. Raises :class:`DataError`: none of it is of the time of ``run``."""
    first_s, last_s = float(run.start_s(arrivals).min()), float(run.last_token_s.max())
    if not ((series.t >= first_s) & (series.t <= last_s)).any():
        raise DataError(
            f"{series.path}: column t: expected instants of the run, from {first_s:.9g} to {last_s:.9g} s in {run.path}, found "
            f"{series.t[0]:.9g} to {series.t[-1]:.9g}; give both files the same clock, in seconds"
        )
    highest = float(series.kv_cache_pct.max())
    if 0 < highest <= 1:
        return [
            f"{series.path}: kv_cache_pct never exceeds 1 and is taken as per cent; if it is a share, multiply it by 100"
        ]
    return []


def _check_latencies(file: _File, run: MeasuredRun) -> None:
    """The file's own latencies, where it has them, must be those of its instants: else they count from elsewhere."""
    ours = {
        "ttft_ms": run.first_token_s - run.queued_s,
        "tpot_ms": tpot_s(run.first_token_s, run.last_token_s, run.output_tokens),
        "e2e_ms": run.last_token_s - run.queued_s,
    }
    for name in _LATENCIES:
        if file.has(name):
            theirs = file.numbers(name, "", nulls=True) / 1e3
            file.require(
                ~(np.abs(theirs - ours[name]) > 1e-3),  # true where either is not there
                name,
                theirs * 1e3,
                "the latency from queued_s that the row's instants give, within 1 ms",
                "remove the column, or repair the instants",
            )


class _File:
    """One Parquet file in memory."""

    def __init__(self, path: Path, required: tuple[str, ...]) -> None:
        self._path = path
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; expected a measured run in Parquet (docs/validate.md has the columns)"
            )
        try:
            self._table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: cannot be read as Parquet ({reason}); convert it, or fetch it again") from error
        missing = [name for name in required if not self.has(name)]
        if missing:
            raise DataError(
                f"{path}: no column {', '.join(missing)}; expected {', '.join(required)}, "
                f"found {', '.join(self._table.column_names)}; rename the columns (docs/validate.md)"
            )
        if not self._table.num_rows:
            raise DataError(f"{path}: has no rows; expected at least one")

    def has(self, name: str) -> bool:
        """Whether there is such a column."""
        return name in self._table.column_names

    def numbers(self, name: str, expected: str, *, nulls: bool = False) -> Seconds:
        """(n,) a numeric column; NaN for what is missing, if ``nulls`` may be."""
        column = self._table[name]
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            raise DataError(f"{self._path}: column {name}: expected numbers, found {column.type}; convert the column")
        values: Seconds = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
        if not nulls:
            self.require(np.isfinite(values), name, values, expected, "leave out requests that did not finish")
        return values

    def whole(self, name: str, least: int, most: int) -> NDArray[np.int64]:
        """(n,) a column of whole numbers from ``least`` to ``most``."""
        expected = f"a whole number from {least} to {most}"
        values = self.numbers(name, expected)
        self.require((values >= least) & (values <= most) & (values == np.floor(values)), name, values, expected)
        return values.astype(np.int64)

    def setting(self, name: str) -> int | None:
        """The one value of a column of settings; None where the file does not say."""
        if not self.has(name) or self._table[name].null_count == self._table.num_rows:
            return None
        values = self.whole(name, 1, TOKENS_MAX)
        self.require(values == values[0], name, values, f"{values[0]} as in row 0: one run has one setting")
        return int(values[0])

    def label(self, name: str) -> str | None:
        """The one value of a column of labels; None where the file does not say one."""
        if not self.has(name):
            return None
        if pa.types.is_nested(kind := self._table[name].type):
            raise DataError(f"{self._path}: column {name}: expected one label a row, found {kind}; convert the column")
        values = set(self._table[name].to_pylist()) - {None}
        return str(values.pop()) if len(values) == 1 else None

    def require(self, fits: NDArray[np.bool_], name: str, values: Any, expected: str, do: str = "") -> None:
        """Raise :class:`DataError` for the first row that does not fit."""
        if fits.all():
            return
        row = int(np.flatnonzero(~fits)[0])
        found = "nothing" if np.isnan(values[row]) else f"{values[row]:.9g}"
        raise DataError(
            f"{self._path}: row {row} (from 0), column {name}: expected {expected}, found {found}; "
            f"{do or 'repair or remove the row'}"
        )
