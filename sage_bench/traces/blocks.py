"""The column ``hash_ids`` of a trace: which blocks prompts share, and how many tokens a block has.

Ids are bounded because engines cut a block into blocks of their own and number the parts: id x parts must fit 64 bits.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

ID_MAX: Final = 2**31 - 1
BLOCK_TOKENS_MAX: Final = 2**31 - 1

EXPECTED_TYPE: Final = "list of int32 (block ids)"
EXPECTED_IDS: Final = "block ids from 0 to 2^31-1"
RENUMBER: Final = "renumber them from 0, equal blocks alike"


class Blocks(NamedTuple):
    """Block ids of consecutive rows, those of row i at ``ids[start[i]:start[i + 1]]``; a row may have none."""

    ids: NDArray[np.int64]
    start: NDArray[np.int64]


class BadId(Exception):
    """The first id that cannot be: its row, counted from 0, and what is there (None: nothing)."""

    def __init__(self, row: int, found: int | None) -> None:
        super().__init__(row, found)
        self.row, self.found = row, found


def is_block_lists(found: Any) -> bool:
    """Whether an Arrow type is one of lists of integers, or of a column without any value."""
    if pa.types.is_null(found):
        return True
    if not (pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)):
        return False
    return bool(pa.types.is_integer(found.value_type) or pa.types.is_null(found.value_type))


def read_blocks(lists: Any) -> Blocks:
    """The ids of an Arrow array of a type that :func:`is_block_lists` accepts. Raises :class:`BadId`."""
    if pa.types.is_null(lists.type):
        return Blocks(np.empty(0, np.int64), np.zeros(len(lists) + 1, np.int64))
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    start = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    ids = lists.drop_null().flatten()
    if ids.null_count:
        at = int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
        raise BadId(int(np.searchsorted(start, at, side="right")) - 1, None)
    values = ids.to_numpy(zero_copy_only=False) if len(ids) else np.empty(0, np.int64)
    fits = (values >= 0) & (values <= ID_MAX)
    if not fits.all():
        at = int(np.flatnonzero(~fits)[0])
        raise BadId(int(np.searchsorted(start, at, side="right")) - 1, int(values[at]))
    return Blocks(values.astype(np.int64), start)


def block_tokens(stated: str) -> int:
    """Tokens of a block from the value of the metadata key ``hash_block_tokens``; 0 where it is no such number."""
    if not (stated.isascii() and stated.isdecimal() and len(stated) <= len(str(BLOCK_TOKENS_MAX))):
        return 0
    return int(stated) if int(stated) <= BLOCK_TOKENS_MAX else 0
