"""Calibration of an LLM engine: look, measure in rounds, fit, and try the fit on loads that it has not seen.

The budget of time goes to: a first look at how fast the engine is (a few requests), rounds of the designed volleys (half
of it, and never fewer than :data:`ROUNDS_MIN`), and held-out loads (two fifths): Poisson arrivals of mixed lengths at
half and at nine tenths of what the fitted engine could carry, each twice, so that the error stands beside the noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, NamedTuple

import numpy as np

from sage_bench.calibrate.design import Design, Limits, Pace, Volley, designed
from sage_bench.calibrate.fit import Fit, Terms
from sage_bench.calibrate.observation import (
    Observation,
    Repeated,
    mean_scatter,
    mended,
    of_burst,
    of_decode,
    of_mixed,
    of_prefill,
    repeated,
)
from sage_bench.calibrate.shots import Answers, Range, Shot
from sage_bench.calibrate.twin import Latencies, measured, simulated
from sage_core.rng import Streams
from sage_sim.engine import LlmReplica
from sage_sim.profile import FitError, Phase

ROUNDS_MIN: Final = 3
ROUNDS_MAX: Final = 12
ROUNDS_SHARE: Final = 0.5
LOADS_SHARE: Final = 0.4
LOADS: Final = (0.5, 0.9)
"""Of the capacity."""

REPEATS: Final = 2
REQUESTS_MIN: Final = 12
OUTPUTS: Final = (8, 64)
"""Output tokens of the held-out loads: drawn evenly, both included."""

SHARES: Final = (0.0, 0.5, 1.0)
"""Of the ingress that the API server may need for each request, one after another; the rest is mere latency."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A held-out load: what the engine did with it, time after time, and what its twin did with the same."""

    share: float
    rate: float
    measured: Sequence[Latencies]
    simulated: Sequence[Latencies]


class Calibrated(NamedTuple):
    """What was found. asynchronous: an iteration is decided when the one before starts. api_share: see ``SHARES``."""

    limits: Limits
    design: Design
    observations: list[Repeated]
    fit: Fit
    errors: dict[Phase, FitError]
    asynchronous: bool
    api_share: float
    tried: list[Tried]
    rounds: int
    requests: int
    seconds: float


class LlmEngine(NamedTuple):
    """Settings of the engine that the simulation needs beside its times."""

    block_size: int
    prefix_caching: bool


class Calibration:
    """Of the engine behind ``at``: ``look``, then rounds, as many and as far apart as one likes, then ``solved``.

    Its methods raise DataError for an engine that does not answer as asked.
    """

    def __init__(
        self,
        at: Range,
        limits: Limits,
        engine: LlmEngine,
        budget_s: float,
        streams: Streams,
        say: Callable[[str], None],
    ) -> None:
        self._at, self._limits, self._engine, self._budget_s = at, limits, engine, budget_s
        self._streams, self._say = streams, say
        self._order = streams.stream("calibrate/order")
        self._fired: list[tuple[Volley, Answers]] = []
        self._rounds = 0
        self._began = time.monotonic()

    async def look(self) -> None:
        """How fast it is, and so what a round is."""
        self._pace = pace = await _look(self._at, self._limits)
        self._say(
            f"a decode iteration takes about {pace.decode_s * 1e3:.1f} ms (1 sequence), {pace.batch_s * 1e3:.1f} ms (all)"
        )
        self._design = designed(self._limits, pace, ROUNDS_SHARE * self._budget_s / ROUNDS_MIN)

    async def round(self) -> float:
        """All volleys once, in an order of their own. Returns how long it took, in seconds."""
        began = time.monotonic()
        volleys = self._design.volleys
        for number in self._order.permutation(len(volleys)).tolist():
            self._fired.append((volleys[number], await self._at.shoot(volleys[number].shots)))
        self._rounds += 1
        took_s = time.monotonic() - began
        self._say(f"round {self._rounds}: {len(volleys)} volleys in {took_s:.1f} s")
        return took_s

    async def solved(self, *, loads: bool = True) -> Calibrated:
        """The fit to all rounds; with ``loads``, tried on held-out loads."""
        limits, design, engine = self._limits, self._design, self._engine
        self._at.reference = None  # all rounds have a say in it
        timed = await self._at.timed([answers for _, answers in self._fired], self._scatter)
        fired = self._with_volleys(timed)
        observations = _observed(fired, limits.max_num_batched_tokens, self._pace)
        terms = _terms(design, limits)
        fit, errors = terms.solved(observations, self._streams)
        replica, asynchronous, api_share = _scheduled(fit, limits, engine, fired)
        seen = replace(limits, prompt_max=design.prompts[-1])
        tried = await _tried(self._at, replica, seen, self._budget_s, self._streams, self._say) if loads else []
        seconds = time.monotonic() - self._began
        rounds, requests = self._rounds, self._at.fired
        return Calibrated(
            limits, design, observations, fit, errors, asynchronous, api_share, tried, rounds, requests, seconds
        )

    def _with_volleys(self, answers: Sequence[Answers]) -> list[tuple[Volley, Answers]]:
        return [(volley, mended(each)) for (volley, _), each in zip(self._fired, answers, strict=True)]

    def _scatter(self, answers: Sequence[Answers]) -> float:
        return mean_scatter(_observed(self._with_volleys(answers), self._limits.max_num_batched_tokens, self._pace))


async def calibrate(calibration: Calibration, budget_s: float) -> Calibrated:
    """Within about ``budget_s``."""
    until = time.monotonic() + ROUNDS_SHARE * budget_s
    await calibration.look()
    rounds = 0
    longest_s = 0.0
    while rounds < ROUNDS_MIN or (rounds < ROUNDS_MAX and time.monotonic() + longest_s < until):
        longest_s = max(longest_s, await calibration.round())
        rounds += 1
    return await calibration.solved()


def replica_of(fit: Fit, limits: Limits, engine: LlmEngine, *, asynchronous: bool, api_share: float) -> LlmReplica:
    """The engine, simulated. What was not measured is as in vLLM."""
    ingress_ns = round(fit.ingress_us * 1e3)
    api_server_ns = round(api_share * ingress_ns)
    return LlmReplica(
        0,
        "llm",
        fit.time.law(),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        block_size=engine.block_size,
        kv_blocks=limits.kv_tokens // engine.block_size,
        prefix_caching=engine.prefix_caching,
        async_scheduling=asynchronous,
        max_model_len=limits.positions,
        ingress_ns=ingress_ns - api_server_ns,
        api_server_ns=api_server_ns,
    )


# --- measuring --------------------------------------------------------------------------------------------------------


async def _look(at: Range, limits: Limits) -> Pace:
    short = max(limits.prompt_min, 2)

    async def decode_s(seqs: int) -> float:
        answers = await at.shoot((Shot(0, short, 16),) * seqs)
        return float(np.median([(of[-1] - of[0]) / (len(of) - 1) for of in answers.tokens_ns if len(of) > 1])) / 1e9

    async def first_s(length: int) -> float:
        answers = await at.shoot((Shot(0, length, 1),))
        return float(answers.first_ns[0] - answers.sent_ns[0]) / 1e9

    await first_s(short)  # whatever an engine does at its first request
    length = min(limits.max_num_batched_tokens, limits.positions // 2, 1024 + short)
    one_s, all_s = await decode_s(1), await decode_s(limits.max_num_seqs)
    prompt_s = await first_s(length) - await first_s(short)
    return Pace(one_s, max(one_s, all_s), max(prompt_s, 1e-6) / length)


def _observed(fired: Sequence[tuple[Volley, Answers]], budget: int, pace: Pace) -> list[Repeated]:
    found: list[Observation] = []
    for volley, answers in fired:
        if volley.kind == "prefill":
            found += of_prefill(answers, budget)
        elif volley.kind == "decode":
            found += of_decode(answers, volley.name)
        elif volley.kind == "mixed":
            found += of_mixed(answers, budget, volley.name)
        else:
            found += of_burst(answers, budget, volley.name, 0.5e9 * pace.decode_s)
    return repeated(found)


def _terms(design: Design, limits: Limits) -> Terms:
    powers = [1 << n for n in range(limits.max_num_seqs.bit_length())]
    return Terms(design.tokens, sorted({*powers, limits.max_num_seqs}), design.contexts)


# --- what only a simulation can tell --------------------------------------------------------------------------------


def _scheduled(
    fit: Fit, limits: Limits, engine: LlmEngine, fired: Sequence[tuple[Volley, Answers]]
) -> tuple[LlmReplica, bool, float]:
    """When iterations are decided, and whether requests queue before the engine: what explains best how long prompts that
    came into a running engine, or many at once, waited for their first token."""
    volleys = [answers for volley, answers in fired if volley.kind in ("mixed", "burst")]
    best: tuple[float, bool, float] | None = None
    for asynchronous, share in product((False, True), SHARES):
        replica = replica_of(fit, limits, engine, asynchronous=asynchronous, api_share=share)
        off = []
        for answers in volleys:
            prompts = np.array([shot.output_tokens == 1 for shot in answers.shots])
            ours = simulated(replica, answers.shots, answers.sent_ns).ttft[prompts]
            off.append(np.log(ours / measured(answers).ttft[prompts]))
        # The median of each volley's requests, so that one that the machine held up does not decide.
        score = float(np.mean([abs(float(np.median(each))) for each in off]))
        if best is None or score < best[0] - 1e-4:
            best = score, asynchronous, share
    assert best is not None
    _, asynchronous, share = best
    return replica_of(fit, limits, engine, asynchronous=asynchronous, api_share=share), asynchronous, share


async def _tried(
    at: Range, replica: LlmReplica, limits: Limits, budget_s: float, streams: Streams, say: Callable[[str], None]
) -> list[Tried]:
    span_s = LOADS_SHARE * budget_s / (len(LOADS) * REPEATS)
    capacity = _capacity(replica, limits, streams)
    loads = []
    for share in LOADS:
        rate = share * capacity
        loads.append((share, rate, held_out(limits, rate, span_s, streams, f"calibrate/load {share}")))
    answers: list[list[Answers]] = [[] for _ in loads]
    for _ in range(REPEATS):  # in turns: the machine's mood is not that of one load
        for place, (share, rate, shots) in enumerate(loads):
            say(f"held-out load: {len(shots)} requests at {rate:.2f} a second, {100 * share:.0f} % of capacity")
            answers[place].append(await at.shoot(shots))
    timed = [await at.timed(of) for of in answers]
    return [
        Tried(
            share,
            rate,
            [measured(each) for each in of],
            [simulated(replica, each.shots, each.sent_ns) for each in of],
        )
        for (share, rate, _), of in zip(loads, timed, strict=True)
    ]


def held_out(limits: Limits, rate: float, span_s: float, streams: Streams, name: str) -> list[Shot]:
    """Poisson arrivals at ``rate`` over ``span_s``, prompts of log-uniform lengths up to half the longest one allowed, and to
    a quarter of what the KV cache holds for each sequence."""
    rng = streams.stream(name)
    count = max(REQUESTS_MIN, round(rate * span_s))
    at_ns = np.cumsum(rng.exponential(1e9 / rate, count)).astype(np.int64)
    low = max(limits.prompt_min, 24)
    high = max(
        low + 1, min(limits.positions, limits.kv_tokens // limits.max_num_seqs, 4096, limits.prompt_max * 2) // 4
    )
    inputs = np.exp(rng.uniform(math.log(low), math.log(high), count)).astype(np.int64)
    outputs = rng.integers(OUTPUTS[0], OUTPUTS[1] + 1, count)
    return [Shot(*each) for each in zip(at_ns.tolist(), inputs.tolist(), outputs.tolist(), strict=True)]


def _capacity(replica: LlmReplica, limits: Limits, streams: Streams) -> float:
    """Requests a second of the held-out kind that the simulated engine completes when it always has some waiting."""
    shots = [
        shot._replace(at_ns=0)
        for shot in held_out(limits, 1.0, 8.0 * limits.max_num_seqs, streams, "calibrate/capacity")
    ]
    ended_s = simulated(replica, shots, np.zeros(len(shots), np.int64)).e2e
    middle = np.sort(ended_s)[: len(shots) - limits.max_num_seqs]  # until the batch begins to empty
    return float(len(middle) / middle[-1])
