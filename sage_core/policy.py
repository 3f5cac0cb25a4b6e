"""What a policy is: four small objects over column tables, one verb each.

Lower score goes first; ``inf`` means *not now* (order), *not here* (route) or *no* (admit); NaN is an error blamed on
the policy's author. A policy never holds a task, so it cannot lose one: the core owns selection, ties (score, then
task id), capacity, in-step load accounting and conservation.

Policies are pure functions of facts. What would need memory (tenant service, how often the oldest task was passed
over, observed slowness) is a fact the core keeps and shows as a column, so a policy object can be replaced at any step
and a replay needs nothing but the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sage_core.errors import ConfigError, PolicyError
from sage_core.units import Nanos, PoolKind

Scores: TypeAlias = NDArray[np.float64]
Column: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Speed:
    """Expected cost of work on the fastest serving replica of a pool (ns; see ``events.ReplicaJoined``)."""

    fixed_ns: float = 0.0
    input_token_ns: float = 0.0
    output_token_ns: float = 0.0


class TaskView(Protocol):
    """Queued tasks (or arrivals) of one pool as read-only columns; row i is the same task in each. Instants in ns."""

    pool: str
    pool_kind: PoolKind
    speed: Speed
    oldest: int  # the task that has been queued longest, -1 when the queue is empty
    bypassed: int  # tasks dispatched from this pool since its then-oldest task was last dispatched

    task: Column
    request: Column
    kind: Column
    tenant: Column  # dense index, in order of first appearance
    priority: Column
    attempt: Column
    arrived_at: Column  # scheduled arrival of the request
    queued_at: Column  # when this task became ready to run
    ttft_due_at: Column  # NEVER where there is no such objective
    due_at: Column
    input_tokens: Column
    output_tokens_max: Column
    output_tokens: Column  # predicted, by the configured predictor; never the truth unless that is the oracle
    prefix: Column
    tenant_service: (
        Column  # input + 2 * predicted output tokens dispatched for the tenant in this pool, lifted on return
    )

    def __len__(self) -> int: ...


class ReplicaView(Protocol):
    """Serving replicas of one pool as read-only columns, in order of joining.

    Counted by the core and exact, this step included: ``in_flight``, ``prefill_tokens``, ``kv_tokens``,
    ``device_in_flight``, ``last_dispatch``. Observed, as old as the last report: ``running``, ``waiting``,
    ``kv_blocks_free``, ``reported_at``.
    """

    replica: Column
    device: Column
    in_flight: Column  # tasks dispatched and not finished
    device_in_flight: Column  # the same over all replicas on the device
    prefill_tokens: Column  # input tokens dispatched whose first output has not been seen
    kv_tokens: Column  # input + predicted output tokens in flight
    tasks_max: Column
    batch_tokens_max: Column
    kv_tokens_max: Column
    running: Column
    waiting: Column
    kv_blocks_free: Column
    reported_at: Column
    last_dispatch: Column  # running number of the pool's last dispatch to it, 0 = none yet
    fixed_ns: Scores
    input_token_ns: Scores
    output_token_ns: Scores
    output_seq_ns: Scores
    slowdown: Scores  # observed over expected residence, smoothed; 1.0 = as expected

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class QueueView:
    """What a limit may know about the queue of its pool. Instants in ns."""

    pool_kind: PoolKind
    tasks: int
    input_tokens: int
    oldest_queued_at: int  # NEVER when empty
    earliest_due_at: int  # over ttft_due_at and due_at; NEVER when none


@dataclass(frozen=True, slots=True)
class Limits:
    """How much each replica may hold; columns as long as the view.

    A replica is open to a task while ``now >= hold_until``, ``in_flight < tasks_max`` (``tasks_max_batch`` for tasks of
    priority above 0), ``prefill_tokens < prefill_tokens_max`` and ``kv_tokens < kv_tokens_max``. Task limits are hard;
    token limits close the replica once reached, so that one oversized task is never stuck.
    """

    tasks_max: Column
    tasks_max_batch: Column
    prefill_tokens_max: Column
    kv_tokens_max: Column
    hold_until: Column


class Admit(Protocol):
    """Finite: into the queue. ``inf``: rejected, come back after ``retry_after_ns``."""

    retry_after_ns: int

    def score(self, now: Nanos, arrivals: TaskView, replicas: ReplicaView) -> Scores:
        """(tasks,)"""


class Order(Protocol):
    """Which queued task goes first. ``static``: scored once, when queued, and kept in a heap."""

    static: bool

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """(tasks,)"""


class Route(Protocol):
    """Which replica a task goes to.

    ``live`` true: scored once per decision for that one task, with the tasks placed earlier in the same step counted in
    the columns. ``live`` false: one matrix per round, and ``load_weight`` is added per task placed in this step.
    """

    live: bool
    load_weight: float

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """(tasks, replicas)"""


class Limit(Protocol):
    """How much each replica may hold at once."""

    def limit(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits: ...


class Predict(Protocol):
    """Expected output tokens of a task, made when it is queued; told the truth when a task finishes."""

    name: str

    def predict(self, request: int, tenant: str, kind: int, input_tokens: int, output_tokens_max: int) -> int: ...

    def observe(self, tenant: str, kind: int, output_tokens: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """A named set of the four parts and a predictor.

    A part may offer ``native()``, returning its twin in ``sage_core._native``; the native mechanism then decides without
    calling back into Python. The Python ``score`` is its meaning, and a differential test holds the two together.
    """

    name: str
    admit: Admit | None  # None: everything is admitted
    order: Order
    route: Route
    limit: Limit
    predict: Predict

    def __post_init__(self) -> None:
        for part, members in _MEMBERS.items():
            value = getattr(self, part)
            missing = [member for member in members if not hasattr(value, member)]
            if missing and not (part == "admit" and value is None):
                raise PolicyError(
                    f"policy {self.name}: {part} {type(value).__name__} has no {', '.join(missing)}; "
                    f"see sage_core.policy.{part.capitalize()}"
                )


_MEMBERS: Final[Mapping[str, tuple[str, ...]]] = {
    "admit": ("score", "retry_after_ns"),
    "order": ("score", "static"),
    "route": ("score", "live", "load_weight"),
    "limit": ("limit",),
    "predict": ("predict", "observe", "name"),
}
"""What each part must have; see the protocols above."""


def raised(policy: str, error: Exception) -> PolicyError | None:
    """``error``, which came up while ``policy`` was asked, as its author should read it: what, and in which line.

    None if no frame of it lies outside this package: then it is a defect of ours.
    """
    place: str | None = None
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(_PACKAGE):
            place = f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}"
        trace = trace.tb_next
    return None if place is None else PolicyError(f"policy {policy}: {type(error).__name__}: {error} ({place})")


_PACKAGE: Final = __file__.rpartition("policy")[0]


def native_twin(part: object) -> Any:
    """The native implementation of a policy part, or the part itself where it has none. ConfigError for a parameter of
    the wrong type, which only the native side looks at."""
    make = getattr(part, "native", None)
    try:
        return part if make is None else make()
    except TypeError as error:
        given = str(error).rpartition("Invoked with: ")[2].removeprefix("kwargs: ")
        raise ConfigError(
            f"policy: {type(part).__name__}: a parameter has the wrong type (true or false, or a number); given: {given}"
        ) from error
