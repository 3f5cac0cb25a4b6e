"""What stages hand to one another: texts, passages, vectors, outcomes; and their sizes, which are all the plane sees."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sage_core.errors import DataError

TOKENS_PER_BYTE: Final = 0.25
"""Of English text with common tokenizers, where no engine has counted."""


class Passage(NamedTuple):
    """``source``: the document that it is from; "" for what a model wrote."""

    text: str
    source: str = ""
    score: float = 0.0


Vector: TypeAlias = NDArray[np.float32]
Value: TypeAlias = str | list[Passage] | Vector | int


def size(value: Value) -> int:
    """In tokens; of an outcome, the outcome; of a vector, none."""
    if isinstance(value, int):
        return value
    if isinstance(value, np.ndarray):
        return 0
    return tokens(text(value))


def tokens(of: str) -> int:
    """About how many a text has."""
    return round(len(of.encode()) * TOKENS_PER_BYTE)


def text(value: Value) -> str:
    """As it stands in a prompt: passages one after another, each after the name of its document."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n\n".join(f"[{each.source}] {each.text}" if each.source else each.text for each in value)
    return str(value)


def argument(value: Value) -> Any:
    """As a function sees it: passages are a list of texts."""
    return [each.text for each in value] if isinstance(value, list) else value


def passages(values: Sequence[Value]) -> list[Passage]:
    """All together."""
    found: list[Passage] = []
    for value in values:
        found += value if isinstance(value, list) else [Passage(text(value))]
    return found


def part(value: Value, number: int, count: int) -> str:
    """The ``number``-th of ``count`` about equal parts; no word is cut."""
    pieces: Sequence[str] = [each.text for each in value] if isinstance(value, list) else text(value).split()
    start, end = (len(pieces) * n // count for n in (number, number + 1))
    return ("\n\n" if isinstance(value, list) else " ").join(pieces[start:end])


def vector(embedding: str | list[float]) -> Vector:
    """From an engine's answer, numbers or base64. DataError for anything else."""
    try:
        if isinstance(embedding, str):
            return np.frombuffer(base64.b64decode(embedding), "<f4").astype(np.float32)
        return np.asarray(embedding, np.float32)
    except (ValueError, TypeError) as error:
        raise DataError(f"the engine's embedding is no vector: {error}") from error
