"""From a public trace format to the trace schema, with provenance.

Nothing is lost silently. A broken line stops the import with its number, what was expected and what to do; with
``skip_bad`` it is left out and counted, and the count is written into the file. Lines out of order are sorted (stably)
and counted. Arrival counts from the earliest line, in whole nanoseconds until the very end.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sage_bench.traces.formats import BadLine, Format, Record, impossible
from sage_bench.traces.reader import file_sha256
from sage_bench.traces.schema import KINDS, TRACE
from sage_bench.traces.writer import TraceWriter
from sage_core.errors import DataError
from sage_core.units import SECOND

VERSION = "1"
MESSAGES_MAX = 5


@dataclass(frozen=True, slots=True)
class Report:
    """What an import did. ``skipped_lines`` holds the first few messages."""

    rows: int
    rows_skipped: int
    rows_reordered: int
    skipped_lines: list[str] = field(default_factory=list)


def import_trace(
    source: str | Path,
    destination: str | Path,
    format_name: str,
    source_format: Format,
    *,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> Report:
    """Read ``source``, write ``destination``.

    Raises DataError for a missing, unreadable or empty source and for its first broken line (unless ``skip_bad``);
    OutputError when the destination cannot be written.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: no such file; expected a trace in the format {format_name}")
    found = _Rows()
    skipped: list[str] = []
    rows_skipped = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, record in source_format.records(path, file):
                bad = record if isinstance(record, BadLine) else impossible(record)
                if bad is None:
                    assert isinstance(record, Record)
                    found.append(record)
                    continue
                if not skip_bad:
                    raise DataError(
                        f"{path}: line {number}: {bad}; repair the line, or leave such lines out with --skip-bad"
                    )
                rows_skipped += 1
                if len(skipped) < MESSAGES_MAX:
                    skipped.append(f"line {number}: {bad}")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not text in UTF-8 ({error.reason} at byte {error.start}); expected {format_name}"
        ) from error
    if not found.at_ns:
        raise DataError(
            f"{path}: no usable line ({rows_skipped} skipped); expected a trace in the format {format_name}"
        )
    reordered, table = found.table()
    metadata = {
        "source": path.name,
        "source_sha256": file_sha256(path),
        "importer": format_name,
        "importer_version": VERSION,
        "rows_skipped": str(rows_skipped),
        "rows_reordered": str(reordered),
        **source_format.metadata,
    }
    with TraceWriter(destination, metadata, overwrite=overwrite) as writer:
        writer.write(table)
    return Report(writer.rows, rows_skipped, reordered, skipped)


class _Rows:
    """Records as compact columns: about 30 bytes a row without prefixes."""

    def __init__(self) -> None:
        self.at_ns: list[int] | array[int] = array("q")
        self.prompt_tokens, self.output_tokens, self.kind = array("i"), array("i"), array("b")
        self.session_id: list[str | None] = []
        self.hash_ids, self.hash_end = array("i"), array("i", [0])

    def append(self, record: Record) -> None:
        self.at_ns.append(record.at_ns)
        self.prompt_tokens.append(record.prompt_tokens)
        self.output_tokens.append(record.output_tokens)
        self.kind.append(KINDS.index(record.kind))
        self.session_id.append(record.session_id)
        self.hash_ids.extend(record.hash_ids)
        self.hash_end.append(len(self.hash_ids))

    def table(self) -> tuple[int, Any]:
        """Rows that came before an earlier one, and all rows in order of arrival."""
        at_ns = np.array(self.at_ns, np.int64)
        reordered = int(np.count_nonzero(at_ns[1:] < np.maximum.accumulate(at_ns)[:-1]))
        hash_end = np.array(self.hash_end, np.int32)
        hash_ids = pa.ListArray.from_arrays(
            pa.array(hash_end),
            pa.array(np.array(self.hash_ids, np.int32)),
            mask=pa.array(np.diff(hash_end) == 0),
        )
        table = pa.table(
            {
                "arrival_s": (at_ns - at_ns.min()) / SECOND,
                "prompt_tokens": np.array(self.prompt_tokens, np.int32),
                "output_tokens": np.array(self.output_tokens, np.int32),
                "kind": pa.DictionaryArray.from_arrays(pa.array(np.array(self.kind, np.int8)), pa.array(KINDS)),
                "session_id": pa.array(self.session_id, pa.string()),
                "hash_ids": hash_ids,
            }
        ).cast(TRACE)
        return reordered, table.take(np.argsort(at_ns, kind="stable")) if reordered else table
