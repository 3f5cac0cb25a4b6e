"""Writing a trace file: complete or absent, never half. The bytes depend on rows and metadata alone."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from sage_bench.traces.schema import TRACE
from sage_core.errors import DataError, OutputError

ROW_GROUP = 65_536


class TraceWriter:
    """A context in which tables of schema ``TRACE`` are appended; the file appears under its name on success only.

    metadata: keys of ``traces.schema``. Raises OutputError when the file exists (unless ``overwrite``) or cannot be
    written, DataError when nothing was.
    """

    def __init__(self, path: str | Path, metadata: dict[str, str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.rows = 0
        self._held: list[Any] = []
        if self.path.exists() and not overwrite:
            raise OutputError(f"{path}: exists already; choose another name, or overwrite it with --force")
        self._part = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._part, TRACE.with_metadata(metadata), compression="zstd")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error

    def write(self, table: Any) -> None:
        """Append rows; they go to disk in row groups of at least ``ROW_GROUP``."""
        self._held.append(table.cast(TRACE))
        self.rows += table.num_rows
        if sum(held.num_rows for held in self._held) >= ROW_GROUP:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None and self.rows:
                self._flush()
            self._writer.close()
            if error is None and self.rows:
                os.replace(self._part, self.path)
        except OutputError:
            raise
        except OSError as failure:
            raise OutputError(
                f"{self.path}: writing stopped ({failure.strerror or failure}); free some space"
            ) from failure
        finally:
            self._part.unlink(missing_ok=True)
        if error is None and not self.rows:
            raise DataError(f"{self.path}: not written, there are no requests to write; expected at least one")

    def _flush(self) -> None:
        if self._held:
            try:
                self._writer.write_table(pa.concat_tables(self._held))
            except OSError as error:
                raise OutputError(
                    f"{self.path}: writing stopped ({error.strerror or error}); free some space"
                ) from error
            self._held.clear()
