"""A pipeline's plan as a table: stages, pools, guards, and what is predicted of them."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from sage_bench.pipelines.predict import Prediction, StagePrediction

MS = 1e6
"""ns."""


def plan_table(plan: Prediction) -> Table:
    """One row a stage; ``*`` marks the critical path, ``->`` the answer."""
    right = [Column(name, justify="right", no_wrap=True) for name in ("in", "out", "ms", "start", "end")]
    table = Table(
        Column(""), "stage", "op", "pool", Column("after"), "when", *right, box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for each in plan.stages:
        mark = ("*" if each.critical else "") + ("->" if each.answers else "")
        texts = (mark, each.stage, each.op, _pool(each), ", ".join(each.after), ", ".join(each.when))
        style = None if each.expected else "dim"
        table.add_row(*map(escape, texts), *_numbers(each), style=style)
    return table


def plan_notes(plan: Prediction, cluster: str) -> list[str]:
    """What stands under the table, a line each."""
    lines = [
        f"predicted for a request of {plan.input_tokens:,} tokens, {plan.output_tokens_max:,} at most in answer, on {cluster} "
        "while it is idle: tokens in and out, times in ms",
        f"critical path (*): {' -> '.join(plan.critical_path) or 'none'}",
        f"total {span(plan.total_ns)}, time to first token {span(plan.ttft_ns)}",
    ]
    fused = [" + ".join(each.parts) for each in plan.stages if len(each.parts) > 1]
    if fused:
        lines.append(f"fused to one task each: {'; '.join(fused)}")
    if not all(each.expected for each in plan.stages):
        lines.append("-: not expected to run, as decisions typically go")
    if plan.deadlines == "request":
        lines.append("deadlines: every stage is due when the request is")
    if plan.missing_pools:
        lines.append(
            f"no replica on {cluster} serves {', '.join(plan.missing_pools)}: their stages are counted as 0 ms"
        )
    return lines


def span(time_ns: int | None) -> str:
    """A time in ms, to a tenth, or to a hundredth below one."""
    if time_ns is None:
        return "not expected"
    return f"{milliseconds(time_ns)} ms"


def milliseconds(time_ns: float) -> str:
    """The number of a time in ms."""
    ms = time_ns / MS
    return f"{ms:,.1f}" if ms >= 1 or ms == 0 else f"{ms:.2f}"


def _pool(each: StagePrediction) -> str:
    if not each.pool:
        return "-"
    return each.pool if each.served else f"{each.pool} (none)"


def _numbers(each: StagePrediction) -> tuple[str, str, str, str, str]:
    if not each.expected:
        return "-", "-", "-", "-", "-"
    took = milliseconds(each.end_ns - each.start_ns) if each.served else "?"
    tokens_out = f"{each.output_tokens:,}" if each.output_tokens else ""
    return f"{each.input_tokens:,}", tokens_out, took, milliseconds(each.start_ns), milliseconds(each.end_ns)
