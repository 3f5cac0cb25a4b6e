"""Public trace formats, line by line.

A format turns each line of a source into a record, or into a :class:`BadLine` that says what was expected and what was
found. It repairs nothing and drops nothing; what happens to bad lines is the importer's business.

=============  ========================================================================================================
azure2023      CSV ``TIMESTAMP,ContextTokens,GeneratedTokens``: Azure LLM inference traces
mooncake       JSON lines ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` (blocks of 512 tokens)
burstgpt       CSV ``Timestamp`` (s), ``Model``, ``Request tokens``, ``Response tokens``, ``Total tokens``, ``Log Type``,
               and in later releases ``Session ID``; a failed call has 0 response tokens and is a broken line here
csv            any CSV with a header, given which column is which
=============  ========================================================================================================
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

from sage_bench.traces.schema import KINDS
from sage_core.errors import ConfigError, DataError
from sage_core.units import MICROSECOND, MILLISECOND, SECOND

TIME_UNITS = {"s": SECOND, "ms": MILLISECOND, "us": MICROSECOND, "ns": 1}
CSV_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "kind", "session_id")
TOKENS_MAX = 2**31 - 1


class Record(NamedTuple):
    """One request of a source."""

    at_ns: int
    prompt_tokens: int
    output_tokens: int
    kind: str
    session_id: str | None = None
    hash_ids: tuple[int, ...] = ()


class BadLine(ValueError):
    """A line is not what the format says; the message tells what was expected and what was found."""


Fields: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Format:
    """How a source is read: ``records`` yields a record or a BadLine for each line, with its number from 1."""

    records: Callable[[Path, IO[str]], Iterator[tuple[int, Record | BadLine]]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def azure2023(kind: str = "chat") -> Format:
    """Azure LLM inference traces; ``kind`` says what the file is (the conversation trace is chat, the code trace
    generation)."""
    _check_kind(kind)

    def record(row: Fields) -> Record:
        at_ns = _iso_ns(row["TIMESTAMP"], "TIMESTAMP")
        return Record(at_ns, _tokens(row, "ContextTokens"), _tokens(row, "GeneratedTokens"), kind)

    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    return Format(_csv_records(columns, record), {"license": "CC-BY-4.0"})


def mooncake(kind: str = "generation") -> Format:
    """Mooncake traces."""
    _check_kind(kind)

    def records(_: Path, file: IO[str]) -> Iterator[tuple[int, Record | BadLine]]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, _mooncake_record(line, kind)
            except BadLine as bad:
                yield number, bad

    return Format(records, {"license": "Apache-2.0", "hash_block_tokens": "512"})


def burstgpt() -> Format:
    """BurstGPT: conversation logs become chat, API logs generation."""
    kinds = {"Conversation log": "chat", "API log": "generation"}

    def record(row: Fields) -> Record:
        kind = kinds.get(row["Log Type"])
        if kind is None:
            raise BadLine(f"Log Type: expected one of {', '.join(kinds)}, found {row['Log Type']!r}")
        at_ns = _number_ns(row["Timestamp"], "Timestamp", SECOND)
        session = row.get("Session ID") or None
        return Record(at_ns, _tokens(row, "Request tokens"), _tokens(row, "Response tokens"), kind, session)

    columns = ("Timestamp", "Request tokens", "Response tokens", "Log Type")
    return Format(_csv_records(columns, record))


def generic_csv(columns: Mapping[str, str], time_unit: str = "s", kind: str = "chat") -> Format:
    """Any CSV with a header. columns: our column name to theirs; ``arrival_s`` and ``prompt_tokens`` are needed.

    time_unit: s, ms, us, ns, or iso for a date and time. kind: of every row when no column says it. Without a column of
    output tokens every row must be an embedding.
    """
    _check_kind(kind)
    unknown = [name for name in columns if name not in CSV_COLUMNS]
    missing = [name for name in ("arrival_s", "prompt_tokens") if name not in columns]
    if unknown or missing:
        problem = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise ConfigError(f"--columns: {problem}; expected name=column pairs with names of {', '.join(CSV_COLUMNS)}")
    if time_unit != "iso" and time_unit not in TIME_UNITS:
        raise ConfigError(f"--time-unit: expected one of {', '.join(TIME_UNITS)} or iso, got {time_unit!r}")

    def record(row: Fields) -> Record:
        time_column = columns["arrival_s"]
        if time_unit == "iso":
            at_ns = _iso_ns(row[time_column], time_column)
        else:
            at_ns = _number_ns(row[time_column], time_column, TIME_UNITS[time_unit])
        output = _tokens(row, columns["output_tokens"]) if "output_tokens" in columns else 0
        row_kind = row[columns["kind"]].strip() if "kind" in columns else kind
        session = (row[columns["session_id"]] or None) if "session_id" in columns else None
        return Record(at_ns, _tokens(row, columns["prompt_tokens"]), output, row_kind, session)

    return Format(_csv_records(tuple(columns.values()), record))


def impossible(record: Record | BadLine) -> BadLine | None:
    """What the schema forbids although every field is well-formed."""
    if isinstance(record, BadLine):
        return record
    if record.kind not in KINDS:
        return BadLine(f"kind: expected one of {', '.join(KINDS)}, found {record.kind!r}")
    if record.prompt_tokens < 1:
        return BadLine(f"prompt tokens: expected at least 1, found {record.prompt_tokens}")
    if record.kind == "embedding":
        return (
            BadLine(f"output tokens: expected 0 for an embedding, found {record.output_tokens}")
            if record.output_tokens
            else None
        )
    if record.output_tokens < 1:
        return BadLine(
            f"output tokens: expected at least 1 for {record.kind} (0 is a failed call), found {record.output_tokens}"
        )
    return None


def _csv_records(
    columns: tuple[str, ...], record: Callable[[Fields], Record]
) -> Callable[[Path, IO[str]], Iterator[tuple[int, Record | BadLine]]]:
    def records(path: Path, file: IO[str]) -> Iterator[tuple[int, Record | BadLine]]:
        lines = csv.reader(file, strict=True)
        header = [name.strip() for name in next(lines, [])]
        for column in columns:
            if column not in header:
                raise DataError(
                    f"{path}: line 1: column {column!r} is missing; expected {', '.join(columns)}, found "
                    f"{', '.join(header) or 'an empty file'}; is this the right format? (`sage trace import --help`)"
                )
        while True:
            try:
                fields = next(lines, None)
                if fields is None:
                    return
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise BadLine(f"expected {len(header)} fields, found {len(fields)}")
                yield lines.line_num, record(dict(zip(header, fields, strict=True)))
            except BadLine as bad:
                yield lines.line_num, bad
            except csv.Error as error:
                yield lines.line_num, BadLine(f"expected comma-separated fields, found broken quoting ({error})")

    return records


def _mooncake_record(line: str, kind: str) -> Record:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadLine(f"expected a JSON object, found {line.strip()[:40]!r} ({error.msg})") from error
    if not isinstance(row, dict):
        raise BadLine(f"expected a JSON object, found {type(row).__name__}")
    blocks = row.get("hash_ids") or []
    if not isinstance(blocks, list) or not all(type(block) is int and 0 <= block <= TOKENS_MAX for block in blocks):
        raise BadLine("hash_ids: expected a list of whole numbers from 0")
    at_ns = _number_ns(row.get("timestamp"), "timestamp", MILLISECOND)
    return Record(at_ns, _tokens(row, "input_length"), _tokens(row, "output_length"), kind, None, tuple(blocks))


def _tokens(row: Mapping[str, Any], column: str) -> int:
    value = row.get(column)
    text = value.strip() if isinstance(value, str) else value
    try:
        if isinstance(text, bool) or text is None:
            raise ValueError
        number = float(text)
        if not number.is_integer() or not 0 <= number <= TOKENS_MAX:
            raise ValueError
    except (ValueError, TypeError) as error:
        raise BadLine(f"{column}: expected a whole number of tokens from 0, found {value!r}") from error
    return int(number)


def _number_ns(value: object, column: str, unit_ns: int) -> int:
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or not 0 <= number * unit_ns < 2**62:
            raise ValueError
    except ValueError as error:
        raise BadLine(f"{column}: expected a time of at least 0, found {value!r}") from error
    return round(number * unit_ns)


def _iso_ns(text: str, column: str) -> int:
    """Date and time (UTC unless it says otherwise) as ns; ``datetime`` alone would cut the seventh digit off."""
    stamp = text.strip()
    digits = ""
    if len(stamp) > 19 and stamp[19] == ".":
        end = next((i for i in range(20, len(stamp)) if not stamp[i].isdigit()), len(stamp))
        digits, stamp = stamp[20:end], stamp[:19] + stamp[end:]
    try:
        if len(digits) > 9 or (len(text) > 19 and text.strip()[19] == "." and not digits):
            raise ValueError
        moment = datetime.fromisoformat(stamp)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
        at_s = round(moment.timestamp())
        if not 0 <= at_s < 2**62 // SECOND:
            raise ValueError
    except (ValueError, OverflowError) as error:
        raise BadLine(f"{column}: expected a date and time as 2023-11-16 18:15:46.680590, found {text!r}") from error
    return at_s * SECOND + int((digits or "0").ljust(9, "0"))


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"--kind: expected one of {', '.join(KINDS)}, got {kind!r}")
