"""Facts, past tense: what drivers and backends tell the control plane.

Ids and sizes only. Prompts, vectors and true output lengths never enter the core, so a log holds no user text and a
policy cannot peek. Every event is frozen; a sequence of them handed to one ``step`` is simultaneous.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from sage_core.units import NEVER


class Event(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """Base of all events. Encodes as a tagged array."""


class RequestArrived(Event, frozen=True):
    """A client asked for ``pipeline``. Latencies count from ``scheduled_at``, which is never later than ``now``."""

    request: int
    pipeline: str
    kind: int  # units.RequestKind
    tenant: str
    priority: int  # 0 is interactive; larger is less urgent (vLLM's convention: the lower value is served first)
    input_tokens: int
    output_tokens_max: int  # the client's cap (max_tokens), not the truth; 0 where nothing is generated
    scheduled_at: int  # ns
    ttft_due_at: int = NEVER  # ns; when the first token is due
    due_at: int = NEVER  # ns; when the whole response is due
    prefix: int = 0  # id of a shared prompt prefix, 0 = none


class RequestCancelled(Event, frozen=True):
    """The client went away."""

    request: int


class TokensProduced(Event, frozen=True):
    """``count`` more output tokens of ``task`` exist; the first such event marks TTFT.

    A count of 0 says no more than that its prompt has been read, or should have been: of an answer that comes as a whole
    nobody sees the first token.
    """

    task: int
    count: int


class TaskFinished(Event, frozen=True):
    """``task`` is complete with ``output_tokens`` in all (0 for an embedding)."""

    task: int
    output_tokens: int


class TaskFailed(Event, frozen=True):
    """The replica gave ``task`` back undone. ``retryable`` is the backend's view; the plane adds its own rules."""

    task: int
    reason: str
    retryable: bool


class ReplicaReported(Event, frozen=True):
    """What a replica said about itself; as old as scraping and the network made it."""

    replica: int
    running: int
    waiting: int
    kv_blocks_free: int


class ReplicaJoined(Event, frozen=True):
    """A replica is healthy and may be given work.

    The ``*_ns`` figures are the *expected* cost of work on it, from its profile; zero means unknown. The plane corrects
    them by what it observes. A task with I input and O output tokens among n in flight is expected to take
    ``fixed_ns + input_token_ns * I + (output_token_ns + output_seq_ns * n) * O``.
    """

    replica: int
    pool: str
    pool_kind: int  # units.PoolKind
    device: int  # replicas with the same device share it
    node: str
    tasks_max: int  # concurrency of the engine: max_num_seqs, or tasks per embedding batch, or CPU workers
    batch_tokens_max: int  # token budget of an iteration or an embedding batch; 0 for CPU workers
    kv_tokens_max: int = 0  # KV-cache capacity in tokens; 0 = not applicable
    fixed_ns: float = 0.0
    input_token_ns: float = 0.0
    output_token_ns: float = 0.0
    output_seq_ns: float = 0.0


class ReplicaDraining(Event, frozen=True):
    """Finish what you have; give it no more."""

    replica: int


class ReplicaLeft(Event, frozen=True):
    """The replica is gone, with whatever it held (crash, or the end of a drain)."""

    replica: int


class PolicyChanged(Event, frozen=True):
    """An operator chose another policy; queued work is re-decided under it."""

    policy: str


class RunEnded(Event, frozen=True):
    """Nothing more will happen: what is still live has failed for ``reason``."""

    reason: str


AnyEvent: TypeAlias = (
    RequestArrived
    | RequestCancelled
    | TokensProduced
    | TaskFinished
    | TaskFailed
    | ReplicaReported
    | ReplicaJoined
    | ReplicaDraining
    | ReplicaLeft
    | PolicyChanged
    | RunEnded
)
