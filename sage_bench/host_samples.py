"""``host.parquet``: who used the machine during a live run, from what :mod:`sage_bench.host_sampler` saw."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from sage_bench.results.manifest import HostFact
from sage_bench.results.schema import HOST
from sage_bench.results.writer import output_error

NAME: Final = "host.parquet"
SAMPLES: Final = "host-samples.jsonl"

END_S: Final = 5.0
"""For the sampler to end."""


@asynccontextmanager
async def sampling(folder: Path, heads: Mapping[int, str]) -> AsyncIterator[None]:
    """Sample while the block runs; heads: process ids and the names of their groups. The samples are left in ``folder``."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sage_bench.host_sampler", str(folder / SAMPLES), stdin=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(dict(heads)).encode() + b"\n")
        yield
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), END_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def write_host(folder: Path, origin_ns: int) -> HostFact:
    """``host.parquet`` from the samples that :func:`sampling` left, and what there was to sample. Instants count from
    ``origin_ns`` of the monotonic clock. Raises OutputError."""
    path = folder / SAMPLES
    rows, fact = [], HostFact(0.0, 0, "the sampler ended before it began")
    with suppress(OSError):
        lines = path.read_text(encoding="utf-8").splitlines()
        with suppress(ValueError, IndexError):  # it may have been killed in the middle of a line
            fact = HostFact(**json.loads(lines[0]))
            for line in lines[1:]:
                at, *rest = json.loads(line)
                rows.append((at - origin_ns, *rest))
    columns = list(zip(*rows, strict=True)) or [()] * len(HOST)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, HOST, strict=True)]
    try:
        pq.write_table(pa.Table.from_arrays(arrays, schema=HOST), folder / NAME, compression="zstd")
    except OSError as error:
        raise output_error(folder / NAME, error) from error
    path.unlink(missing_ok=True)
    return fact
