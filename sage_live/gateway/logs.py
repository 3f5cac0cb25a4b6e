"""The access log: one JSON object a line for each request that is over. It holds no prompt and no key.

A line is encoded where the request ends (about 2 us) and written by a thread of its own: a disk or a terminal that is slow
costs lines, which are counted, and never a request. Successes may be sampled; what went wrong is always written.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections import deque
from pathlib import Path
from typing import Final

import msgspec

from sage_core.errors import ConfigError, OutputError
from sage_core.units import SECOND
from sage_live.gateway.record import RequestRecord

STDERR: Final = 2
INTERVAL_S: Final = 0.25
CLOSE_S: Final = 2.0
_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


class _Line(msgspec.Struct, omit_defaults=True):
    """Spans are named as in a run's ``requests.parquet``."""

    time: float  # of arrival, Unix seconds
    request_id: str
    operation: str
    model: str
    tenant: str
    outcome: str
    status: int
    e2e_ns: int
    request: int | None = None
    engine: str | None = None
    stream: bool = False
    queue_ns: int | None = None
    ttft_ns: int | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    code: str | None = None


class AccessLog:
    """Appends to ``path``, or to standard error if that is None.

    origin_ns: Unix time of the instant 0 of the records' clock. sample: share of the successes that are written, 0 to 1.
    lines_max: lines that may wait for the disk. Raises ``ConfigError`` and ``OutputError``.
    """

    def __init__(self, path: Path | None, origin_ns: int, sample: float = 1.0, lines_max: int = 65536) -> None:
        if not 0 <= sample <= 1:
            raise ConfigError(f"access log: expected a sample from 0 to 1, got {sample!r}")
        try:
            # O_APPEND: whoever rotates the file may truncate it in place.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._file = STDERR if path is None else os.open(path, flags, 0o640)
        except OSError as error:
            raise OutputError(f"access log: cannot open {path} ({error.strerror})") from None
        self._owned = path is not None
        self._origin_ns = origin_ns
        self._sample = sample
        self._lines: deque[bytes] = deque()
        self._lines_max = lines_max
        self._closing = threading.Event()
        self._overflowed = 0
        self._failed = 0  # the writer's own count: two threads adding to one would lose some
        # A daemon: a terminal that takes no more must not keep the process from ending.
        self._writer = threading.Thread(target=self._write, name="sage-access-log", daemon=True)
        self._writer.start()

    @property
    def dropped(self) -> int:
        """Lines that were not written: the buffer was full, or the file could not take them."""
        return self._overflowed + self._failed

    def write(self, record: RequestRecord) -> None:
        """One request is over."""
        if record.status < 400 and record.outcome == "responded" and random.random() >= self._sample:
            return
        if len(self._lines) >= self._lines_max:
            self._overflowed += 1
            return
        arrived = record.arrived_ns
        line = _Line(
            time=(self._origin_ns + arrived) / SECOND,
            request_id=record.request_id,
            operation=record.operation,
            model=record.model,
            tenant=record.tenant,
            outcome=record.outcome,
            status=record.status,
            e2e_ns=record.ended_ns - arrived,
            request=record.request,
            engine=record.engine,
            stream=record.stream,
            queue_ns=None if record.dispatched_ns is None else record.dispatched_ns - arrived,
            ttft_ns=None if record.first_token_ns is None else record.first_token_ns - arrived,
            input_tokens=record.input_tokens,
            output_tokens=record.output_tokens,
            request_bytes=record.request_bytes,
            response_bytes=record.response_bytes,
            code=record.code,
        )
        self._lines.append(_encoder.encode(line))

    def close(self) -> None:
        """Write what waits, for at most ``CLOSE_S``."""
        self._closing.set()
        self._writer.join(CLOSE_S)
        self._overflowed += len(self._lines)
        if self._owned and not self._writer.is_alive():
            os.close(self._file)

    def _write(self) -> None:
        failed = False
        while True:
            closing = self._closing.wait(INTERVAL_S)
            # Only what is there now: lines that come meanwhile are for the next turn.
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            try:
                if lines:
                    _write_all(self._file, b"\n".join(lines) + b"\n")
            except OSError as error:
                self._failed += len(lines)
                if not failed:
                    _log.error("access log: cannot be written (%s); lines are dropped until it can", error.strerror)
                failed = True
            else:
                failed = failed and not lines
            if closing:
                return


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
