"""A trace file, read in batches and checked row by row.

Rules: nothing is repaired. The first row that breaks the schema stops the reading with its number (counted from 0), the
column, what was expected and what to do. A file of any length needs the memory of one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sage_bench.traces.blocks import (
    EXPECTED_IDS,
    EXPECTED_TYPE,
    RENUMBER,
    BadId,
    Blocks,
    block_tokens,
    is_block_lists,
    read_blocks,
)
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
    """What a scan of a window found: how much, when, which kinds, and the longest output of each kind.

    with_blocks: rows with block ids; 0 where they were not asked for.
    """

    rows: int
    first_s: float
    last_s: float
    rows_of: Mapping[str, int]
    output_tokens_max: Mapping[str, int]
    with_blocks: int


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
        self._has_prefix = "hash_ids" in schema.names
        if self._has_prefix:
            _check_type(self.path, "hash_ids", schema.field("hash_ids").type)
        # Without a stated length the blocks are of various lengths: only the first one says something.
        self.block_tokens = block_tokens(self.metadata.get("hash_block_tokens", ""))

    def rows(
        self, window_s: tuple[float, float] | None = None, *, prefix: bool = False, contents: bool = False
    ) -> Iterator[Rows]:
        """Checked rows in order, optionally those with ``window_s[0] <= arrival_s < window_s[1]``.

        prefix: check ``hash_ids`` and fill the column ``prefix`` from them. contents: fill ``contents`` too.
        Raises DataError at the first broken row. Rows after the window are not read.
        """
        columns = [*REQUIRED, *(["hash_ids"] if (prefix or contents) and self._has_prefix else [])]
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
            rows = self._checked(batch, first, last_s, contents)
            first, last_s = first + batch.num_rows, float(rows.arrival_s[-1])
            if window_s is None:
                yield rows
                continue
            start, stop = np.searchsorted(rows.arrival_s, window_s).tolist()
            if start < stop:
                yield rows.between(start, stop)
            if stop < len(rows.arrival_s):
                return

    def scan(self, window_s: tuple[float, float] | None = None, *, prefix: bool = False) -> Summary:
        """Check every row up to the end of the window, with ``prefix`` its ``hash_ids`` too, and say what the window
        holds."""
        counts = np.zeros(len(KINDS), np.int64)
        longest = np.zeros(len(KINDS), np.int64)
        first_s, last_s, with_blocks = 0.0, 0.0, 0
        for rows in self.rows(window_s, prefix=prefix):
            if not counts.any():
                first_s = float(rows.arrival_s[0])
            last_s = float(rows.arrival_s[-1])
            counts += np.bincount(rows.kind, minlength=len(KINDS))
            np.maximum.at(longest, rows.kind, rows.output_tokens)
            with_blocks += int(np.count_nonzero(rows.prefix))
        present = [k for k in range(len(KINDS)) if counts[k]]
        return Summary(
            int(counts.sum()),
            first_s,
            last_s,
            {KINDS[k]: int(counts[k]) for k in present},
            {KINDS[k]: int(longest[k]) for k in present},
            with_blocks,
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

    def _checked(self, batch: Any, first: int, last_s: float, with_contents: bool) -> Rows:
        column = {name: batch.column(name) for name in REQUIRED}
        for name in REQUIRED:
            if column[name].null_count:
                at = int(np.flatnonzero(column[name].is_null().to_numpy(zero_copy_only=False))[0])
                self._broken(first + at, name, None, "a value in every row")
        # Of integers beyond 2^53, which are out of range, the nearest float64 is as good.
        arrival_s = column["arrival_s"].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        # As they are until they are checked: not every uint64 is an int64.
        prompt = column["prompt_tokens"].to_numpy(zero_copy_only=False)
        output = column["output_tokens"].to_numpy(zero_copy_only=False)
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
        prompt, output = prompt.astype(np.int64), output.astype(np.int64)
        prefix = np.zeros(len(arrival_s), np.int64)
        contents = np.full(len(arrival_s), None, np.object_)
        if "hash_ids" in batch.schema.names:
            blocks = self._blocks(batch.column("hash_ids"), first)
            filled = np.diff(blocks.start) > 0
            prefix[filled] = blocks.ids[blocks.start[:-1][filled]] + 1
            if with_contents and self.block_tokens:
                self._fill_contents(contents, blocks, prompt)
        return Rows(first, arrival_s, prompt, output, kinds, prefix, contents)

    def _blocks(self, lists: Any, first: int) -> Blocks:
        try:
            return read_blocks(lists)
        except BadId as bad:
            self._broken(first + bad.row, "hash_ids", bad.found, EXPECTED_IDS, RENUMBER)

    def _fill_contents(self, contents: NDArray[np.object_], blocks: Blocks, prompt: NDArray[np.int64]) -> None:
        ids, tokens = blocks.ids.tolist(), self.block_tokens
        # The last block may be a part of one, and a part is not cached.
        stop = np.minimum(blocks.start[1:], blocks.start[:-1] + prompt // tokens).tolist()
        start = blocks.start.tolist()
        for at in np.flatnonzero(np.diff(blocks.start)).tolist():
            contents[at] = Contents(tokens, tuple(ids[start[at] : stop[at]]))

    def _require(self, fits: NDArray[np.bool_], first: int, column: str, values: Any, expected: str) -> None:
        if not fits.all():
            at = int(np.flatnonzero(~fits)[0])
            value = values[at]
            self._broken(first + at, column, value.as_py() if hasattr(value, "as_py") else value.item(), expected)

    def _broken(self, row: int, column: str, value: object, expected: str, do: str = "") -> NoReturn:
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
    elif column == "hash_ids":
        fits, expected = is_block_lists(found), EXPECTED_TYPE
    else:
        fits, expected = pa.types.is_integer(found), "int32 (tokens)"
    if not fits:
        raise DataError(f"{path}: column {column}: expected type {expected}, found {found}; convert the column")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
