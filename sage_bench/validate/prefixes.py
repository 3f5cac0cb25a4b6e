"""What the prompts of a measured run have in common: the blocks of the trace that it was made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
                stated = (schema.metadata or {}).get(b"hash_block_tokens", b"")
                if not {"prompt_tokens", "output_tokens", "hash_ids"} <= set(schema.names) or not stated.isdigit():
                    continue
                if not int(stated) or int(stated) % block_size or file.metadata.num_rows != len(run):
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
            metadata = file.schema_arrow.metadata or {}
            table = file.read(columns=["prompt_tokens", "hash_ids"])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a trace with prompt_tokens and hash_ids ({reason})") from error
    if table.column_names != ["prompt_tokens", "hash_ids"]:
        raise DataError(
            f"{path}: expected columns prompt_tokens and hash_ids; without them prompts have nothing in common"
        )
    stated = metadata.get(b"hash_block_tokens", b"").decode()
    if not stated.isdecimal() or int(stated) < 1:
        raise DataError(
            f"{path}: expected tokens per block in the metadata key hash_block_tokens, found {stated or 'nothing'}"
        )
    tokens = int(stated)
    prompts = table["prompt_tokens"].to_numpy()
    if len(prompts) != len(run):
        raise DataError(f"{path}: {len(prompts)} rows, but {run.path} has {len(run)}; expected the trace of that run")
    if (other := prompts != run.prompt_tokens).any():
        row = int(other.argmax())
        raise DataError(
            f"{path}: row {row} (from 0) has {prompts[row]} prompt tokens, but {run.path} {run.prompt_tokens[row]}; expected the "
            "trace of that run"
        )
    contents = []
    for row, ids in enumerate(table["hash_ids"].to_pylist()):
        blocks = tuple(ids or ())
        if len(blocks) * tokens > prompts[row] or not all(type(each) is int and each >= 0 for each in blocks):
            raise DataError(
                f"{path}: row {row} (from 0), column hash_ids: expected ids from 0 of the {prompts[row] // tokens} full blocks of "
                f"its {prompts[row]} prompt tokens"
            )
        contents.append(Contents(tokens, blocks))
    return contents
