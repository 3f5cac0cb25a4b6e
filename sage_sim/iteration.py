"""How long one iteration takes: integer picoseconds, from tables that are linear between their knots.

An iteration works on n decoding sequences of ``kv_tokens`` context tokens in all, and on c chunks of P new prompt tokens
in all. Its time is a sum over the kernels that it launches::

    overhead
    + token(P + n)       whatever works token by token: matrix multiplications, experts, norms, all-reduce
    + head(c + n)        LM head and sampler, a row for each sequence in the iteration
    + attention          decode(n, kv_tokens) when nothing is prefilled, else
                         prefill + mixed(n, kv_tokens) + mixed_token * n * (P / c)

    prefill = base(P) + max(pair * sum p (ctx + p / 2), context * sum ctx / min(c, 2))

``token``, ``head`` and ``base`` are curves; ``decode`` and ``mixed`` are tables over n and the mean context. Why this
form, term by term:

* Decode attention beside a prefill runs in the kernel of the prefill, which shares no keys and values among the heads of
  a group and does not split long contexts: it takes 1.3 to 4 times its time alone, hence a table of its own. That kernel
  launches blocks for the longest chunk on behalf of every sequence, hence ``mixed_token`` (the mean chunk stands for the
  longest).
* Prefill attention computes a query-key pair at a fixed rate, but reads a context one tile after another, so a short
  chunk on a long context takes ``context`` per token of it. Two or more chunks keep the device busy side by side; a chunk
  fills half of it at least.
* Between knots a time is linear in the mean context, which grows by exactly one token an iteration, so successive decodes
  are an arithmetic series up to the next knot. That is what lets the native engine jump.

Beyond the last knot the last segment goes on; below the first the first value stands. Divisions round down. An embedding
batch is a prefill without a head. ``native/include/sage/iteration.hpp`` is the twin.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from sage_core.errors import ConfigError

Numbers: TypeAlias = dict[str, Any]
"""A configuration as the engines take it: whole numbers, and rows of them, by name."""

TIME_MAX = 10**15
"""Largest accepted time (ps): 1,000 s. Keeps products far from the limits of the native integers."""

KNOT_MAX = 2**31 - 1


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
    """Times in integer picoseconds at rising knots. Attention never falls along an axis; a curve never in its last segment.

    token_knots: tokens. head_knots: sequences. prefill_knots: new prompt tokens. attention_seqs, attention_context:
    the axes of decode_ps and mixed_ps, which hold a row of contexts for each number of sequences, one after another.
    prefill_pair: per query-key pair. prefill_context: per context token. mixed_token: per decoding sequence and token of
    the mean chunk. The head, decode and mixed figures mean nothing for an embedding engine. Raises ConfigError.
    """

    token_knots: tuple[int, ...] = (1,)
    token_ps: tuple[int, ...] = (1,)
    head_knots: tuple[int, ...] = (1,)
    head_ps: tuple[int, ...] = (0,)
    attention_seqs: tuple[int, ...] = (1,)
    attention_context: tuple[int, ...] = (1,)
    decode_ps: tuple[int, ...] = (0,)
    mixed_ps: tuple[int, ...] = (0,)
    mixed_token: int = 0
    prefill_knots: tuple[int, ...] = (1,)
    prefill_ps: tuple[int, ...] = (0,)
    prefill_pair: int = 0
    prefill_context: int = 0
    overhead: int = 0

    def __post_init__(self) -> None:
        for name in ("token_knots", "head_knots", "prefill_knots", "attention_seqs", "attention_context"):
            knots = getattr(self, name)
            _check_row(name, knots, KNOT_MAX)
            if any(low >= high for low, high in pairwise(knots)):
                raise ConfigError(f"iteration time: {name}: expected rising knots, got {knots}")
        for name, knots in (
            ("token_ps", self.token_knots),
            ("head_ps", self.head_knots),
            ("prefill_ps", self.prefill_knots),
        ):
            values = getattr(self, name)
            _check_times(name, values, len(knots))
            if values[-1] < values[-2:][0]:
                raise ConfigError(f"iteration time: {name}: falls at the end, where it goes on: {values[-2:]}")
        for name in ("decode_ps", "mixed_ps"):
            _check_table(name, getattr(self, name), self.attention_seqs, self.attention_context)
        if min(self.token_ps) < 1:
            raise ConfigError("iteration time: token_ps: expected at least 1 ps: no iteration takes no time")
        for name in ("mixed_token", "prefill_pair", "prefill_context", "overhead"):
            _check_row(name, (getattr(self, name),), TIME_MAX)

    def numbers(self) -> Numbers:
        """As the engines take it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def iteration_ps(self, work: IterationWork) -> int:
        """Duration of an LLM iteration."""
        seqs, kv_tokens, chunks, tokens, context, attention2 = work
        time = self.overhead + _at(self.token_knots, self.token_ps, seqs + tokens)
        time += _at(self.head_knots, self.head_ps, seqs + chunks)
        if tokens == 0:
            return time + self._attention_ps(self.decode_ps, seqs, kv_tokens)
        time += self._prefill_ps(tokens, attention2, context // min(chunks, 2))
        return time + self._attention_ps(self.mixed_ps, seqs, kv_tokens) + self.mixed_token * seqs * tokens // chunks

    def batch_ps(self, tokens: int, attention2: int) -> int:
        """Duration of an embedding batch of ``tokens`` (padding included) with ``attention2`` = sum of p * p."""
        return self.overhead + _at(self.token_knots, self.token_ps, tokens) + self._prefill_ps(tokens, attention2, 0)

    def _prefill_ps(self, tokens: int, attention2: int, context: int) -> int:
        line = max(self.prefill_pair * attention2 // 2, self.prefill_context * context)
        return _at(self.prefill_knots, self.prefill_ps, tokens) + line

    def _attention_ps(self, table: Sequence[int], seqs: int, kv_tokens: int) -> int:
        """Bilinear: across sequences at the contexts on either side, then along the context."""
        contexts = self.attention_context
        width = len(contexts)
        if seqs == 0:
            return 0
        if width == 1 or kv_tokens < seqs * contexts[0]:
            return _at(self.attention_seqs, table[::width], seqs)
        i = min(bisect_right(contexts, kv_tokens // seqs), width - 1) - 1
        low, high = (_at(self.attention_seqs, table[j::width], seqs) for j in (i, i + 1))
        per_token = max(0, high - low) // (contexts[i + 1] - contexts[i])
        return low + per_token * (kv_tokens - seqs * contexts[i]) // seqs


def _at(knots: Sequence[int], values: Sequence[int], x: int) -> int:
    if len(knots) == 1 or x <= knots[0]:
        return values[0]
    i = min(bisect_right(knots, x), len(knots) - 1) - 1
    return values[i] + (values[i + 1] - values[i]) * (x - knots[i]) // (knots[i + 1] - knots[i])


def _check_table(name: str, values: tuple[int, ...], rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    width = len(columns)
    _check_times(name, values, len(rows) * width)
    table = [values[i : i + width] for i in range(0, len(values), width)]
    if any(low > high for row in (*table, *zip(*table, strict=True)) for low, high in pairwise(row)):
        raise ConfigError(f"iteration time: {name}: expected times that never fall along an axis, got {values}")


def _check_times(name: str, values: tuple[int, ...], count: int) -> None:
    _check_row(name, values, TIME_MAX)
    if len(values) != count:
        raise ConfigError(f"iteration time: {name}: expected {count} times, one for each knot, got {len(values)}")


def _check_row(name: str, values: tuple[int, ...], most: int) -> None:
    wrong = [value for value in values if type(value) is not int or not 0 <= value <= most]
    if wrong or not values:
        raise ConfigError(
            f"iteration time: {name}: expected whole numbers from 0 to {most}, got {wrong[0] if wrong else 'none'!r}"
        )
