"""The rows of a run from the native event loop: columns made in C++, taken as they lie in memory, written to Parquet.

What the rows say is in :mod:`sage_bench.results.recorder`; a differential test holds the two together.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeAlias

import pyarrow as pa

from sage_bench.results.recorder import CUT_OFF, Recorder, Stages, check_outcomes, tpot_max_ns
from sage_bench.results.schema import REPLICAS, REQUESTS, STEPS, TASKS
from sage_bench.results.writer import BUFFER_BYTES, BUFFER_ROWS, TableFile
from sage_core import _native
from sage_core.errors import InvariantViolation
from sage_core.slo import SloTable
from sage_core.units import NEVER

SCHEMAS: Final = {"requests": REQUESTS, "replicas": REPLICAS, "tasks": TASKS, "steps": STEPS}

WRITING_MAX: Final = 4
"""Row groups that may wait for the disk; beyond it, whoever records waits too."""

Column: TypeAlias = tuple[int, list[_native.Buffer | None], int]
"""See ``Recorder.take`` in the stub of the native extension."""


class NativeRecorder(Recorder):
    """``native`` is what the loop tells of each step; call :meth:`flush` when the loop returns because it is full.

    Arguments and errors as for :class:`sage_bench.results.recorder.RunRecorder`. steps: write ``steps.parquet`` too,
    which :class:`sage_bench.results.writer.StepWriter` does where Python takes the steps. background: files are written
    by a thread of their own, because an event loop in real time must not wait for compression and disk; what goes wrong
    there is raised by the next call.
    """

    def __init__(
        self,
        folder: Path,
        pipelines: Mapping[str, Stages],
        slo: SloTable,
        *,
        warmup_ns: int = 0,
        cooldown_at: int = NEVER,
        tasks: bool = True,
        steps: bool = True,
        buffer_rows: int = BUFFER_ROWS,
        background: bool = False,
    ) -> None:
        self.native = _native.Recorder(
            {name: list(stages) for name, stages in pipelines.items()},
            functools.partial(tpot_max_ns, slo),
            warmup_ns=warmup_ns,
            cooldown_at=cooldown_at,
            tasks=tasks,
            steps=steps,
            buffer_rows=buffer_rows,
            buffer_bytes=BUFFER_BYTES,
        )
        for name in self.native.tables():
            _check_columns(name, self.native.columns(name), SCHEMAS[name])
        self._files: dict[str, TableFile] = {}
        self._writer = ThreadPoolExecutor(1, "sage-recorder") if background else None
        self._writing: deque[Future[None]] = deque()
        with contextlib.ExitStack() as opened:  # the first file must not be left open if the next cannot be made
            for name in self.native.tables():
                self._files[name] = TableFile(folder / f"{name}.parquet", SCHEMAS[name])
                opened.callback(self._finish, name)
            self._finishing = opened.pop_all()

    def flush(self) -> None:
        """Write every table that is full as a row group."""
        for name in self.native.full_tables():
            self._write(name)

    def close(self) -> None:
        lost = self.native.live()
        self.abort(CUT_OFF)
        check_outcomes(lost, self.native.arrived)

    def abort(self, reason: str) -> None:
        self.native.abort(reason)
        try:
            self._finishing.close()
        finally:
            if self._writer is not None:
                self._writer.shutdown()

    def counts(self) -> dict[str, int]:
        return {"arrived": self.native.arrived, **self.native.outcomes, "tasks": self.native.tasks}

    def replicas(self) -> list[dict[str, Any]]:
        return list({row["replica"]: row for row in self.native.replicas()}.values())

    def _finish(self, name: str) -> None:
        try:
            self._write(name)
            self._wait()
        finally:
            self._files[name].close()

    def _wait(self) -> None:
        while self._writing:
            self._writing.popleft().result()

    def _write(self, name: str) -> None:
        rows = self.native.rows(name)
        if rows:
            file = self._files[name]
            columns = zip(self.native.take(name), file.schema, strict=True)
            table = pa.Table.from_arrays(
                [_array(column, field.type, rows) for column, field in columns], schema=file.schema
            )
            if self._writer is None:
                file.write(table)
            else:
                while self._writing and (self._writing[0].done() or len(self._writing) >= WRITING_MAX):
                    self._writing.popleft().result()
                self._writing.append(self._writer.submit(file.write, table))


def _array(column: Column, kind: pa.DataType, rows: int) -> pa.Array:
    """A column as it lies in the memory of the native recorder."""
    nulls, memory, labels = column
    buffers = [None if each is None else pa.py_buffer(each) for each in memory]
    if labels < 0:
        return pa.Array.from_buffers(kind, rows, buffers, nulls)
    # Not pa.array(list): the first call of that imports pandas, a quarter of a second.
    dictionary = pa.Array.from_buffers(kind.value_type, labels, [None, *buffers[-2:]])
    return pa.DictionaryArray.from_buffers(kind, rows, buffers[:-2], dictionary, nulls)


def _check_columns(table: str, native: list[tuple[str, str]], schema: pa.Schema) -> None:
    """The native recorder is compiled apart from the schema: a column more, or of another type, would be misread."""
    expected = [(field.name, str(field.type)) for field in schema]
    if native != expected:
        differ = [pair for pair in itertools.zip_longest(native, expected) if pair[0] != pair[1]]
        raise InvariantViolation(
            f"{table}: column {differ[0][0]} of the native recorder, {differ[0][1]} of the schema; "
            "native/src/recorder.cpp and sage_bench/results/schema.py must agree, so build the native code again"
        )
