"""What the client saw: the columns of ``client.parquet``, one row per request that came due.

Instants are ns since the start of the run, as in the other tables of a run; a null instant did not happen. Latency is
counted from ``scheduled_ns``, never from ``sent_ns``: what the generator was late by is the client's wait too, and it is
told apart as the send lag.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sage_core.slo import SloTable
from sage_core.units import NEVER

_LABEL = pa.dictionary(pa.int32(), pa.string())


class Error(IntEnum):
    """Why a request has no good answer. The names, in lower case, are the labels in the file."""

    NONE = 0
    CONNECT = 1  # no connection: refused, timed out, or no socket left here
    RESET = 2  # the connection broke before the answer was complete
    STATUS = 3  # answered with another status than 200
    TRUNCATED = 4  # a stream that ended properly, but without [DONE]
    MALFORMED = 5  # not HTTP, not JSON, or neither choices nor data
    EVENT = 6  # an error reported within a stream
    TIMEOUT = 7  # longer than the client was willing to wait
    CUT = 8  # the run was stopped while it was in flight
    UNSENT = 9  # the run was stopped when it was due and not yet sent


FIELDS = (
    "request",
    "kind",
    "scheduled_ns",
    "sent_ns",
    "first_token_ns",
    "ended_ns",
    "status",
    "error",
    "input_tokens_asked",
    "output_tokens_asked",
    "input_tokens",
    "output_tokens",
    "chunks",
    "bytes",
)
"""Order of the integer columns while a run is recorded; -1 stands for null."""

CLIENT = pa.schema(
    [
        ("request", pa.int64()),  # of the load; sent as x-request-id
        ("kind", _LABEL),  # chat, generate, embedding
        ("scheduled_ns", pa.int64()),
        ("sent_ns", pa.int64()),  # handed to the socket, or to one that begins to connect
        ("first_token_ns", pa.int64()),  # first content of a stream; null where nothing is streamed
        ("ended_ns", pa.int64()),  # the answer was complete, or given up
        ("status", pa.int32()),  # HTTP; null: no status line came
        ("error", _LABEL),  # one of Error; null: answered well
        ("input_tokens_asked", pa.int64()),  # of the prompt as built; an estimate without a tokenizer
        ("output_tokens_asked", pa.int64()),  # exact length with fixed lengths, else the cap
        ("input_tokens", pa.int64()),  # as the server counted them (usage)
        ("output_tokens", pa.int64()),
        ("chunks", pa.int32()),  # stream events with content
        ("bytes", pa.int64()),  # received, HTTP framing included
        (
            "itl_ns",
            pa.list_(pa.int64()),
        ),  # between chunks (chunks - 1 of them); 0: they came in one read. Null: not kept.
        ("warmup", pa.bool_()),
    ]
)

_NULLABLE = ("sent_ns", "first_token_ns", "ended_ns", "status", "input_tokens", "output_tokens")


def client_table(
    rows: NDArray[np.int64], gaps: NDArray[np.int64] | None, first_ns: int, end_ns: int = NEVER
) -> pa.Table:
    """``rows`` (n, len(FIELDS)) in order of request as a table of schema CLIENT.

    gaps: inter-chunk gaps of all rows, row after row, max(chunks - 1, 0) of each; None where they were not kept.
    first_ns, end_ns: what is scheduled between them counts, the rest is flagged ``warmup``.
    """
    columns = dict(zip(FIELDS, rows.T, strict=True))
    arrays = {name: pa.array(columns[name], mask=columns[name] < 0 if name in _NULLABLE else None) for name in FIELDS}
    arrays["kind"] = pa.DictionaryArray.from_arrays(columns["kind"].astype(np.int32), list(SloTable.KINDS))
    error = columns["error"].astype(np.int32)
    labels = [e.name.lower() for e in Error if e]
    arrays["error"] = pa.DictionaryArray.from_arrays(pa.array(error - 1, mask=error == 0), labels)
    if gaps is None:
        arrays["itl_ns"] = pa.nulls(len(rows), CLIENT.field("itl_ns").type)
    else:
        ends = np.cumsum(gap_counts(columns["chunks"]))
        arrays["itl_ns"] = pa.LargeListArray.from_arrays(np.concatenate(([0], ends)), gaps)
    arrays["warmup"] = pa.array((columns["scheduled_ns"] < first_ns) | (columns["scheduled_ns"] >= end_ns))
    return pa.table({field.name: arrays[field.name].cast(field.type) for field in CLIENT}, schema=CLIENT)


def gap_counts(chunks: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) gaps between (n,) numbers of chunks."""
    return np.maximum(chunks - 1, 0)


def write_client(path: Path, table: pa.Table) -> None:
    """``client.parquet``."""
    pq.write_table(table, path, compression="zstd")
