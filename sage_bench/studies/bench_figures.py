"""What a ``make bench-...`` of this checkout has measured, for the notes of a study: it does not come from the study's runs."""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeVar

import msgspec

from sage_core.errors import DataError

BENCH: Final = Path("results/bench")
"""Where the benchmarks write, from the working directory: not below the results that a study is given."""

_Shape = TypeVar("_Shape")


def bench_figures(name: str, shape: type[_Shape]) -> _Shape | None:
    """``results/bench/<name>.json``; None where the benchmark has not been run. Raises :class:`DataError` for another content."""
    path = BENCH / f"{name}.json"
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: {error}; it is cut short or not ours, so remove it or run `make bench-{name}` again"
        ) from error
