"""Runs one request through its pipeline: which stages are ready, and when the request is done. Sizes only."""

from __future__ import annotations

from sage_core.pipeline import REQUEST_INPUT, Pipeline, Stage


class Run:
    """The state of one request's graph. A stage becomes ready exactly once."""

    __slots__ = ("_missing", "_values", "pipeline")

    def __init__(self, pipeline: Pipeline, input_tokens: int) -> None:
        self.pipeline = pipeline
        self._values = {REQUEST_INPUT: input_tokens}
        self._missing = list(pipeline.needs)

    def work(self, stage: Stage, output_tokens_cap: int) -> tuple[int, int]:
        """(input tokens, maximum output tokens) of a ready stage."""
        work = stage.work(self._values)
        most = output_tokens_cap if work.output_tokens_max is None else work.output_tokens_max
        return work.input_tokens, most

    def finished(self, index: int, output_tokens: int) -> list[Stage]:
        """``index`` is done with ``output_tokens``; the stages that became ready by it."""
        self._values[index] = output_tokens
        ready = []
        for follower in self.pipeline.stages[index].followers:
            self._missing[follower] -= 1
            if self._missing[follower] == 0:
                ready.append(self.pipeline.stages[follower])
        return ready

    @property
    def done(self) -> bool:
        """The output stage has its result."""
        return self.pipeline.output in self._values
