"""A trace file, read in batches and checked row by row.

Rules: nothing is repaired. The first row that breaks the schema stops the reading with its number (counted from 0), the
column, what was expected and what to do. A file of any length needs the memory of one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sage_bench.traces.schema import KINDS, REQUIRED
from sage_core.errors import ConfigError, DataError
from sage_core.load import Contents

BATCH_ROWS = 65_536
ARRIVAL_S_MAX = 9.0e9  # int64 nanoseconds end at 292 years


class Rows(NamedTuple):
    """Consecutive rows of a trace as columns; ``first`` is the number of the first one in the file."""

    first: int
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    kind: NDArray[np.int64]  # index into schema.KINDS
    prefix: NDArray[np.int64]  # first prefix block + 1; 0 = none, or not asked for
    contents: NDArray[np.object_]  # Contents; None where no blocks are stated, or not asked for

    def between(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` of these."""
        return Rows(
            self.first + start,
            self.arrival_s[start:stop],
            self.prompt_tokens[start:stop],
            self.output_tokens[start:stop],
            self.kind[start:stop],
            self.prefix[start:stop],
            self.contents[start:stop],
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """What a scan of a window found: how much, when, which kinds, and the longest output of each kind."""

    rows: int
    first_s: float
    last_s: float
    rows_of: Mapping[str, int]
    output_tokens_max: Mapping[str, int]


class Trace:
    """A trace file that exists, is Parquet and has the columns of ``traces.schema``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(
                f"{path}: no such trace file; expected a Parquet file: make one with `sage trace import` from a public "
                "trace, or with `sage trace synth`"
            )
        try:
            self._file = pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: not a Parquet file ({_first_line(error)}); convert CSV or JSONL with `sage trace import`"
            ) from error
        schema = self._file.schema_arrow
        for column in REQUIRED:
            if column not in schema.names:
                raise DataError(
                    f"{path}: column {column} is missing; expected {', '.join(REQUIRED)}, found {', '.join(schema.names)}; "
                    "rename the columns, or convert with `sage trace import csv --columns`"
                )
            _check_type(self.path, column, schema.field(column).type)
        if self._file.metadata.num_rows == 0:
            raise DataError(f"{path}: the trace has zero rows; expected at least one request; import it again")
        self.metadata = {
            key.decode(): value.decode() for key, value in (schema.metadata or {}).items() if key != b"pandas"
        }
        self._has_prefix = "hash_ids" in schema.names and pa.types.is_list(schema.field("hash_ids").type)
        # Without a stated length the blocks are of various lengths: only the first one says something.
        self._block_tokens = self._stated_block_tokens() if self._has_prefix else 0

    def rows(self, window_s: tuple[float, float] | None = None, *, prefix: bool = False) -> Iterator[Rows]:
        """Checked rows in order, optionally those with ``window_s[0] <= arrival_s < window_s[1]``.

        prefix: fill the columns ``prefix`` and ``contents`` from ``hash_ids``.
        Raises DataError at the first broken row. Rows after the window are not read.
        """
        columns = [*REQUIRED, *(["hash_ids"] if prefix and self._has_prefix else [])]
        first, last_s = 0, 0.0
        batches = self._file.iter_batches(batch_size=BATCH_ROWS, columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{self.path}: cannot be read beyond row {first} ({_first_line(error)}); the file is damaged: fetch or "
                    "import it again"
                ) from error
            if batch is None:
                return
            if batch.num_rows == 0:
                continue
            rows = self._checked(batch, first, last_s)
            first, last_s = first + batch.num_rows, float(rows.arrival_s[-1])
            if window_s is None:
                yield rows
                continue
            start, stop = np.searchsorted(rows.arrival_s, window_s).tolist()
            if start < stop:
                yield rows.between(start, stop)
            if stop < len(rows.arrival_s):
                return

    def scan(self, window_s: tuple[float, float] | None = None) -> Summary:
        """Check every row up to the end of the window and say what the window holds."""
        counts = np.zeros(len(KINDS), np.int64)
        longest = np.zeros(len(KINDS), np.int64)
        first_s = last_s = 0.0
        for rows in self.rows(window_s):
            if not counts.any():
                first_s = float(rows.arrival_s[0])
            last_s = float(rows.arrival_s[-1])
            counts += np.bincount(rows.kind, minlength=len(KINDS))
            np.maximum.at(longest, rows.kind, rows.output_tokens)
        present = [k for k in range(len(KINDS)) if counts[k]]
        return Summary(
            int(counts.sum()),
            first_s,
            last_s,
            {KINDS[k]: int(counts[k]) for k in present},
            {KINDS[k]: int(longest[k]) for k in present},
        )

    def sha256(self) -> str:
        """Checksum of the file, hexadecimal."""
        return file_sha256(self.path)

    @staticmethod
    def kind_code(kind: str) -> int:
        """Value of the column ``kind`` of :class:`Rows` for a kind's name."""
        if kind not in KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        return KINDS.index(kind)

    def _checked(self, batch: Any, first: int, last_s: float) -> Rows:
        column = {name: batch.column(name) for name in REQUIRED}
        for name in REQUIRED:
            if column[name].null_count:
                at = int(np.flatnonzero(column[name].is_null().to_numpy(zero_copy_only=False))[0])
                self._broken(first + at, name, None, "a value in every row")
        arrival_s = column["arrival_s"].cast(pa.float64()).to_numpy(zero_copy_only=False)
        prompt = column["prompt_tokens"].cast(pa.int64()).to_numpy(zero_copy_only=False)
        output = column["output_tokens"].cast(pa.int64()).to_numpy(zero_copy_only=False)
        kind = pc.index_in(column["kind"].cast(pa.string()), value_set=pa.array(KINDS))
        self._require(
            kind.is_valid().to_numpy(zero_copy_only=False), first, "kind", column["kind"], f"one of {', '.join(KINDS)}"
        )
        kinds = kind.cast(pa.int64()).to_numpy(zero_copy_only=False)
        in_range = (arrival_s >= 0) & (arrival_s <= ARRIVAL_S_MAX)  # false for NaN
        self._require(in_range, first, "arrival_s", arrival_s, "a finite number of seconds of at least 0")
        previous = np.concatenate(([last_s], arrival_s[:-1]))
        if not np.all(arrival_s >= previous):
            at = int(np.flatnonzero(arrival_s < previous)[0])
            expected = f"no less than the row before ({previous[at]!s})"
            self._broken(first + at, "arrival_s", arrival_s[at], expected, "sort the rows by arrival_s")
        self._require((prompt >= 1) & (prompt < 2**31), first, "prompt_tokens", prompt, "a token count of at least 1")
        embedding = kinds == KINDS.index("embedding")
        self._require(~embedding | (output == 0), first, "output_tokens", output, "0 for an embedding")
        generated = embedding | ((output >= 1) & (output < 2**31))
        self._require(generated, first, "output_tokens", output, "at least 1 for chat and generation")
        prefix = np.zeros(len(arrival_s), np.int64)
        if "hash_ids" in batch.schema.names:
            prefix = _first_blocks(batch.column("hash_ids")) + 1
            self._require(prefix >= 0, first, "hash_ids", prefix - 1, "block ids of at least 0")
        contents = np.full(len(arrival_s), None, np.object_)
        if "hash_ids" in batch.schema.names and self._block_tokens:
            self._fill_contents(contents, batch.column("hash_ids"), prompt, first)
        return Rows(first, arrival_s, prompt, output, kinds, prefix, contents)

    def _stated_block_tokens(self) -> int:
        stated = self.metadata.get("hash_block_tokens", "")
        return int(stated) if stated.isdigit() else 0

    def _fill_contents(self, contents: NDArray[np.object_], lists: Any, prompt: NDArray[np.int64], first: int) -> None:
        tokens = self._block_tokens
        for at, ids in enumerate(lists.to_pylist()):
            if ids:
                if min(ids) < 0:
                    self._broken(first + at, "hash_ids", min(ids), "block ids of at least 0")
                # The last block may be a part of one, and a part is not cached.
                contents[at] = Contents(tokens, tuple(ids[: int(prompt[at]) // tokens]))

    def _require(self, fits: NDArray[np.bool_], first: int, column: str, values: Any, expected: str) -> None:
        if not fits.all():
            at = int(np.flatnonzero(~fits)[0])
            value = values[at]
            self._broken(first + at, column, value.as_py() if hasattr(value, "as_py") else value.item(), expected)

    def _broken(self, row: int, column: str, value: object, expected: str, do: str = "") -> None:
        advice = do or "repair the row, or import the source again with `sage trace import --skip-bad`"
        found = "nothing" if value is None else f"{value!r}" if isinstance(value, str) else f"{value}"
        raise DataError(
            f"{self.path}: row {row} (from 0), column {column}: expected {expected}, found {found}; {advice}"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_type(path: Path, column: str, found: Any) -> None:
    if column == "kind":
        fits, expected = pa.types.is_string(found) or pa.types.is_large_string(found), "string"
        if pa.types.is_dictionary(found):
            fits = pa.types.is_string(found.value_type) or pa.types.is_large_string(found.value_type)
    elif column == "arrival_s":
        fits, expected = pa.types.is_floating(found) or pa.types.is_integer(found), "float64 (seconds)"
    else:
        fits, expected = pa.types.is_integer(found), "int32 (tokens)"
    if not fits:
        raise DataError(f"{path}: column {column}: expected type {expected}, found {found}; convert the column")


def _first_blocks(lists: Any) -> NDArray[np.int64]:
    """(n,) first id of each list; -1 where the list is empty or null, less where the id is negative."""
    offsets = lists.offsets.to_numpy(zero_copy_only=False)
    filled = (np.diff(offsets) > 0) & lists.is_valid().to_numpy(zero_copy_only=False)
    first = np.full(len(lists), -1, np.int64)
    if filled.any():
        values = lists.values.to_numpy(zero_copy_only=False)
        heads = values[offsets[:-1][filled]].astype(np.int64)
        first[filled] = np.where(heads < 0, heads - 1, heads)
    return first


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
