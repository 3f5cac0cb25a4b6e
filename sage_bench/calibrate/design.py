"""Which requests tell what: the volleys of a calibration of an LLM engine.

A *round* is all of them once; a calibration repeats rounds, each in an order of its own, so that a slow minute of the
machine does not fall on one condition. A round has

* lone prompts of rising lengths, up to several times the token budget;
* ladders: as many sequences as the engine takes, which end half by half, at contexts from the shortest to the longest:
  decode at every power of two;
* injections: prompts of rising lengths, one after another, into one running decode and into batches of them. What they
  take is read off the tokens of the others, so neither HTTP nor the API server is in it;
* bursts: prompts sent at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

from sage_bench.calibrate.shots import Shot
from sage_sim.iteration import KNOT_MAX

LADDER_TOKENS = 24
"""Iterations at each number of sequences."""

SHORT = 16
"""Tokens of the shortest prompts; a chat template may make them longer."""

APART_TOKENS = 8
"""Iterations without a prompt between two injections."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The engine's. positions: longest sequence. kv_tokens: of its cache. prompt_min, prompt_max: of the prompts that can be,
    and should be, made."""

    max_num_seqs: int
    max_num_batched_tokens: int
    positions: int
    kv_tokens: int
    prompt_min: int = 1
    prompt_max: int = KNOT_MAX


class Pace(NamedTuple):
    """What a first look found, to know what can be afforded: seconds of an iteration that decodes one sequence, or as many
    as the engine takes, and of a prompt token."""

    decode_s: float
    batch_s: float
    token_s: float


Kind: TypeAlias = Literal["prefill", "decode", "mixed", "burst"]


class Volley(NamedTuple):
    """Shots that belong together, and what is to be read off them."""

    kind: Kind
    name: str
    shots: tuple[Shot, ...]


@dataclass(frozen=True, slots=True)
class Design:
    """What varies. prompts: lengths of lone ones, rising. contexts: of the ladders. tokens: of iterations, by which the time
    of whatever works token by token can be told."""

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: tuple[int, ...]
    volleys: tuple[Volley, ...]

    def cost_s(self, pace: Pace) -> float:
        """About how long a round takes."""
        return sum(_cost_s(volley.shots, pace) for volley in self.volleys)


def designed(limits: Limits, pace: Pace, round_s: float) -> Design:
    """The largest round that takes at most about ``round_s``: its longest prompts and contexts are what gives."""
    longest = min(min(limits.positions, limits.kv_tokens) - LADDER_TOKENS, limits.prompt_max)
    while True:
        design = _design(limits, pace, longest)
        if design.cost_s(pace) <= round_s or longest <= 8 * max(SHORT, limits.prompt_min):
            return design
        longest = longest * 3 // 4


def _design(limits: Limits, pace: Pace, longest: int) -> Design:
    budget, seqs = limits.max_num_batched_tokens, limits.max_num_seqs
    short = max(SHORT, limits.prompt_min)
    prompts = _lengths(limits.prompt_min, budget, longest)
    steps = seqs.bit_length() + 1
    room = min(limits.kv_tokens // seqs, limits.positions) - steps * LADDER_TOKENS
    farthest = max(short, min(longest, room))
    contexts = tuple(sorted({short, *(max(short, farthest // part) for part in (16, 4, 1))}))
    volleys = [Volley("prefill", f"prompt {length}", (Shot(0, length, 1),)) for length in prompts]
    volleys += [Volley("decode", f"context {context}", ladder(seqs, context, budget)) for context in contexts]
    injected = _injected(short, min(budget, longest))
    batches = {(1, short), (max(1, seqs // 4), contexts[-2]), (seqs - 1, short), (seqs - 1, contexts[-2])}
    for decoding, context in sorted(batches):
        if decoding:
            lengths = injected if decoding == 1 else injected[-1::-2][::-1]
            shots = injections(decoding, context, [min(each, budget - decoding) for each in lengths], pace)
            volleys.append(Volley("mixed", f"beside {decoding} of {context}", shots))
    together = set()
    for count in sorted({min(seqs, 4), seqs}):
        length = max(short, min(budget // (2 * count), longest))
        volleys.append(Volley("burst", f"prompts {length}", (Shot(0, length, 1),) * count))
        together.add(max(count - 1, 1) * length)  # the first usually goes alone
    decodes = {1 << n for n in range(seqs.bit_length())} | {seqs}
    tokens = {
        *decodes,
        *(length for length in prompts if length <= budget),
        *(length + 1 for length in injected),
        *together,
    }
    return Design(prompts, contexts, tuple(sorted(tokens)), tuple(volleys))


def ladder(seqs: int, context: int, budget: int) -> tuple[Shot, ...]:
    """``seqs`` answers that end half by half, each number of them lasting :data:`LADDER_TOKENS` iterations.

    Prompts that do not fit one iteration together start one after another, and early answers grow meanwhile: they are
    that much longer.
    """
    sizes = [seqs]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    steps = [step for step, (size, rest) in enumerate(pairwise([*sizes, 0]), 1) for _ in range(size - rest)]
    late = [(seqs - 1 - i) * context // budget for i in range(seqs)]
    return tuple(Shot(0, context, step * LADDER_TOKENS + more) for step, more in zip(steps, late, strict=True))


def injections(seqs: int, context: int, lengths: Sequence[int], pace: Pace) -> tuple[Shot, ...]:
    """``seqs`` decodes, and prompts of one output token that come while all of them are under way, each when the one before
    should be done."""
    at_s = 1.5 * pace.token_s * seqs * context + 8 * pace.batch_s
    prompts = []
    for length in lengths:
        prompts.append(Shot(round(at_s * 1e9), length, 1))
        at_s += 1.5 * pace.token_s * length + (APART_TOKENS + 2) * pace.batch_s
    return (*(Shot(0, context, round(at_s / pace.decode_s)),) * seqs, *prompts)


def _lengths(low: int, budget: int, longest: int) -> tuple[int, ...]:
    """The shortest prompt, halfway between powers of two to the budget, the budget itself, and beyond it."""
    within = min(budget, longest)
    halfway = {max(3 * power // 2, low) for power in _powers(SHORT, within)}
    beyond = {min(2 * budget, longest), longest}
    return tuple(sorted({max(low, 2), within} | {each for each in halfway if each < within} | beyond))


def _injected(low: int, within: int) -> tuple[int, ...]:
    """Powers of two, so that together with the lone prompts no octave is told by one length alone: kernels work in tiles, and
    one token more than a tile can take as long as a whole one."""
    return tuple(sorted({max(power, low) for power in _powers(SHORT, within)} | {within - 1}))


def _powers(low: int, high: int) -> list[int]:
    """Powers of two from ``low`` (one of them), below ``high``."""
    return [low << n for n in range(high.bit_length()) if low << n < high]


def _cost_s(shots: Sequence[Shot], pace: Pace) -> float:
    prompts = sum(shot.input_tokens for shot in shots)
    return pace.token_s * prompts + pace.batch_s * (max(shot.output_tokens for shot in shots) + 2) + 0.05
