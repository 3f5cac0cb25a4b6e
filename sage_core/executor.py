"""Runs one request through its pipeline: which stages are ready, when each is due, and when the request is done. Sizes
only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Final, NamedTuple

from sage_core.pipeline import REQUEST_INPUT, Pipeline, Stage
from sage_core.policy import Speed
from sage_core.units import NEVER


class Run:
    """The state of one request's graph. Every stage is settled exactly once: it becomes ready, or it is skipped."""

    __slots__ = ("_missing", "_sizes", "_skipped", "pipeline")

    def __init__(self, pipeline: Pipeline, input_tokens: int) -> None:
        self.pipeline = pipeline
        self._sizes = {REQUEST_INPUT: input_tokens}
        self._skipped: set[int] = set()
        self._missing = list(pipeline.needs)

    def work(self, stage: Stage, output_tokens_cap: int) -> tuple[int, int]:
        """(input tokens, maximum output tokens) of a ready stage."""
        return _work(self.pipeline, stage, self._sizes, output_tokens_cap)

    def finished(self, index: int, size: int) -> list[Stage]:
        """``index`` is done with a result of ``size`` (its output tokens, or its outcome); the stages that became ready
        by it. What takes no time is done on the way."""
        self._sizes[index] = size
        ready = []
        settled = [index]
        stages = self.pipeline.stages
        for at in settled:  # grows while it is walked
            for follower in stages[at].followers:
                self._missing[follower] -= 1
                if self._missing[follower]:
                    continue
                stage = stages[follower]
                if not stage.runs(self._sizes):
                    self._skipped.add(follower)
                    settled.append(follower)
                elif stage.free:
                    self._sizes[follower] = stage.work(self._sizes).input_tokens
                    settled.append(follower)
                else:
                    ready.append(stage)
        return ready

    @property
    def done(self) -> bool:
        """The output stage has its result, or will have none because it was skipped."""
        return self.pipeline.output in self._sizes or self.pipeline.output in self._skipped

    def due(
        self, stage: Stage, ttft_due_at: int, due_at: int, output_tokens_cap: int, speeds: Sequence[Speed]
    ) -> tuple[int, int]:
        """(instant at which the first token of ``stage`` is due, instant at which its result is), ns.

        The first token of a stage whose tokens answer the request is due when that of the request is, unless another is
        predicted to answer after it (a turn of a loop that goes on). Any other has no first token that anybody waits for,
        and is due early enough for what is predicted to come after it: for the whole answer, and for the first token of
        it. speeds: of the pool of each stage; work on an idle replica takes no longer.
        """
        stages = self.pipeline.stages
        answers = stage.index in self.pipeline.answering
        if answers and not any(stages[i].followers or not stages[i].free for i in stage.followers):
            return ttft_due_at, due_at  # nothing can come after it
        forecast = self.forecast(output_tokens_cap, speeds)
        to_end_ns, to_first_ns = int(forecast.to_end_ns[stage.index]), int(forecast.to_first_ns[stage.index])
        if stage.index in forecast.streams:
            return ttft_due_at, due_at - to_end_ns if due_at < NEVER else NEVER
        due: int = NEVER
        for at, path_ns in ((due_at, to_end_ns), (ttft_due_at, to_first_ns)):
            if at < NEVER:
                due = min(due, at - path_ns)
        return NEVER, due

    def forecast(self, output_tokens_cap: int, speeds: Sequence[Speed]) -> Forecast:
        """What is predicted of the stages that are not done: results that are not there yet have their typical size,
        and decisions their typical outcome. speeds: of the pool of each stage."""
        stages, answering = self.pipeline.stages, self.pipeline.answering
        sizes = dict(self._sizes)
        costs: dict[int, Cost] = {}
        for each in stages:
            index = each.index
            if index in sizes or index in self._skipped or not each.runs(sizes):
                continue
            if each.free:
                sizes[index] = each.work(sizes).input_tokens
                costs[index] = Cost(sizes[index], 0, 0.0, 0.0)
                continue
            tokens, most = _work(self.pipeline, each, sizes, output_tokens_cap)
            sizes[index] = (most or tokens) if each.typical is None else each.typical
            speed = speeds[index]
            first_ns = speed.fixed_ns + speed.input_token_ns * tokens
            made = min(sizes[index], most) if most else 0
            costs[index] = Cost(tokens, made, first_ns, first_ns + speed.output_token_ns * made)
        to_end: dict[int, float] = {}
        to_first: dict[int, float] = {}
        streams: set[int] = set()
        answered: set[int] = set()  # stages that answer, or have one after them that does
        for each in reversed(stages):
            index, end, first = each.index, 0.0, 0.0
            for i in each.followers:
                cost = costs.get(i, _SKIPPED)
                end = max(end, cost.ns + to_end[i])
                first = max(first, cost.first_ns if i in streams else cost.ns + to_first[i])
            to_end[index], to_first[index] = end, first
            answers = index in answering and index in costs
            if not answered.isdisjoint(each.followers):
                answered.add(index)
            elif answers:
                streams.add(index)
                answered.add(index)
        return Forecast(costs, to_end, to_first, streams)


class Cost(NamedTuple):
    """Predicted cost of a stage on an idle replica: tokens in and out, time to its first token and to its end (ns)."""

    input_tokens: int
    output_tokens: int
    first_ns: float
    ns: float


_SKIPPED: Final = Cost(0, 0, 0.0, 0.0)
"""A stage that does not run takes no time; yet whatever waits for it waits for the decision that it does not."""


class Forecast(NamedTuple):
    """By stage: its cost, of those that are expected to run; and the time of the critical path from its end to the end
    of the answer, and to its first token (ns). streams: stages whose tokens are expected to be the answer."""

    costs: Mapping[int, Cost]
    to_end_ns: Mapping[int, float]
    to_first_ns: Mapping[int, float]
    streams: Set[int]


def _work(pipeline: Pipeline, stage: Stage, sizes: Mapping[int, int], cap: int) -> tuple[int, int]:
    """(input tokens, maximum output tokens). ``cap``: the client's. It bounds what answers, and stages that have no bound
    of their own; what a stage in between may write is the pipeline's business."""
    work = stage.work(sizes)
    most = work.output_tokens_max
    if most is None:
        return work.input_tokens, cap
    return work.input_tokens, min(most, cap) if cap and stage.index in pipeline.answering else most
