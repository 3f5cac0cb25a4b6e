"""Fusion: runs of cheap stages of one pool become one task, which is dispatched and answered once.

A stage is joined to the one before it if nothing else waits for that one, both have the same guards, and it waits for
nothing else but what the guards ask. The fused stage does the work of both, and its result is that of the last. Results
within have their typical size. A last result that is as large as its input must be so after fusion too: the work is then
that of the last alone, and what the others cost per token is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sage_core.pipeline import REQUEST_INPUT, Op, Pipeline, Stage, Value, Work, linked


def fused(pipeline: Pipeline, cheap: Sequence[bool]) -> tuple[Pipeline, list[list[int]]]:
    """(the pipeline with fewer stages, the old numbers of the stages that each new one stands for). cheap: by stage."""
    stages = list(pipeline.stages)
    groups: dict[int, list[int]] = {}  # by the number of its last stage
    for stage in stages:
        wanted = set(stage.waits_for) - {guard.on for guard in stage.guards}
        before = wanted.pop() if len(wanted) == 1 else None
        if before is not None and _joined(pipeline, stages[before], stage, cheap):
            groups[stage.index] = [*groups.pop(before), stage.index]
        else:
            groups[stage.index] = [stage.index]
    order = sorted(groups)  # a group takes the place of its last stage: what it waits for comes before all of it
    made = linked([_one([stages[i] for i in groups[last]]) for last in order])
    return replace(pipeline, stages=made, output=order.index(pipeline.output)), [groups[last] for last in order]


def _joined(pipeline: Pipeline, before: Stage, stage: Stage, cheap: Sequence[bool]) -> bool:
    return (
        cheap[before.index]
        and cheap[stage.index]
        and before.op.pool == stage.op.pool
        and before.followers == (stage.index,)
        and before.guards == stage.guards
        and before.index != pipeline.output
        and not stage.op.joins
    )


def _one(parts: Sequence[Stage]) -> Stage:
    """A stage that does the work of ``parts``, each of which follows the one before."""
    if len(parts) == 1:
        return parts[0]
    inner = {part.index for part in parts}
    inputs = tuple(dict.fromkeys(i for part in parts for i in part.inputs if i not in inner))

    def body(*values: Value[Any]) -> Work[Any]:
        sizes = {REQUEST_INPUT: 0} | {i: value.tokens for i, value in zip(inputs, values, strict=True)}
        tokens = 0
        for part in parts:
            work = part.work(sizes)
            tokens += work.input_tokens
            sizes[part.index] = work.input_tokens if part.typical is None else part.typical
        return Work(work.input_tokens if parts[-1].typical is None else tokens)

    name = "+".join(part.name for part in parts)
    op: Op[Any, Any] = Op("+".join(part.op.name for part in parts), parts[0].op.pool, body)
    return replace(parts[-1], op=op, inputs=inputs, constants={}, guards=parts[0].guards, name=name)
