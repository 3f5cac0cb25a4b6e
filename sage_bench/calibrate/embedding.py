"""Calibration of an embedding engine: texts alone and at once, batches read off the instants at which they end.

An engine answers all texts of a batch together, so answers that end at once were one batch, and from the end of one to the
end of the next it worked on the next. A text alone has come through HTTP besides, which is the ingress.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from sage_bench.calibrate.fit import Fit, Terms
from sage_bench.calibrate.llm import (
    LOADS,
    LOADS_SHARE,
    REPEATS,
    REQUESTS_MIN,
    ROUNDS_MAX,
    ROUNDS_MIN,
    ROUNDS_SHARE,
    Tried,
)
from sage_bench.calibrate.observation import Condition, Observation, Repeated, mean_scatter, repeated
from sage_bench.calibrate.shots import Answers, Range, Shot
from sage_bench.calibrate.twin import measured, simulated
from sage_core.rng import Streams
from sage_sim.engine import EmbedReplica
from sage_sim.iteration import IterationWork
from sage_sim.profile import FitError, Phase

COUNTS: Final = (2, 4, 8, 16, 32)
"""Texts at once."""

TOGETHER: Final = 0.5
"""Most that the answers of two batches may take to be told, over the time of the later batch."""


class CalibratedEmbedding(NamedTuple):
    """What was found. ``padding`` and the largest batch are as given: instants do not tell them."""

    lengths: list[int]
    positions: int
    observations: list[Repeated]
    fit: Fit
    errors: dict[Phase, FitError]
    max_batch_tasks: int
    max_batch_tokens: int
    padding: bool
    tried: list[Tried]
    rounds: int
    requests: int
    seconds: float


class Batching(NamedTuple):
    """The engine's: most texts and tokens of a batch, longest text, and whether texts are padded to the longest."""

    max_batch_tasks: int
    max_batch_tokens: int
    positions: int
    padding: bool
    prompt_min: int = 1


async def calibrate(
    at: Range, batching: Batching, budget_s: float, streams: Streams, say: Callable[[str], None]
) -> CalibratedEmbedding:
    """Measure the engine behind ``at``. Raises DataError for one that does not answer as asked."""
    began = time.monotonic()
    lengths = _lengths(batching)
    volleys: list[tuple[Shot, ...]] = [(Shot(0, length, 0),) for length in lengths]
    for count in COUNTS:
        if count <= batching.max_batch_tasks:
            volleys += [(Shot(0, length, 0),) * (count + 1) for length in (lengths[0], lengths[len(lengths) // 2])]
    await at.shoot(volleys[0])
    order = streams.stream("calibrate/order")
    fired: list[Answers] = []
    rounds = 0
    round_s = 0.0
    while rounds < ROUNDS_MIN or (
        rounds < 4 * ROUNDS_MAX and time.monotonic() + round_s < began + ROUNDS_SHARE * budget_s
    ):
        round_began = time.monotonic()
        fired += [await at.shoot(volleys[number]) for number in order.permutation(len(volleys)).tolist()]
        rounds += 1
        round_s = max(round_s, time.monotonic() - round_began)
    say(f"{rounds} rounds of {len(volleys)} volleys in {time.monotonic() - began:.1f} s")

    def observed(answers: Sequence[Answers]) -> list[Repeated]:
        return repeated([each for volley in answers for each in _batches(volley, batching)])

    observations = observed(await at.timed(fired, lambda answers: mean_scatter(observed(answers))))
    knots = sorted({work.prefill_tokens for each in observations for _, work in each.median.works})
    terms = Terms(_thinned(knots))
    fit, errors = terms.solved(observations, streams)
    replica = replica_of(fit, batching)
    tried = await _tried(at, replica, batching, budget_s, streams, say)
    return CalibratedEmbedding(
        lengths,
        batching.positions,
        observations,
        fit,
        errors,
        batching.max_batch_tasks,
        batching.max_batch_tokens,
        batching.padding,
        tried,
        rounds,
        at.fired,
        time.monotonic() - began,
    )


def replica_of(fit: Fit, batching: Batching) -> EmbedReplica:
    """The engine, simulated."""
    return EmbedReplica(
        0,
        "embed",
        fit.time.law(),
        batching.max_batch_tasks,
        batching.max_batch_tokens,
        batching.padding,
        ingress_ns=round(fit.ingress_us * 1e3),
    )


def _lengths(batching: Batching) -> list[int]:
    longest = min(batching.positions, batching.max_batch_tokens)
    lengths = {max(batching.prompt_min, 4), longest}
    power = 16
    while power < longest:
        lengths.add(max(power, batching.prompt_min))
        power *= 2
    return sorted(lengths)


def _batches(answers: Answers, batching: Batching) -> list[Observation]:
    """A lone text, or the later of the two batches into which texts that were sent at once fell: the first took what had come
    by then, the second the rest."""
    length = answers.shots[0].input_tokens
    if len(answers.shots) == 1:
        time_us = float(answers.ended_ns[0] - answers.sent_ns[0]) / 1e3
        return [Observation(Condition("prefill", f"text {length}", True), ((1.0, _batch(length, 1)),), time_us)]
    order = np.argsort(answers.ended_ns, kind="stable")
    ended = answers.ended_ns[order]
    split = int(np.diff(ended).argmax()) + 1
    time_ns = float(ended[split] - ended[0])
    count = len(ended) - split
    together = (ended[split - 1] - ended[0]) + (ended[-1] - ended[split]) < TOGETHER * time_ns
    waited = answers.sent_ns[order[split:]].max() < ended[0]
    if not (together and waited) or count > batching.max_batch_tasks or count * length > batching.max_batch_tokens:
        return []  # more than two batches, or one that had to wait for its texts
    condition = Condition("prefill", f"texts {length}, {count} at once", False)
    return [Observation(condition, ((1.0, _batch(length, count)),), time_ns / 1e3)]


def _batch(length: int, count: int) -> IterationWork:
    return IterationWork(0, 0, count, count * length, 0, count * length * length)


def _thinned(knots: Sequence[int]) -> list[int]:
    """Knots at least a quarter apart: more than that noise would bend."""
    kept = [knots[0]]
    for knot in knots[1:]:
        if knot >= 1.25 * kept[-1]:
            kept.append(knot)
    return kept


async def _tried(
    at: Range, replica: EmbedReplica, batching: Batching, budget_s: float, streams: Streams, say: Callable[[str], None]
) -> list[Tried]:
    span_s = LOADS_SHARE * budget_s / (len(LOADS) * REPEATS)
    many = _held_out(batching, 1.0, 8.0 * batching.max_batch_tasks, streams, "calibrate/capacity")
    ended_s = simulated(replica, many, np.zeros(len(many), np.int64)).e2e
    capacity = len(many) / float(ended_s.max())
    tried = []
    for share in LOADS:
        shots = _held_out(batching, share * capacity, span_s, streams, f"calibrate/load {share}")
        say(f"held-out load: {len(shots)} texts at {share * capacity:.1f} a second, {100 * share:.0f} % of capacity")
        answers = await at.timed([await at.shoot(shots) for _ in range(REPEATS)])
        twins = [simulated(replica, each.shots, each.sent_ns) for each in answers]
        tried.append(Tried(share, share * capacity, [measured(each) for each in answers], twins))
    return tried


def _held_out(batching: Batching, rate: float, span_s: float, streams: Streams, name: str) -> list[Shot]:
    rng = streams.stream(name)
    count = max(REQUESTS_MIN, round(rate * span_s))
    at_ns = np.cumsum(rng.exponential(1e9 / rate, count)).astype(np.int64)
    low = max(batching.prompt_min, 8)
    high = max(low + 1, min(batching.positions, batching.max_batch_tokens) // 2)
    sizes = np.exp(rng.uniform(math.log(low), math.log(high), count)).astype(np.int64)
    return [Shot(at, size, 0) for at, size in zip(at_ns.tolist(), sizes.tolist(), strict=True)]
