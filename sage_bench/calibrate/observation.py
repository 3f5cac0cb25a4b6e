"""What was measured, as equations: a time, and the iterations that it is the sum of.

No engine tells how long its iterations take. But tokens are told when an iteration ends, so between two tokens of one
answer lies a known number of iterations, and what each of them worked on follows from who was being answered. Read off
here:

* decode: while a fixed set of answers grows, the slope of instants over token numbers. A slope over many tokens does not
  mind that an API server tells two tokens at once now and then.
* prefill: the first token of a lone prompt, which has come through the API server besides.
* mixed: what a prompt takes from those that are decoding, from before it is sent until after its first token: beside one
  of them, little more than its prefill, without the way through the API server.
* burst: prompts sent at once are answered in groups, one an iteration; between two groups lies the later one's iteration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sage_bench.calibrate.shots import Answers
from sage_sim.iteration import IterationWork
from sage_sim.profile import Phase

Works: TypeAlias = tuple[tuple[float, IterationWork], ...]
"""Iterations that follow one another, each with how often it takes place."""

TWO_TOKENS = 1.6
"""Least length of a gap in which two tokens may have come, over the median gap."""

SLOPE_TOKENS_MIN = 8
EDGE_TOKENS = 2
"""Left out at either end of a window: iterations in which somebody came or went."""


class Condition(NamedTuple):
    """What repetitions share. works: as designed; ``ingress``: whether the time contains the way into the engine."""

    phase: Phase
    name: str
    ingress: bool


@dataclass(frozen=True, slots=True)
class Observation:
    """``time_us`` is the sum of the iterations ``works`` and, with ``condition.ingress``, of the ingress."""

    condition: Condition
    works: Works
    time_us: float


def chunks(input_tokens: int, budget: int, seqs: int = 0, kv_tokens: int = 0) -> Works:
    """Iterations that prefill one prompt beside ``seqs`` decoding sequences of ``kv_tokens`` context in all."""
    works = []
    done = 0
    while done < input_tokens:
        size = min(budget - seqs, input_tokens - done)
        works.append((1.0, IterationWork(seqs, kv_tokens, 1, size, done, size * (2 * done + size))))
        done += size
    return tuple(works)


def of_prefill(answers: Answers, budget: int) -> list[Observation]:
    """A lone prompt."""
    tokens = answers.shots[0].input_tokens
    time_us = float(answers.first_ns[0] - answers.sent_ns[0]) / 1e3
    return [Observation(Condition("prefill", f"prompt {tokens}", True), chunks(tokens, budget), time_us)]


def of_decode(answers: Answers, name: str) -> list[Observation]:
    """Answers that end one after another: an observation for each number of them."""
    found = []
    start = float(max(of[min(EDGE_TOKENS, len(of) - 1)] for of in answers.tokens_ns))
    for end in sorted({float(of[-1]) for of in answers.tokens_ns}):
        live = [i for i, of in enumerate(answers.tokens_ns) if of[-1] >= end]
        window = _slope_us(answers, live, start, end)
        if window is not None:
            slope_us, context = window
            work = IterationWork(seqs=len(live), kv_tokens=round(len(live) * context))
            condition = Condition("decode", f"{name}, {len(live)} sequences", False)
            found.append(Observation(condition, ((1.0, work),), slope_us))
        start = end
    return found


def of_mixed(answers: Answers, budget: int, name: str) -> list[Observation]:
    """Prompts (the shots of one output token) sent while all others decode, one after another."""
    prompts = [i for i, shot in enumerate(answers.shots) if shot.output_tokens == 1]
    decodes = [i for i, shot in enumerate(answers.shots) if shot.output_tokens > 1]
    started = max(answers.tokens_ns[i][0] for i in decodes)
    ended = min(answers.tokens_ns[i][-1] for i in decodes)
    found = []
    for place, prompt in enumerate(prompts):
        sent, first = answers.sent_ns[prompt], answers.first_ns[prompt]
        next_sent = answers.sent_ns[prompts[place + 1]] if place + 1 < len(prompts) else ended
        spans, counts, contexts = [], [], []
        for i in decodes:
            of = answers.tokens_ns[i]
            low = int(np.searchsorted(of, sent)) - 1
            high = int(np.searchsorted(of, first, side="right")) + 1  # at the end of an iteration like the first
            if answers.whole(i) and sent > started and high < len(of) and of[high] <= next_sent:
                spans.append(float(of[high] - of[low]) / 1e3)
                counts.append(high - low)
                contexts.append(answers.shots[i].input_tokens + (low + high) / 2)
        if not spans:
            continue  # it missed them, or met the next one
        kv_tokens = round(len(decodes) * sum(contexts) / len(contexts))
        prefill = chunks(answers.shots[prompt].input_tokens, budget, len(decodes), kv_tokens)
        plain = float(np.median(counts)) - len(prefill)
        if plain >= 0:  # else it was told so late that the window cannot be trusted
            condition = Condition("mixed", f"prompt {answers.shots[prompt].input_tokens} {name}", False)
            works = ((plain, IterationWork(seqs=len(decodes), kv_tokens=kv_tokens)), *prefill)
            found.append(Observation(condition, works, float(np.median(spans))))
    return found


def of_burst(answers: Answers, budget: int, name: str, apart_ns: float) -> list[Observation]:
    """Prompts of one output token each, sent at once. apart_ns: between the last of a group and the first of the next."""
    order = np.argsort(answers.first_ns, kind="stable")
    at = answers.first_ns[order]
    groups = np.split(order, np.flatnonzero(np.diff(at) > apart_ns) + 1)
    found = []
    for before, group in pairwise(groups):
        sizes = [answers.shots[i].input_tokens for i in group]
        if sum(sizes) > budget or max(answers.sent_ns[group]) > answers.first_ns[before].max():
            continue  # more than one iteration, or some of them were not there when it began
        work = IterationWork(0, 0, len(sizes), sum(sizes), 0, sum(size * size for size in sizes))
        # Answers of a group are told one by one; the middle of each stands for it.
        time_us = float(np.median(answers.first_ns[group]) - np.median(answers.first_ns[before])) / 1e3
        found.append(Observation(Condition("prefill", f"{name}, {len(sizes)} at once", False), ((1.0, work),), time_us))
    return found


def mended(answers: Answers) -> Answers:
    """With an instant for every token, where servers that were late put two into one event and it is clear where.

    It is clear when there are as many gaps of two iterations as tokens without an instant, where a gap in which another
    answer began is not counted: a prefill makes it long.
    """
    firsts = np.sort(answers.first_ns)
    tokens_ns = list(answers.tokens_ns)
    for i, of in enumerate(tokens_ns):
        missing = answers.shots[i].output_tokens - len(of)
        if missing < 1 or len(of) < SLOPE_TOKENS_MIN:
            continue
        gaps = np.diff(of)
        begun = {int(np.abs(of[1:] - first).argmin()) for first in firsts.tolist()}
        long = [int(j) for j in np.flatnonzero(gaps > TWO_TOKENS * np.median(gaps)) if int(j) not in begun]
        if len(long) == missing:
            tokens_ns[i] = np.sort(np.concatenate([of, (of[long] + of[[j + 1 for j in long]]) // 2]))
    return replace(answers, tokens_ns=tokens_ns)


class Repeated(NamedTuple):
    """An observation's median over its repetitions, how far they scatter (median absolute deviation over the median), and
    how many there were."""

    median: Observation
    scatter: float
    times: int


def repeated(observations: Iterable[Observation]) -> list[Repeated]:
    """By condition, in order of appearance. The median of times; the works of the observation nearest to it."""
    conditions: dict[Condition, list[Observation]] = {}
    for each in observations:
        conditions.setdefault(each.condition, []).append(each)
    found = []
    for condition, group in conditions.items():
        # Works differ a little between repetitions (when exactly a prompt came); per iteration they are comparable.
        per = np.array([each.time_us / sum(count for count, _ in each.works) for each in group])
        middle = group[int(np.argsort(per, kind="stable")[len(per) // 2])]
        median = float(np.median(per)) * sum(count for count, _ in middle.works)
        scatter = float(np.median(np.abs(per - np.median(per))) / np.median(per))
        found.append(Repeated(Observation(condition, middle.works, median), scatter, len(group)))
    return found


def mean_scatter(observations: Sequence[Repeated]) -> float:
    """Over the conditions."""
    return float(np.mean([each.scatter for each in observations]))


def _slope_us(answers: Answers, live: Sequence[int], start: float, end: float) -> tuple[float, float] | None:
    """Time per token (us) in a window, the median over the answers ``live``, and their mean context."""
    slopes, contexts = [], []
    for i in live:
        of = answers.tokens_ns[i]
        low, high = int(np.searchsorted(of, start, side="right")), int(np.searchsorted(of, end, side="right"))
        low, high = low + EDGE_TOKENS, high - EDGE_TOKENS
        if high - low < SLOPE_TOKENS_MIN:
            return None
        if answers.whole(i):
            slopes.append(_slope(of[low:high]) / 1e3)
            contexts.append(answers.shots[i].input_tokens + (low + high) / 2)
    return (float(np.median(slopes)), sum(contexts) / len(contexts)) if slopes else None


def _slope(instants: NDArray[np.int64]) -> float:
    """Least squares of instants over 0, 1, 2, ..."""
    number = np.arange(len(instants)) - (len(instants) - 1) / 2
    return float(number @ (instants - instants.mean()) / (number @ number))
