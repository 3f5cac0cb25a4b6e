"""Invariant 7: nothing that reaches a policy before a task is complete carries its true output length."""

from __future__ import annotations

import typing

import msgspec

from sage_core import events
from sage_core.commands import Task
from sage_core.reference import TASK_COLUMNS


def test_only_the_end_of_a_task_states_its_length() -> None:
    carriers = {
        kind.__name__
        for kind in typing.get_args(events.AnyEvent)
        for field in msgspec.structs.fields(kind)
        if field.name in ("output_tokens", "count")
    }
    assert carriers == {"TaskFinished", "TokensProduced"}


def test_a_task_carries_the_cap_and_a_view_the_prediction() -> None:
    assert "output_tokens" not in {field.name for field in msgspec.structs.fields(events.RequestArrived)}
    assert [field.name for field in msgspec.structs.fields(Task) if "output" in field.name] == ["output_tokens_max"]
    assert [name for name in TASK_COLUMNS if "output" in name] == ["output_tokens_max", "output_tokens"]
