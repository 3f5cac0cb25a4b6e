"""What a pipeline is expected to do on a cluster that is idle: when each stage starts and ends, and the critical path.

The arithmetic is that of the control plane's due times (:meth:`sage_core.executor.Run.forecast`): typical sizes and
outcomes, and for each pool the speed that its fastest replicas say they have. No queue, no batch, no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from sage_core.declared import Declared
from sage_core.events import ReplicaJoined
from sage_core.executor import Forecast, Run
from sage_core.pipeline import REQUEST_INPUT, Pipeline, bounds
from sage_core.policy import Speed


class StagePrediction(msgspec.Struct, frozen=True):
    """One stage. Instants and spans in ns, from the start of the request.

    op: kind of each part of a fused stage, joined by ``+``. pool: empty for what takes no time. after: what it waits for.
    when: its guards. served: the cluster has its pool. expected: it runs if sizes and outcomes are typical; times and
    tokens are 0 where it does not. answers: its tokens are the answer.
    """

    stage: str
    op: str
    parts: list[str]
    pool: str
    after: list[str]
    when: list[str]
    served: bool
    expected: bool
    input_tokens: int
    output_tokens: int
    start_ns: int
    end_ns: int
    critical: bool
    answers: bool


class Prediction(msgspec.Struct, frozen=True):
    """A pipeline on a cluster. total_ns, ttft_ns: null where no answer, or no token of one, is expected."""

    pipeline: str
    description: str
    input_tokens: int
    output_tokens_max: int
    deadlines: str
    stages: list[StagePrediction]
    critical_path: list[str]
    total_ns: int | None
    ttft_ns: int | None

    @property
    def missing_pools(self) -> list[str]:
        """Pools that stages need and the cluster does not have."""
        return list(dict.fromkeys(each.pool for each in self.stages if not each.served))


def speeds_of(replicas: Iterable[ReplicaJoined]) -> dict[str, Speed]:
    """The speed of each pool: of its fastest replica, cost by cost, as the plane sees it."""
    pools: dict[str, list[ReplicaJoined]] = {}
    for each in replicas:
        pools.setdefault(each.pool, []).append(each)
    return {
        pool: Speed(
            min(each.fixed_ns for each in joined),
            min(each.input_token_ns for each in joined),
            min(each.output_token_ns for each in joined),
        )
        for pool, joined in pools.items()
    }


def predict(
    declared: Declared, speeds: Mapping[str, Speed], *, input_tokens: int, output_tokens_max: int
) -> Prediction:
    """What is expected of a request of ``input_tokens`` whose client allows ``output_tokens_max``. speeds: by pool."""
    pipeline = declared.pipeline
    forecast = Run(pipeline, input_tokens).forecast(
        output_tokens_max, [speeds.get(stage.op.pool, Speed()) for stage in pipeline.stages]
    )
    start, end = _times(pipeline, forecast)
    path = [index for index in _critical_path(pipeline, forecast) if index in forecast.costs]
    rows = []
    for stage, parts in zip(pipeline.stages, declared.stages, strict=True):
        index = stage.index
        cost = forecast.costs.get(index)
        rows.append(
            StagePrediction(
                stage=stage.name,
                op="+".join(str(type(part.declaration).__struct_config__.tag) for part in parts),
                parts=[part.name for part in parts],
                pool=stage.op.pool,
                after=["request" if i == REQUEST_INPUT else pipeline.called(i) for i in stage.inputs],
                when=[f"{pipeline.called(guard.on)} {bounds(guard.least, guard.most)}" for guard in stage.guards],
                served=stage.free or stage.op.pool in speeds,
                expected=cost is not None,
                input_tokens=0 if cost is None else cost.input_tokens,
                output_tokens=0 if cost is None else cost.output_tokens,
                start_ns=0 if cost is None else round(start[index]),
                end_ns=0 if cost is None else round(end[index]),
                critical=index in path,
                answers=index in pipeline.answering,
            )
        )
    firsts = [start[i] + forecast.costs[i].first_ns for i in forecast.streams if forecast.costs[i].output_tokens]
    return Prediction(
        pipeline.name,
        declared.description,
        input_tokens,
        output_tokens_max,
        "critical_path" if pipeline.critical_path else "request",
        rows,
        [pipeline.called(index) for index in path],
        round(end[pipeline.output]) if pipeline.output in forecast.costs else None,
        round(min(firsts)) if firsts else None,
    )


def _critical_path(pipeline: Pipeline, forecast: Forecast) -> list[int]:
    """Stages from the first to the answer, the longest way; also such as are skipped, whose followers wait for that."""
    path: list[int] = []
    ready = [stage.index for stage in pipeline.first]
    while ready:
        path.append(max(ready, key=lambda index: _took(forecast, index) + forecast.to_end_ns[index]))
        ready = list(pipeline.stages[path[-1]].followers)
    return path


def _times(pipeline: Pipeline, forecast: Forecast) -> tuple[dict[int, float], dict[int, float]]:
    """(start, end) of all stages, ns."""
    start: dict[int, float] = {}
    end: dict[int, float] = {}
    for stage in pipeline.stages:
        start[stage.index] = max((end[i] for i in stage.waits_for), default=0.0)
        end[stage.index] = start[stage.index] + _took(forecast, stage.index)
    return start, end


def _took(forecast: Forecast, index: int) -> float:
    return forecast.costs[index].ns if index in forecast.costs else 0.0
