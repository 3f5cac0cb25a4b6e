"""A simulated accelerator with an LLM engine, an embedding engine or both, as the control plane's mirror image.

The engine itself is native (``sage_core._native.Engine``); what it does, and where it knowingly differs from vLLM, is
in :mod:`sage_sim.engine_reference`, which runs in its place with ``reference=True``. Here are its configuration, the
translation of commands and events, and what a replica says about itself. True output lengths are known from here on
down and nowhere above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, NoReturn

from sage_core import _native
from sage_core.backend import ContentsOf, OutputTokens
from sage_core.commands import AnyCommand, Cancel, Dispatch, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent, ReplicaJoined, ReplicaReported, TaskFailed, TaskFinished, TokensProduced
from sage_core.load import Contents
from sage_core.units import SECOND, Nanos, PoolKind, request_of
from sage_sim import engine_reference
from sage_sim.engine_reference import FINISHED, FIRST_TOKEN, Seen
from sage_sim.iteration import IterationTime, IterationWork, Numbers

TYPICAL_INPUT_TOKENS = 512
TYPICAL_CONTEXT_TOKENS = 576
TYPICAL_SEQS = 32
"""Where the speed hints of :meth:`SimulatedDevice.joined` are taken: 512 tokens in, half of 128 out, 32 at a time."""


@dataclass(frozen=True, slots=True)
class LlmReplica:
    """An LLM engine; names as in vLLM. Spans are in ns; what each rule does is in :mod:`sage_sim.engine_reference`. The
    defaults are those of vLLM 0.19, but for prefix_caching and async_scheduling, which it has on. Raises ConfigError.

    ``kv_blocks`` blocks of ``block_size`` tokens, as many as can be used: vLLM keeps one of its ``num_gpu_blocks`` back.
    priority_queue: lower priority value first, else FCFS. chunked_prefill: split prompts to fill the token budget.
    long_prefill_token_threshold, max_num_partial_prefills, max_model_len, watermark_blocks: 0 for no limit.
    num_speculative_tokens: drafts per decode, of which each is accepted with ``acceptance_rate`` if all before it were;
    draft_ns: what the drafts of one iteration take.
    scheduler_ns, scheduler_seq_ns: CPU time of an iteration, and per sequence in it. api_server_ns,
    api_server_token_ns: CPU time of the API server and its tokeniser for a request, and per input token; one request at a
    time. ingress_ns: latency from there to the engine's queue. egress_ns: from the end of an iteration until its tokens
    are told; detokenizer_token_ns: and per token of the iteration.
    startup_ns: from start to healthy, but for the weights, which are ``weight_bytes`` read at ``weight_bytes_per_s``.
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
    prefix_caching: bool = False
    async_scheduling: bool = False
    scheduler_reserve_full_isl: bool = True
    long_prefill_token_threshold: int = 0
    max_num_partial_prefills: int = 0
    max_model_len: int = 0
    watermark_blocks: int = 0
    num_speculative_tokens: int = 0
    acceptance_rate: float = 0.0
    draft_ns: int = 0
    scheduler_ns: int = 0
    scheduler_seq_ns: int = 0
    api_server_ns: int = 0
    api_server_token_ns: int = 0
    detokenizer_token_ns: int = 0
    startup_ns: int = 0
    weight_bytes: int = 0
    weight_bytes_per_s: int = 0

    def __post_init__(self) -> None:
        for key in ("max_num_seqs", "max_num_batched_tokens", "block_size", "kv_blocks"):
            _check(self, key, 1)
        for key in (
            "ingress_ns",
            "egress_ns",
            "long_prefill_token_threshold",
            "max_num_partial_prefills",
            "max_model_len",
            "watermark_blocks",
            "num_speculative_tokens",
            "draft_ns",
            "scheduler_ns",
            "scheduler_seq_ns",
            "api_server_ns",
            "api_server_token_ns",
            "detokenizer_token_ns",
            "startup_ns",
            "weight_bytes",
            "weight_bytes_per_s",
        ):
            _check(self, key, 0)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens: expected at least max_num_seqs = {self.max_num_seqs} (every running sequence "
                f"decodes one token per iteration), got {self.max_num_batched_tokens}"
            )
        if not 0 <= self.acceptance_rate <= 1:  # NaN included
            raise ConfigError(
                f"acceptance_rate of replica {self.replica}: expected 0 to 1, got {self.acceptance_rate!r}"
            )
        if self.weight_bytes and not self.weight_bytes_per_s:
            raise ConfigError(
                f"weight_bytes_per_s of replica {self.replica}: expected more than 0, because weight_bytes = "
                f"{self.weight_bytes} are to be read"
            )

    @property
    def tokens_max(self) -> int:
        """Longest sequence, prompt and output; 0 for no limit. A prompt that may not be split must fit the budget."""
        if self.chunked_prefill:
            return self.max_model_len
        return min(self.max_model_len or self.max_num_batched_tokens, self.max_num_batched_tokens)

    @property
    def restart_ns(self) -> int:
        """From start to healthy, weights included."""
        weights = self.weight_bytes * SECOND // self.weight_bytes_per_s if self.weight_bytes else 0
        return self.startup_ns + weights

    def numbers(self) -> Numbers:
        """The engine's view of it."""
        own = _numbers(self)
        for key in ("startup_ns", "weight_bytes", "weight_bytes_per_s", "acceptance_rate"):
            del own[key]
        rate = round(self.acceptance_rate * 10**6)
        drafts = own["draft_tokens"] = own.pop("num_speculative_tokens")
        own["draft_yield_ppm"] = sum(rate**n // 10 ** (6 * (n - 1)) if n else 10**6 for n in range(drafts + 1))
        return own


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

    def numbers(self) -> Numbers:
        """The engine's view of it."""
        return _numbers(self)


class ReplicaUsage(NamedTuple):
    """What a replica has done so far. What does not apply to its kind is 0.

    busy_ns: in iterations or batches, the elapsed part of one in progress included. iterations: LLM iterations or
    embedding batches that have ended. itl_*: gaps between successive tokens of one task, over all tasks.
    prefill_busy_ns: the part of busy_ns in iterations with a prefill chunk, or in embedding batches. prefix_*: tokens to
    prefill of all admissions, and those of them that were cached. tokens, padded_tokens: of embedding batches, and what
    they cost. seen: the largest iterations or batches that have ended, against the range of the profile.
    """

    replica: int
    busy_ns: int
    iterations: int
    preemptions: int
    itl_count: int
    itl_sum_ns: int
    prefill_busy_ns: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seen: Seen = Seen()


class SimulatedDevice:
    """A BackendModel (sage_core.backend). ``device`` and ``node`` are the names the plane knows it by.

    output_tokens: true output length of a stage of a request, cut to the client's cap. contents: what its prompt begins with, for
    the prefix cache; its blocks must be a multiple of the engine's. reference: run the Python meaning of the
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
        contents: ContentsOf | None = None,
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
        self._contents = contents if llm is not None and llm.prefix_caching else None
        make: type[_native.Engine] | type[engine_reference.Engine] = (
            engine_reference.Engine if reference else _native.Engine
        )
        self._engine = make(None if llm is None else llm.numbers(), None if embed is None else embed.numbers())

    @property
    def native(self) -> _native.Engine | None:
        """The native engine; None where the reference runs."""
        return self._engine if isinstance(self._engine, _native.Engine) else None

    @property
    def cached_block_size(self) -> int:
        """Tokens of a block of the LLM engine's prefix cache; 0 without one."""
        return 0 if self._contents is None or self._llm is None else self._llm.block_size

    @property
    def replicas(self) -> tuple[int | None, int | None]:
        """Ids of the LLM and of the embedding replica; None where there is none."""
        return self._llm_replica, self._embed_replica

    def joined(self) -> list[ReplicaJoined]:
        """What each replica says when it becomes healthy; its speed is that of :func:`speed_hints`."""
        joined = []
        if (llm := self._llm) is not None:
            hints = speed_hints(llm)
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
                    fixed_ns=hints.fixed_ns,
                    input_token_ns=hints.input_token_ns,
                    output_token_ns=hints.output_token_ns,
                    output_seq_ns=hints.output_seq_ns,
                )
            )
        if (embed := self._embed) is not None:
            batch_ps = embed.time.batch_ps
            fixed_ns, input_token_ns = _line(embed, lambda tokens: batch_ps(tokens, tokens**2))
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

    def generated(self, now: Nanos, tasks: Sequence[int]) -> list[int]:
        """Output tokens that each task has by ``now``, in iterations that have ended, told or not (0 once its end was)."""
        self._engine.run(now)
        return self._engine.generated(tasks)

    @property
    def boundary_at(self) -> Nanos:
        """Earliest instant after the last one at which :meth:`generated` may give more; ``NEVER`` when idle."""
        return Nanos(self._engine.boundary_at)

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
            usage.append(
                ReplicaUsage(
                    llm,
                    engine.busy_ns,
                    engine.iterations,
                    engine.preemptions,
                    engine.itl_count,
                    engine.itl_sum_ns,
                    prefill_busy_ns=engine.prefill_busy_ns,
                    prefix_queries=engine.prefix_queries,
                    prefix_hits=engine.prefix_hits,
                    seen=Seen(*engine.seen),
                )
            )
        if (embed := self._embed_replica) is not None:
            busy_ns = engine.embed_busy_ns
            usage.append(
                ReplicaUsage(
                    embed,
                    busy_ns,
                    engine.embed_batches,
                    0,
                    0,
                    0,
                    prefill_busy_ns=busy_ns,
                    tokens=engine.embed_tokens,
                    padded_tokens=engine.embed_padded_tokens,
                    seen=Seen(*engine.embed_seen),
                )
            )
        return usage

    def itl_samples(self) -> dict[int, int]:
        """Inter-token latencies of the LLM engine: gaps by lower edge (ns) of buckets 1 % wide."""
        return self._engine.itl_samples()

    def startup_ns(self) -> int:
        """From start to healthy. An embedding engine is up at once: its model is small beside an LLM's."""
        return 0 if self._llm is None else self._llm.restart_ns

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
        output_tokens = min(self._output_tokens(request, task.stage), task.output_tokens_max)
        if output_tokens < 1 or task.input_tokens < 1:
            self.no_tokens(request, task.input_tokens, output_tokens)
        contents = None if self._contents is None else self._contents(request)
        blocks = () if contents is None else self._split(contents)
        self._engine.submit_llm(now, task.task, task.input_tokens, output_tokens, task.priority, blocks)

    def _split(self, contents: Contents) -> list[int]:
        """The engine's blocks in those of the load: parts of equal blocks are equal."""
        assert self._llm is not None
        parts, rest = divmod(contents.block_tokens, self._llm.block_size)
        if rest or not parts:
            self.uneven_blocks(contents.block_tokens)
        return [block * parts + part for block in contents.blocks for part in range(parts)]

    def _event(self, code: int, task: int, value: int) -> AnyEvent:
        if code == FINISHED:
            return TaskFinished(task, value)
        if code == FIRST_TOKEN:
            return TokensProduced(task, value)
        return TaskFailed(task, self.why_failed(value), retryable=False)

    # What the native event loop, which steps the engine itself, asks this object to say.

    def why_failed(self, value: int) -> str:
        """The reason of a task that failed with ``value``."""
        assert self._llm is not None
        return why_failed(self._llm, value)

    def no_tokens(self, request: int, input_tokens: int, output_tokens: int) -> NoReturn:
        """Raise ConfigError for an LLM task that has nothing to do."""
        raise ConfigError(
            f"request {request}: {input_tokens} input and {output_tokens} output tokens; an LLM task has at "
            f"least one of each (see the load's input_tokens, output_tokens and output_tokens_max)"
        )

    def uneven_blocks(self, block_tokens: int) -> NoReturn:
        """Raise ConfigError for prefix blocks of a load that are not whole blocks of the engine."""
        assert self._llm is not None
        raise ConfigError(
            f"block_size of replica {self._llm.replica}: the load states what prompts share in blocks of {block_tokens} tokens, "
            f"which is not a multiple of {self._llm.block_size}; choose a block_size that divides it, or prefix_caching=false"
        )

    def too_long(self, why: str) -> NoReturn:
        """Raise ConfigError for work that the engine's clock cannot hold."""
        raise ConfigError(f"device {self._device}: {why}; shorten the load or the outputs")


_LARGEST = 2**40  # keeps the native sums far from their limits


def why_failed(llm: LlmReplica, value: int) -> str:
    """The reason of a task that failed with ``value`` (FAILED in sage_sim.engine_reference)."""
    if value < 0:
        return f"sequence too long: prompt and output come to {-value} tokens, the replica takes up to {llm.tokens_max}"
    return f"KV cache too small: the task needs {value} blocks, the replica has {llm.kv_blocks}"


class SpeedHints(NamedTuple):
    """As in sage_core.events.ReplicaJoined."""

    fixed_ns: float
    input_token_ns: float
    output_token_ns: float
    output_seq_ns: float


def speed_hints(llm: LlmReplica) -> SpeedHints:
    """The engine's own law of time made linear, for a task that is alone in its iteration.

    ``input_token_ns`` is the slope of a prefill around 512 tokens and ``fixed_ns`` what makes the line meet the law there
    (never below 0); ``output_token_ns`` is an iteration of no sequences, and ``output_seq_ns`` what a sequence of 576
    tokens of context adds to it. CPU costs on the way in and out are included. Waiting, chunking, speculation and the
    prefills of others are not: the plane corrects for what it observes.
    """
    law = llm.time
    fixed_ns, input_token_ns = _line(
        llm, lambda tokens: law.iteration_ps(IterationWork(chunks=1, prefill_tokens=tokens, attention2=tokens**2))
    )
    one, many = (law.iteration_ps(IterationWork(n, n * TYPICAL_CONTEXT_TOKENS)) for n in (1, TYPICAL_SEQS))
    per_seq_ps = (many - one) / (TYPICAL_SEQS - 1)
    output_token_ns, output_seq_ns = max(0.0, one - per_seq_ps) / 1000, per_seq_ps / 1000
    if not llm.async_scheduling:
        output_token_ns += llm.scheduler_ns
        output_seq_ns += llm.scheduler_seq_ns
    return SpeedHints(
        fixed_ns + llm.api_server_ns + llm.detokenizer_token_ns,
        input_token_ns + llm.api_server_token_ns,
        output_token_ns,
        output_seq_ns,
    )


def _line(config: LlmReplica | EmbedReplica, alone_ps: Callable[[int], int]) -> tuple[float, float]:
    """(fixed_ns, input_token_ns): slope from half to twice TYPICAL_INPUT_TOKENS, over the steps of the kernels."""
    low, high = TYPICAL_INPUT_TOKENS // 2, TYPICAL_INPUT_TOKENS * 2
    slope_ps = (alone_ps(high) - alone_ps(low)) / (high - low)
    fixed_ps = max(0.0, alone_ps(TYPICAL_INPUT_TOKENS) - slope_ps * TYPICAL_INPUT_TOKENS)
    return config.ingress_ns + config.egress_ns + fixed_ps / 1000, slope_ps / 1000


def _numbers(config: LlmReplica | EmbedReplica) -> Numbers:
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("time", "replica", "pool")}
    return config.time.numbers() | {key: int(value) for key, value in own.items()}


def _check(config: LlmReplica | EmbedReplica, key: str, least: int) -> None:
    value = getattr(config, key)
    if type(value) is not int or not least <= value <= _LARGEST:
        expected = f"a whole number from {least} to {_LARGEST}"
        raise ConfigError(f"{key} of replica {config.replica}: expected {expected}, got {value!r}")
