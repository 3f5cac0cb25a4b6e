"""Rows to Parquet as a run goes: bounded memory, and a readable file whatever happens to the run.

Rows wait, as tuples here or as columns in the native recorder, until ``buffer_rows`` of them make a row group; ten
million requests therefore need the memory of one buffer. A Parquet file without its footer cannot be read, so whoever
opens a writer closes it in ``finally`` (or uses ``with``): after an exception or Ctrl-C the rows so far are a valid
file. The same rows give the same bytes.

How values are encoded was chosen by measurement: on the standard workload it takes two fifths of the CPU time of zstd
with pyarrow's defaults and two thirds of the space. Whole numbers are instants and counts that differ little from row
to row, so their differences are packed; only labels get a dictionary; statistics are for the columns that grow with the
file, where they let a reader skip row groups; a digest is noise and stays as it is.

An ``OSError`` becomes an :class:`OutputError` that names the file. The writer then gives up on that file, and closing
it stays silent, so the first error is the one that is seen.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

from sage_bench.results.schema import STEPS
from sage_core.errors import OutputError

BUFFER_ROWS: Final = 16_384
"""Rows of a row group: about 12 MB of Python objects for the widest table."""

BUFFER_BYTES: Final = 16 * 2**20
"""Encoded events of a row group of the log."""

ZSTD_LEVEL: Final = 1

GROWING: Final = ("request", "scheduled_ns", "arrived_ns", "ended_ns", "task", "queued_ns", "at_ns", "step", "now")
"""Columns that have statistics."""


class TableFile:
    """One Parquet file, written a row group at a time.

    path: its folder is made if need be; an existing file is replaced. schema: one of :mod:`sage_bench.results.schema`.
    Raises :class:`OutputError`.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self._file: Any = None
        self._guarded(self._open)

    def write(self, table: pa.Table) -> None:
        """One row group, unless the file has been given up or closed."""
        if self._file is not None:
            self._guarded(lambda: self._file.write_table(table, row_group_size=table.num_rows))

    def close(self) -> None:
        """Write the footer; again is harmless."""
        if self._file is not None:
            file, self._file = self._file, None
            self._guarded(file.close)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = pq.ParquetWriter(self.path, self.schema, **_encoding(self.schema))

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            self._file = None
            raise output_error(self.path, error) from error


class TableWriter:
    """A file that takes its rows one by one. ``path``, ``schema`` and errors as for :class:`TableFile`."""

    def __init__(self, path: Path, schema: pa.Schema, *, buffer_rows: int = BUFFER_ROWS) -> None:
        self.rows = 0  # appended so far
        self._buffer_rows = buffer_rows
        self._buffer: list[tuple[Any, ...]] = []
        self._file = TableFile(path, schema)

    def append(self, row: tuple[Any, ...]) -> None:
        """One row: a value for each column of the schema, in its order; ``None`` is null."""
        self.rows += 1
        self._buffer.append(row)
        if len(self._buffer) >= self._buffer_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered as a row group."""
        if self._buffer:
            table = columns_of(self._buffer, self._file.schema)
            self._buffer = []
            self._file.write(table)

    def close(self) -> None:
        """Write the rest and the footer; again is harmless."""
        self.flush()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StepWriter:
    """``steps.parquet``: the log, one row per step. ``path`` as in :class:`TableWriter`."""

    def __init__(self, path: Path, *, buffer_rows: int = BUFFER_ROWS) -> None:
        self._table = TableWriter(path, STEPS, buffer_rows=buffer_rows)
        self._bytes = 0
        self.steps = 0

    def __call__(self, now: int, events: bytes, digest: bytes) -> None:
        """The next step. events: MessagePack array of tagged events. digest: 16 bytes, of its commands, chained."""
        self._table.append((self.steps, now, events, digest))
        self.steps += 1
        self._bytes += len(events)
        if self._bytes > BUFFER_BYTES:
            self._table.flush()
            self._bytes = 0

    def close(self) -> None:
        """Write the rest and the footer; again is harmless."""
        self._table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def columns_of(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """``rows`` as a table of ``schema``."""
    columns = zip(*rows, strict=True)
    return pa.Table.from_arrays(
        [_array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def output_error(path: Path, error: OSError) -> OutputError:
    """What to tell the user about a file that cannot be written."""
    do = {
        errno.ENOSPC: "free some space there, or choose another output folder",
        errno.EDQUOT: "free some of your quota, or choose another output folder",
        errno.EACCES: "make the folder writable, or choose another output folder",
        errno.EFBIG: "raise the file size limit (ulimit -f), or choose another output folder",
        errno.EROFS: "choose an output folder on a writable file system",
    }.get(error.errno or 0, "check the path, or choose another output folder")
    why = os.strerror(error.errno) if error.errno else str(error)
    return OutputError(f"{path}: cannot be written: {why}; {do}")


def flag_outside(path: Path, first_ns: int, end_ns: int) -> None:
    """Set ``warmup`` of ``requests.parquet`` anew: of all that was scheduled before ``first_ns`` or from ``end_ns`` on. Who writes the rows
    of a live run does not know yet when its load begins. OutputError; no file, nothing to flag."""
    if not path.exists():
        return
    table = pq.read_table(path)
    at = table["scheduled_ns"].to_numpy()
    flags = pa.array(~((first_ns <= at) & (at < end_ns)))
    file = TableFile(path, table.schema)
    try:
        named = table.set_column(table.schema.get_field_index("warmup"), table.schema.field("warmup"), flags)
        for first in range(0, named.num_rows, BUFFER_ROWS):
            file.write(named.slice(first, BUFFER_ROWS))
    finally:
        file.close()


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """Arguments of ``ParquetWriter``; the module says why these."""
    labels = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    noise = {field.name for field in schema if pa.types.is_fixed_size_binary(field.type)}
    compressed = [field.name for field in schema if field.name not in noise]
    return {
        "use_dictionary": labels or False,
        "column_encoding": {field.name: "DELTA_BINARY_PACKED" for field in schema if pa.types.is_integer(field.type)},
        "compression": {field.name: "none" if field.name in noise else "zstd" for field in schema},
        "compression_level": dict.fromkeys(compressed, ZSTD_LEVEL),
        "write_statistics": [field.name for field in schema if field.name in GROWING] or False,
    }


def _array(column: tuple[Any, ...], kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        # Encoding after the fact is many times faster than building a dictionary array value by value.
        return pa.array(column, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(column, kind)
