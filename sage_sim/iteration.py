"""How long one iteration takes: integer picoseconds, linear in a few sums over the batch.

Separate forms for decode, prefill and mixed iterations, because one joint linear fit is not enough (the errors are in
the profiles). With ``seqs`` decoding sequences of ``kv_tokens`` context tokens in all, and prefill chunks of p tokens
on top of ctx already computed, ``P = sum p`` and ``A2 = sum p * (2 * ctx + p)`` (twice the attended token pairs):

* decode   ``decode_base + decode_seq * seqs + decode_kv * kv_tokens``
* prefill  ``max(prefill_floor, prefill_base + prefill_token * P + prefill_attn * A2 / 2)``
* mixed    prefill ``+ (decode_seq * seqs + decode_kv * kv_tokens) * mixed_permille / 1000``
* an embedding batch is a prefill of its (padded) tokens.

``overhead`` is added to each, divisions round down, and nothing takes less than one picosecond. Integers make the sum
of k decode iterations an exact arithmetic series, which is what lets the native engine jump. ``IterationTime`` in
``native/include/sage/engine.hpp`` is its twin; another law of iteration time (a table) goes in these two places.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from sage_core.errors import ConfigError

COEFFICIENT_MAX = 10**15
"""Largest accepted coefficient (ps): 1,000 s. Keeps products far from the limits of the native integers."""


class IterationWork(NamedTuple):
    """What one LLM iteration works on. A chunk is the part of one prompt that it prefills."""

    seqs: int = 0  # decoding sequences
    kv_tokens: int = 0  # their context, in all
    chunks: int = 0  # prompts of which a chunk is prefilled
    prefill_tokens: int = 0  # new prompt tokens, over all chunks
    prefill_context: int = 0  # tokens computed before, under the chunks
    attention2: int = 0  # sum over chunks of p * (2 * context + p)


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTime:
    """Coefficients in integer picoseconds (ps, ps per sequence, ps per token, ps per token pair), all from 0.

    The ``decode_*`` and ``mixed_permille`` figures mean nothing for an embedding engine. Raises ConfigError.
    """

    decode_base: int = 1
    decode_seq: int = 0
    decode_kv: int = 0
    prefill_floor: int = 0
    prefill_base: int = 0
    prefill_token: int = 0
    prefill_attn: int = 0
    mixed_permille: int = 1000
    overhead: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name == "decode_base" else 0
            if type(value) is not int or not least <= value <= COEFFICIENT_MAX:
                raise ConfigError(
                    f"iteration time: {field.name}: expected a whole number from {least} to {COEFFICIENT_MAX}, got {value!r}"
                )

    def iteration_ps(self, work: IterationWork) -> int:
        """Duration of an LLM iteration."""
        decode = self.decode_seq * work.seqs + self.decode_kv * work.kv_tokens
        if work.prefill_tokens == 0:
            return self.overhead + self.decode_base + decode
        prefill = self._prefill_ps(work.prefill_tokens, work.attention2)
        return max(1, self.overhead + prefill + decode * self.mixed_permille // 1000)

    def batch_ps(self, tokens: int, attention2: int) -> int:
        """Duration of an embedding batch of ``tokens`` (padding included) with ``attention2`` (A2)."""
        return max(1, self.overhead + self._prefill_ps(tokens, attention2))

    def _prefill_ps(self, tokens: int, attention2: int) -> int:
        line = self.prefill_base + self.prefill_token * tokens + self.prefill_attn * attention2 // 2
        return max(self.prefill_floor, line)
