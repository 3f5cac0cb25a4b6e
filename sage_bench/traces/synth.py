"""Traces made by the built-in generators, as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sage_bench.loads.arrivals import ArrivalProcess, Poisson
from sage_bench.loads.check import number
from sage_bench.loads.fits import fitted_arrivals, fitted_lengths, load_fit
from sage_bench.loads.open_loop import OpenLoop
from sage_bench.loads.request_class import RequestClass
from sage_bench.traces.schema import KINDS, REQUEST_KINDS
from sage_bench.traces.writer import TraceWriter
from sage_core.errors import ConfigError
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_core.units import SECOND

OUTPUT_TOKENS_MAX = 1024  # the cap of generated chat requests; the longest output of the fitted trace is 1,000 tokens


def synth_load(
    seed: int,
    rate: float | None = None,
    requests: int | None = None,
    duration_s: float | None = None,
    embedding_share: float = 0.0,
    fit: str = "azure2023_conv",
    embedding_fit: str = "ragpulse_query",
    *,
    poisson: bool = False,
) -> OpenLoop:
    """Chat requests as in ``fit`` and, at ``embedding_share``, embedding requests as in ``embedding_fit``.

    rate: requests/s in all; by default the chat rate of the fitted trace plus the embeddings. poisson: Poisson arrivals
    in place of the fitted process.
    """
    number("embedding_share", embedding_share, 0.0, 0.99)
    chat_rate = load_fit(fit).rate
    if rate is None:
        if chat_rate is None:
            raise ConfigError(f"rate: fit {fit!r} gives none; expected a number of requests/s")
        rate = chat_rate / (1.0 - embedding_share)
    process: ArrivalProcess = Poisson() if poisson else fitted_arrivals(fit)
    classes = {
        "chat": RequestClass(
            "chat",
            input_tokens=fitted_lengths(fit, "prompt_tokens"),
            output_tokens=fitted_lengths(fit, "output_tokens"),
            output_tokens_max=OUTPUT_TOKENS_MAX,
        )
    }
    if embedding_share:
        classes["embedding"] = RequestClass("embedding", embedding_share, input_tokens=fitted_lengths(embedding_fit))
    return OpenLoop(rate, classes, process, requests, duration_s, streams=Streams(seed), slo=SloTable())


def write_load(path: Path, load: OpenLoop, metadata: dict[str, str], *, overwrite: bool = False) -> int:
    """Write ``load`` as a trace file; returns the number of rows."""
    with TraceWriter(path, metadata, overwrite=overwrite) as writer:
        for table in _tables(load):
            writer.write(table)
    return writer.rows


def _tables(load: OpenLoop) -> Iterator[Any]:
    kind_code = np.array([REQUEST_KINDS.index(c.kind) for c in load.mix.classes], np.int8)
    for batch in load.batches():
        if len(batch.at):
            n = len(batch.at)
            yield pa.table(
                {
                    "arrival_s": batch.at / SECOND,
                    "prompt_tokens": batch.input_tokens.astype(np.int32),
                    "output_tokens": batch.output_tokens.astype(np.int32),
                    "kind": pa.DictionaryArray.from_arrays(pa.array(kind_code[batch.cls]), pa.array(KINDS)),
                    "session_id": pa.nulls(n, pa.string()),
                    "hash_ids": pa.nulls(n, pa.list_(pa.int32())),
                }
            )
