"""One process of several: ``python -m sage_live.loadgen.worker FOLDER REST OF``, started by ``processes``.

Says that it is ready, is told the start, leaves its rows in the folder and says what it spent: a line of JSON each.
"""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import uvloop

from sage_core.errors import SageError
from sage_core.load import Arrivals
from sage_live.loadgen.encode import Share
from sage_live.loadgen.generator import LoadGenerator, Measured
from sage_live.loadgen.options import Options

JOB = "job.pickle"


def rows_file(rest: int) -> str:
    """Where the process of that share leaves its rows."""
    return f"rows-{rest}.npz"


def main(folder: Path, rest: int, of: int) -> None:
    batches, options = pickle.loads((folder / JOB).read_bytes())
    try:
        measured = uvloop.run(_run(_Columns(batches), options, Share(rest, of)))
    except SageError as error:
        _say({"error": str(error)})
        return
    arrays = {"rows": measured.rows} | ({} if measured.gaps is None else {"gaps": measured.gaps})
    np.savez(folder / rows_file(rest), **arrays)  # type: ignore[arg-type]
    effort = measured.efforts[0]
    _say({"cpu_s": effort.cpu_s, "busy": effort.busy, "objective_ns": int(measured.objective_ns)})


async def _run(load: _Columns, options: Options, share: Share) -> Measured:
    generator = LoadGenerator(load, options, share)
    await generator.prepare()
    gc.freeze()  # the load and the prompts stay; collections need not look at them while requests are due
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _say({})
    start = await reader.readline()
    stop = asyncio.Event()
    if not start:  # stopped before the start
        stop.set()
    leash = asyncio.ensure_future(_until_end(reader, stop))
    measured = await generator.run(int(start) if start else None, stop)
    leash.cancel()
    return measured


async def _until_end(reader: asyncio.StreamReader, stop: asyncio.Event) -> None:
    await reader.read()
    stop.set()


def _say(what: dict[str, object]) -> None:
    print(json.dumps(what), flush=True)


class _Columns:
    """A load that was drawn already."""

    def __init__(self, batches: Sequence[Arrivals]) -> None:
        self._batches = batches

    def columns(self) -> Iterator[Arrivals]:
        return iter(self._batches)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
