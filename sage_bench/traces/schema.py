"""The columns of a trace file.

One row per request, in order of arrival. ``arrival_s`` counts from any origin at or before the first row. Prompts are
not kept: sizes, kinds and the identity of shared prefixes are all that scheduling can see.

Metadata keys of the Parquet schema: ``source``, ``source_sha256``, ``importer``, ``importer_version``,
``rows_skipped``, ``rows_reordered``, ``license`` and ``hash_block_tokens`` (tokens per prefix block), where known. Files of
others may have ``hash_ids`` as any list of integers (``traces.blocks``).
"""

from __future__ import annotations

import pyarrow as pa

from sage_core.units import RequestKind

KINDS = ("chat", "generation", "embedding")
"""Values of the column ``kind``, in the order of :data:`REQUEST_KINDS`."""

REQUEST_KINDS = (RequestKind.LLM_CHAT, RequestKind.LLM_GENERATE, RequestKind.EMBEDDING)

TRACE = pa.schema(
    [
        ("arrival_s", pa.float64()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),  # 0 for an embedding, at least 1 otherwise
        ("kind", pa.dictionary(pa.int8(), pa.string())),  # one of KINDS
        ("session_id", pa.string()),  # null where the source has none
        ("hash_ids", pa.list_(pa.int32())),  # prefix blocks: equal ids from the start are an equal prefix
    ]
)

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens", "kind")
"""Columns a reader insists on; ``session_id`` and ``hash_ids`` may be absent."""
