"""What an emulated engine says: made up, the same for the same request, and exactly as long as asked.

A token of synthetic text is four bytes, a space and three letters, and a text of unknown tokens counts one for every four
bytes begun. So what an emulated engine generates counts for as much when it comes back in the next prompt.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

TOKEN_BYTES: Final = 4
"""Of a token of synthetic text; and what a token of any text is taken to have, where nobody says how many there are."""

MESSAGE_TOKENS: Final = 4
"""What a chat template is taken to add to each message."""

_TEXT_TOKENS = 1 << 14
_VECTOR_SEEDS = 1 << 16
_CONTENT_MASK = 2**63 - 1


def estimated_tokens(text: bytes) -> int:
    """Tokens of a text that nobody counted."""
    return max(1, -(-len(text) // TOKEN_BYTES))


def seed_of(prompt: bytes | Sequence[int], seed: int | None) -> int:
    """32 bits that are equal for equal prompts and seeds, in every process."""
    data = prompt if isinstance(prompt, bytes) else repr(prompt).encode()
    return zlib.crc32(data, (seed or 0) & 0xFFFFFFFF)


def output_length(seed: int, mean: int, cap: int, least: int) -> int:
    """Output tokens of a request that leaves the end to the model: exponential with this mean, from ``seed``, within
    ``max(1, least)`` and ``cap``."""
    uniform = ((seed * 0x9E3779B1 & 0xFFFFFFFF) + 0.5) / 2**32  # the bits of a CRC of short texts are not mixed enough
    drawn = 1 + int(-math.log(uniform) * (mean - 1))
    return min(cap, max(drawn, least))


def content_ids(prompt: bytes | Sequence[int], input_tokens: int, block_size: int) -> tuple[int, ...]:
    """Ids of the KV blocks that a prompt begins with, for the prefix cache: equal as far as prompts are equal.

    Token ids are cut into blocks as an engine does; a text is cut every ``4 block_size`` bytes, which is close to it.
    The ids hold within one process.
    """
    step = block_size * TOKEN_BYTES if isinstance(prompt, bytes) else block_size
    blocks = min(input_tokens // block_size, len(prompt) // step)
    ids = []
    content = 0
    for start in range(0, blocks * step, step):
        piece = prompt[start : start + step]
        content = hash((content, piece if isinstance(piece, bytes) else tuple(piece))) & _CONTENT_MASK
        ids.append(content)
    return tuple(ids)


class Words:
    """An endless text of which any stretch is a slice."""

    def __init__(self) -> None:
        draw = np.random.Generator(np.random.PCG64(7))
        syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in "lmnrst"]
        chosen = draw.choice(len(syllables), _TEXT_TOKENS)
        self._text = "".join(f" {syllables[place]}" for place in chosen).encode()

    def text(self, seed: int, start: int, count: int) -> bytes:
        """Tokens ``start`` to ``start + count`` of the answer to ``seed``; plain ASCII that needs no escape in JSON."""
        place = (seed + start) % _TEXT_TOKENS
        if place + count <= _TEXT_TOKENS:
            return self._text[TOKEN_BYTES * place : TOKEN_BYTES * (place + count)]
        first = self._text[TOKEN_BYTES * place :]
        whole, rest = divmod(count - (_TEXT_TOKENS - place), _TEXT_TOKENS)
        return first + self._text * whole + self._text[: TOKEN_BYTES * rest]


class Vectors:
    """Unit vectors, equal for equal seeds and as good as orthogonal for others."""

    def __init__(self, dimensions: int) -> None:
        draw = np.random.Generator(np.random.PCG64(11))
        self._noise = draw.standard_normal(_VECTOR_SEEDS + dimensions).astype(np.float32)
        self.dimensions = dimensions

    def vector(self, seed: int, dimensions: int | None = None) -> NDArray[np.float32]:
        """(dimensions,) of the 32-bit ``seed``."""
        size = dimensions or self.dimensions
        low, high = seed & 0xFFFF, seed >> 16 & 0xFFFF
        # Weighted, or swapping the halves of a seed would give the same vector.
        vector = self._noise[low : low + size] + np.float32(0.7) * self._noise[high : high + size]
        vector /= np.sqrt(vector @ vector)
        return vector


_encode = msgspec.json.Encoder().encode


def encoded_vector(vector: NDArray[np.float32], as_base64: bool) -> bytes:
    """A JSON value as OpenAI has it: a list of numbers, or base64 of little-endian float32."""
    if as_base64:
        return b'"%b"' % base64.b64encode(vector.astype("<f4", copy=False).tobytes())
    return _encode(vector.tolist())
