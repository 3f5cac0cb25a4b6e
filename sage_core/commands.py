"""Imperatives: what the control plane tells its driver to do.

Five verbs. ``Dispatch`` carries the sizes of its tasks, so a backend, an adapter and a metric need nothing but the
command itself.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Command(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """Base of all commands. Encodes as a tagged array."""


class Task(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One operator invocation of a request, as a backend sees it. ``stage`` indexes the pipeline's plan."""

    task: int
    stage: int
    attempt: int
    priority: int
    queued_at: int  # ns
    input_tokens: int
    output_tokens_max: int
    prefix: int = 0


class Dispatch(Command, frozen=True):
    """Run these tasks on this replica; they leave together, in this order."""

    replica: int
    tasks: tuple[Task, ...]


class Cancel(Command, frozen=True):
    """Stop this task, which is on this replica; its result is not wanted."""

    replica: int
    task: int


class Respond(Command, frozen=True):
    """Every stage of the request is done: answer the client."""

    request: int


class Reject(Command, frozen=True):
    """Admission said no before any work was done; the client may come back after ``retry_after_ns``."""

    request: int
    reason: str
    retry_after_ns: int


class Fail(Command, frozen=True):
    """The request cannot be completed (retries used up, or the run ended)."""

    request: int
    reason: str


AnyCommand: TypeAlias = Dispatch | Cancel | Respond | Reject | Fail
