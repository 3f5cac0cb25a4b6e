"""A simulated accelerator with an LLM engine, an embedding engine or both, as the control plane's mirror image.

The engine itself is native (``sage_core._native.Engine``); what it does, and where it knowingly differs from vLLM, is
in :mod:`sage_sim.engine_reference`, which runs in its place with ``reference=True``. Here are its configuration, the
translation of commands and events, and what a replica says about itself. True output lengths are known from here on
down and nowhere above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, NoReturn

from sage_core import _native
from sage_core.backend import OutputTokens
from sage_core.commands import AnyCommand, Cancel, Dispatch, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent, ReplicaJoined, ReplicaReported, TaskFailed, TaskFinished, TokensProduced
from sage_core.units import Nanos, PoolKind, request_of
from sage_sim import engine_reference
from sage_sim.engine_reference import FINISHED, FIRST_TOKEN
from sage_sim.iteration import IterationTime, IterationWork

TYPICAL_INPUT_TOKENS = 512
TYPICAL_CONTEXT_TOKENS = 576
"""Where the speed hints of :meth:`SimulatedDevice.joined` are taken: 512 tokens in, half of 128 out."""


@dataclass(frozen=True, slots=True)
class LlmReplica:
    """An LLM engine; names as in vLLM. ``kv_blocks`` blocks of ``block_size`` tokens; the spans are in ns.

    chunked_prefill: split prompts to fill the token budget. priority_queue: lower priority value first, else FCFS.
    ingress_ns: from dispatch until the engine's queue has the task (API server, tokeniser). egress_ns: from the end of
    an iteration until its tokens are told (detokeniser, response). Raises ConfigError.
    """

    replica: int
    pool: str
    time: IterationTime
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_blocks: int
    chunked_prefill: bool = True
    priority_queue: bool = False
    ingress_ns: int = 0
    egress_ns: int = 0

    def __post_init__(self) -> None:
        for key in ("max_num_seqs", "max_num_batched_tokens", "block_size", "kv_blocks"):
            _check(self, key, 1)
        for key in ("ingress_ns", "egress_ns"):
            _check(self, key, 0)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens: expected at least max_num_seqs = {self.max_num_seqs} (every running sequence "
                f"decodes one token per iteration), got {self.max_num_batched_tokens}"
            )

    def numbers(self) -> dict[str, int]:
        """The engine's view of it."""
        return _numbers(self)


@dataclass(frozen=True, slots=True)
class EmbedReplica:
    """An embedding engine: one batch at a time, formed when the device is free; an idle engine never waits.

    A batch takes tasks in order of arrival up to ``max_batch_tasks`` and ``max_batch_tokens`` (unpadded; at least one
    task). padding: every text costs as much as the longest of its batch. Raises ConfigError.
    """

    replica: int
    pool: str
    time: IterationTime
    max_batch_tasks: int
    max_batch_tokens: int
    padding: bool = False
    ingress_ns: int = 0
    egress_ns: int = 0

    def __post_init__(self) -> None:
        for key in ("max_batch_tasks", "max_batch_tokens"):
            _check(self, key, 1)
        for key in ("ingress_ns", "egress_ns"):
            _check(self, key, 0)

    def numbers(self) -> dict[str, int]:
        """The engine's view of it."""
        return _numbers(self)


class ReplicaUsage(NamedTuple):
    """What a replica has done so far. The ITL figures are 0 for an embedding engine.

    busy_ns: in iterations or batches, the elapsed part of one in progress included. iterations: LLM iterations or
    embedding batches that have ended. itl_*: gaps between successive tokens of one task, over all tasks.
    """

    replica: int
    busy_ns: int
    iterations: int
    preemptions: int
    itl_count: int
    itl_sum_ns: int


class SimulatedDevice:
    """A BackendModel (sage_core.backend). ``device`` and ``node`` are the names the plane knows it by.

    output_tokens: true output length of a request id, cut to the client's cap. reference: run the Python meaning of the
    engine in place of the native one (same events, far slower).
    """

    def __init__(
        self,
        device: int,
        node: str,
        llm: LlmReplica | None,
        embed: EmbedReplica | None,
        output_tokens: OutputTokens,
        reference: bool = False,
    ) -> None:
        if llm is None and embed is None:
            raise ConfigError(f"device {device} on {node}: expected an LLM engine, an embedding engine, or both")
        if llm is not None and embed is not None and llm.replica == embed.replica:
            raise ConfigError(f"device {device} on {node}: two replicas have the id {llm.replica}")
        self._device = device
        self._node = node
        self._llm = llm
        self._embed = embed
        self._llm_replica = None if llm is None else llm.replica
        self._embed_replica = None if embed is None else embed.replica
        self._output_tokens = output_tokens
        make: type[_native.Engine] | type[engine_reference.Engine] = (
            engine_reference.Engine if reference else _native.Engine
        )
        self._engine = make(None if llm is None else llm.numbers(), None if embed is None else embed.numbers())

    @property
    def native(self) -> _native.Engine | None:
        """The native engine; None where the reference runs."""
        return self._engine if isinstance(self._engine, _native.Engine) else None

    @property
    def replicas(self) -> tuple[int | None, int | None]:
        """Ids of the LLM and of the embedding replica; None where there is none."""
        return self._llm_replica, self._embed_replica

    def joined(self) -> list[ReplicaJoined]:
        """What each replica says when it becomes healthy.

        The speed hints are the engine's own law of time made linear, for a task that is alone in its iteration:
        ``input_token_ns`` is the slope of a prefill at 512 tokens and ``fixed_ns`` what makes the line meet the law
        there (never below 0), ingress and egress included; ``output_token_ns`` is an iteration of no sequences, and
        ``output_seq_ns`` what a sequence of 576 tokens of context adds to it. Waiting, chunking and the prefills of
        others are not in them: the plane corrects for what it observes.
        """
        joined = []
        if (llm := self._llm) is not None:
            alone_ps = llm.time.iteration_ps(
                IterationWork(chunks=1, prefill_tokens=TYPICAL_INPUT_TOKENS, attention2=TYPICAL_INPUT_TOKENS**2)
            )
            fixed_ns, input_token_ns = _line(llm, alone_ps)
            joined.append(
                ReplicaJoined(
                    replica=llm.replica,
                    pool=llm.pool,
                    pool_kind=PoolKind.LLM,
                    device=self._device,
                    node=self._node,
                    tasks_max=llm.max_num_seqs,
                    batch_tokens_max=llm.max_num_batched_tokens,
                    kv_tokens_max=llm.kv_blocks * llm.block_size,
                    fixed_ns=fixed_ns,
                    input_token_ns=input_token_ns,
                    output_token_ns=(llm.time.decode_base + llm.time.overhead) / 1000,
                    output_seq_ns=(llm.time.decode_seq + llm.time.decode_kv * TYPICAL_CONTEXT_TOKENS) / 1000,
                )
            )
        if (embed := self._embed) is not None:
            alone_ps = embed.time.batch_ps(TYPICAL_INPUT_TOKENS, TYPICAL_INPUT_TOKENS**2)
            fixed_ns, input_token_ns = _line(embed, alone_ps)
            joined.append(
                ReplicaJoined(
                    replica=embed.replica,
                    pool=embed.pool,
                    pool_kind=PoolKind.EMBEDDING,
                    device=self._device,
                    node=self._node,
                    tasks_max=embed.max_batch_tasks,
                    batch_tokens_max=embed.max_batch_tokens,
                    fixed_ns=fixed_ns,
                    input_token_ns=input_token_ns,
                )
            )
        return joined

    def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[AnyEvent]:
        """Advance to ``now``, apply ``commands``, return what the plane should know, in the order it happened.

        A task that can never fit the KV cache fails at once and is not retryable. Cancelling a task whose end was
        already told does nothing. Raises IllegalEvent for a replica that is not here, ConfigError for a task that
        would generate nothing on an LLM engine.
        """
        engine = self._engine
        try:
            told = engine.advance(now)
            if commands:
                for command in commands:
                    self._apply(now, command)
                told += engine.advance(now)
        except OverflowError as error:
            self.too_long(str(error))
        return [self._event(code, task, value) for code, task, value in told] if told else []

    @property
    def wakeup_at(self) -> Nanos:
        """Next instant at which something visible happens if no command comes; ``NEVER`` when idle."""
        try:
            return Nanos(self._engine.wakeup_at)
        except OverflowError as error:
            self.too_long(str(error))

    def report(self, now: Nanos) -> list[ReplicaReported]:
        """Load as the engines themselves would publish it at ``now``. What is still to be told stays to be told."""
        engine = self._engine
        engine.run(now)
        reports = []
        if (llm := self._llm_replica) is not None:
            reports.append(ReplicaReported(llm, engine.running, engine.waiting, engine.kv_blocks_free))
        if (embed := self._embed_replica) is not None:
            reports.append(ReplicaReported(embed, engine.embed_running, engine.embed_waiting, 0))
        return reports

    def usage(self, now: Nanos) -> list[ReplicaUsage]:
        """What each replica has done up to ``now``."""
        engine = self._engine
        engine.run(now)
        usage = []
        if (llm := self._llm_replica) is not None:
            busy, iterations, preemptions = engine.busy_ns, engine.iterations, engine.preemptions
            usage.append(ReplicaUsage(llm, busy, iterations, preemptions, engine.itl_count, engine.itl_sum_ns))
        if (embed := self._embed_replica) is not None:
            usage.append(ReplicaUsage(embed, engine.embed_busy_ns, engine.embed_batches, 0, 0, 0))
        return usage

    def itl_samples(self) -> dict[int, int]:
        """Inter-token latencies of the LLM engine: gaps by lower edge (ns) of buckets 1 % wide."""
        return self._engine.itl_samples()

    def crash(self, now: Nanos) -> None:
        """Drop everything; nothing is told. The driver says that the replicas left."""
        self._engine.clear(now)

    def _apply(self, now: Nanos, command: AnyCommand) -> None:
        if isinstance(command, Dispatch):
            if command.replica == self._llm_replica:
                for task in command.tasks:
                    self._submit_llm(now, task)
            elif command.replica == self._embed_replica:
                for task in command.tasks:
                    self._engine.submit_embed(now, task.task, task.input_tokens)
            else:
                raise IllegalEvent(f"device {self._device} has no replica {command.replica}")
        elif isinstance(command, Cancel):
            if command.replica not in (self._llm_replica, self._embed_replica):
                raise IllegalEvent(f"device {self._device} has no replica {command.replica}")
            self._engine.cancel(now, command.task)
        else:
            raise IllegalEvent(f"device {self._device}: {type(command).__name__} is not a command for a replica")

    def _submit_llm(self, now: Nanos, task: Task) -> None:
        request = request_of(task.task)
        output_tokens = min(self._output_tokens(request), task.output_tokens_max)
        if output_tokens < 1 or task.input_tokens < 1:
            self.no_tokens(request, task.input_tokens, output_tokens)
        self._engine.submit_llm(now, task.task, task.input_tokens, output_tokens, task.priority)

    def _event(self, code: int, task: int, value: int) -> AnyEvent:
        if code == FINISHED:
            return TaskFinished(task, value)
        if code == FIRST_TOKEN:
            return TokensProduced(task, value)
        return TaskFailed(task, self.why_failed(value), retryable=False)

    # What the native event loop, which steps the engine itself, asks this object to say.

    def why_failed(self, blocks: int) -> str:
        """The reason of a task that would need ``blocks`` KV blocks."""
        assert self._llm is not None
        return f"KV cache too small: the task needs {blocks} blocks, the replica has {self._llm.kv_blocks}"

    def no_tokens(self, request: int, input_tokens: int, output_tokens: int) -> NoReturn:
        """Raise ConfigError for an LLM task that has nothing to do."""
        raise ConfigError(
            f"request {request}: {input_tokens} input and {output_tokens} output tokens; an LLM task has at "
            f"least one of each (see the load's input_tokens, output_tokens and output_tokens_max)"
        )

    def too_long(self, why: str) -> NoReturn:
        """Raise ConfigError for work that the engine's clock cannot hold."""
        raise ConfigError(f"device {self._device}: {why}; shorten the load or the outputs")


_LARGEST = 2**40  # keeps the native sums far from their limits


def _line(config: LlmReplica | EmbedReplica, alone_ps: int) -> tuple[float, float]:
    """(fixed_ns, input_token_ns): the tangent of the prefill law at TYPICAL_INPUT_TOKENS."""
    slope_ps = config.time.prefill_token + config.time.prefill_attn * TYPICAL_INPUT_TOKENS
    fixed_ps = max(0, alone_ps - slope_ps * TYPICAL_INPUT_TOKENS)
    return config.ingress_ns + config.egress_ns + fixed_ps / 1000, slope_ps / 1000


def _numbers(config: LlmReplica | EmbedReplica) -> dict[str, int]:
    own = asdict(config)
    coefficients: dict[str, int] = own.pop("time")
    del own["replica"], own["pool"]
    return {**coefficients, **{key: int(value) for key, value in own.items()}}


def _check(config: LlmReplica | EmbedReplica, key: str, least: int) -> None:
    value = getattr(config, key)
    if type(value) is not int or not least <= value <= _LARGEST:
        expected = f"a whole number from {least} to {_LARGEST}"
        raise ConfigError(f"{key} of replica {config.replica}: expected {expected}, got {value!r}")
