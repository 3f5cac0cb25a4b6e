"""What the prompts of a measured run have in common: the blocks of the trace that it was made from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sage_bench.traces.blocks import (
    EXPECTED_IDS,
    EXPECTED_TYPE,
    RENUMBER,
    BadId,
    block_tokens,
    is_block_lists,
    read_blocks,
)
from sage_bench.validate.measured import MeasuredRun
from sage_core.errors import DataError
from sage_core.load import Contents

NO_TRACE = Path("none")
"""What a user says who wants no trace, although there is one."""


def find_prefix_trace(run: MeasuredRun, block_size: int) -> Path | None:
    """The trace in the folder of the measured run whose requests are those of the run: equal prompt and output lengths in
    every row, and blocks that :func:`read_prefixes` can use. The first by name; None without one."""
    for path in sorted(run.path.parent.glob("*.parquet")):
        if path == run.path:
            continue
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                if not {"prompt_tokens", "output_tokens", "hash_ids"} <= set(schema.names):
                    continue
                tokens = block_tokens(_stated(schema))
                if not tokens or tokens % block_size or not is_block_lists(schema.field("hash_ids").type):
                    continue
                if file.metadata.num_rows != len(run):
                    continue
                lengths = file.read(columns=["prompt_tokens", "output_tokens"])
        except (pa.ArrowException, OSError):
            continue  # not for us to complain about
        if all(
            np.array_equal(lengths[name].to_numpy(), values)
            for name, values in (("prompt_tokens", run.prompt_tokens), ("output_tokens", run.output_tokens))
        ):
            return path
    return None


def read_prefixes(path: Path, run: MeasuredRun) -> list[Contents]:
    """By row of ``run``: the blocks that the trace ``path``, whose rows are those of the run, states in ``hash_ids``.

    Raises :class:`DataError`: the trace is of other requests, or does not state blocks and how many tokens they have.
    """
    try:
        with pq.ParquetFile(path) as file:
            stated = _stated(file.schema_arrow)
            table = file.read(columns=["prompt_tokens", "hash_ids"])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a trace with prompt_tokens and hash_ids ({reason})") from error
    if table.column_names != ["prompt_tokens", "hash_ids"]:
        raise DataError(
            f"{path}: expected columns prompt_tokens and hash_ids; without them prompts have nothing in common"
        )
    tokens = block_tokens(stated)
    if not tokens:
        raise DataError(
            f"{path}: expected tokens per block in the metadata key hash_block_tokens, found {stated or 'nothing'}"
        )
    found = table.schema.field("hash_ids").type
    if not is_block_lists(found):
        raise DataError(f"{path}: column hash_ids: expected type {EXPECTED_TYPE}, found {found}; convert the column")
    prompts = table["prompt_tokens"].to_numpy()
    if len(prompts) != len(run):
        raise DataError(f"{path}: {len(prompts)} rows, but {run.path} has {len(run)}; expected the trace of that run")
    if (other := prompts != run.prompt_tokens).any():
        row = int(other.argmax())
        raise DataError(
            f"{path}: row {row} (from 0) has {prompts[row]} prompt tokens, but {run.path} {run.prompt_tokens[row]}; expected the "
            "trace of that run"
        )
    try:
        blocks = read_blocks(table["hash_ids"].combine_chunks())
    except BadId as bad:
        raise DataError(
            f"{path}: row {bad.row} (from 0), column hash_ids: expected {EXPECTED_IDS}, found "
            f"{'nothing' if bad.found is None else bad.found}; {RENUMBER}"
        ) from None
    lengths = np.diff(blocks.start)
    if (over := lengths * tokens > run.prompt_tokens).any():
        row = int(over.argmax())
        raise DataError(
            f"{path}: row {row} (from 0), column hash_ids: expected ids of the {run.prompt_tokens[row] // tokens} full "
            f"blocks of its {run.prompt_tokens[row]} prompt tokens at most, found {lengths[row]} ids; leave out the block that "
            "is not full"
        )
    ids, start = blocks.ids.tolist(), blocks.start.tolist()
    return [Contents(tokens, tuple(ids[first:stop])) for first, stop in itertools.pairwise(start)]


def _stated(schema: Any) -> str:
    value: bytes = (schema.metadata or {}).get(b"hash_block_tokens", b"")
    return value.decode(errors="replace")
