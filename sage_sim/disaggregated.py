"""Prefill and decode on engines of their own, shown to the control plane as one replica.

A task is prefilled on one engine, its keys and values travel over a link, and another engine decodes it: the pattern of
vLLM with a KV connector behind its proxy. The rules:

* The prefill engine runs the task for one token, whose only use is that its end means that the keys and values are
  there. It gives its blocks back at once (vLLM keeps them until they have been read).
* Each prefill engine has one outgoing link, which carries one task's keys and values after another:
  ``latency_ns + bytes / bandwidth`` each.
* The decode engine computes the last token of the prompt again, as vLLM does, and every output token with it, the first
  one included: TTFT contains the transfer and a decode iteration. What it has to preempt it prefills itself.
* The engine with the fewest tokens given to it and not done is chosen, the first of equals; for decoding when the
  transfer begins.

Each engine's time is its own: they are different devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from sage_core import _native
from sage_core.backend import OutputTokens
from sage_core.commands import AnyCommand, Cancel, Dispatch, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent, ReplicaJoined, ReplicaReported, TaskFailed, TaskFinished, TokensProduced
from sage_core.units import SECOND, Nanos, PoolKind, request_of
from sage_sim import engine_reference
from sage_sim.engine import LlmReplica, ReplicaUsage, speed_hints, why_failed
from sage_sim.engine_reference import FAILED, FINISHED, FIRST_TOKEN, Seen


@dataclass(frozen=True, slots=True)
class KvLink:
    """A link out of a prefill engine. Raises ConfigError."""

    bytes_per_token: int  # keys and values
    bytes_per_s: int
    latency_ns: int = 0

    def __post_init__(self) -> None:
        for key, least in (("bytes_per_token", 1), ("bytes_per_s", 1), ("latency_ns", 0)):
            value = getattr(self, key)
            if type(value) is not int or value < least:
                raise ConfigError(f"KV link: {key}: expected a whole number from {least}, got {value!r}")

    def transfer_ns(self, tokens: int) -> int:
        """How long the link is busy with the keys and values of ``tokens``."""
        return self.latency_ns + -(-self.bytes_per_token * tokens * SECOND // self.bytes_per_s)


@dataclass(slots=True, eq=False)
class _Place:
    """Where a task is: at prefill engine ``prefill``, then on its way to decode engine ``decode`` or there."""

    task: Task
    output_tokens: int
    prefill: int
    decode: int | None = None
    arrived: bool = False

    @property
    def tokens(self) -> int:
        return self.task.input_tokens + self.output_tokens


class _Transfer(NamedTuple):
    at: int  # ns, when it has arrived
    number: int
    place: _Place


class DisaggregatedDevice:
    """A BackendModel (sage_core.backend) of one replica. ``prefill`` and ``decode``: at least one engine each.

    The replica bears the id and the pool of the first decode engine; those of the others mean nothing. output_tokens:
    true output length of a request id, cut to the client's cap. reference: run the Python meaning of the engines.
    """

    def __init__(
        self,
        device: int,
        node: str,
        prefill: Sequence[LlmReplica],
        decode: Sequence[LlmReplica],
        link: KvLink,
        output_tokens: OutputTokens,
        reference: bool = False,
    ) -> None:
        if not prefill or not decode:
            raise ConfigError(f"device {device} on {node}: expected at least one prefill and one decode engine")
        self._device = device
        self._node = node
        self._prefill = list(prefill)
        self._decode = list(decode)
        self._link = link
        self._output_tokens = output_tokens
        make: type[_native.Engine] | type[engine_reference.Engine] = (
            engine_reference.Engine if reference else _native.Engine
        )
        # The first token of a prefill engine goes nowhere: only the decode engine answers.
        self._prefills = [make(replace(llm, egress_ns=0, detokenizer_token_ns=0).numbers(), None) for llm in prefill]
        self._decodes = [
            make(replace(llm, ingress_ns=0, api_server_ns=0, api_server_token_ns=0).numbers(), None) for llm in decode
        ]
        self._link_free_at = [0] * len(prefill)
        self._transfers: list[_Transfer] = []  # heap
        self._number = 0
        self._places: dict[int, _Place] = {}
        self._prefill_tokens = [0] * len(prefill)
        self._decode_tokens = [0] * len(decode)

    def joined(self) -> list[ReplicaJoined]:
        """What the replica says when it becomes healthy; a task's speed is that of one engine of each kind."""
        first, last = speed_hints(self._prefill[0]), speed_hints(self._decode[0])
        transfer_ns = self._link.bytes_per_token * SECOND / self._link.bytes_per_s
        return [
            ReplicaJoined(
                replica=self._decode[0].replica,
                pool=self._decode[0].pool,
                pool_kind=PoolKind.LLM,
                device=self._device,
                node=self._node,
                tasks_max=sum(llm.max_num_seqs for llm in self._decode),
                batch_tokens_max=sum(llm.max_num_batched_tokens for llm in self._prefill),
                kv_tokens_max=sum(llm.kv_blocks * llm.block_size for llm in self._decode),
                fixed_ns=first.fixed_ns + self._link.latency_ns,
                input_token_ns=first.input_token_ns + transfer_ns,
                output_token_ns=last.output_token_ns,
                output_seq_ns=last.output_seq_ns,
            )
        ]

    def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[AnyEvent]:
        """Advance to ``now``, apply ``commands``, return what the plane should know, in the order it happened.

        A task that can never fit an engine's KV cache fails at once and is not retryable.
        """
        try:
            told = self._advance(now)
            for command in commands:
                self._apply(now, command)
            return told + self._advance(now) if commands else told
        except OverflowError as error:
            raise ConfigError(f"device {self._device}: {error}; shorten the load or the outputs") from error

    @property
    def wakeup_at(self) -> Nanos:
        """Next instant at which something happens inside if no command comes; ``NEVER`` when idle.

        Not everything that happens inside is visible outside: the end of a prefill and of a transfer are not.
        """
        at = min(engine.wakeup_at for engine in (*self._prefills, *self._decodes))
        return Nanos(min(at, self._transfers[0].at) if self._transfers else at)

    def report(self, now: Nanos) -> list[ReplicaReported]:
        """Running: in any iteration. Waiting: for any engine, or on its way. Free blocks: those for decoding."""
        self._run(now)
        engines = [*self._prefills, *self._decodes]
        running = sum(engine.running for engine in engines)
        waiting = sum(engine.waiting for engine in engines) + len(self._transfers)
        free = sum(engine.kv_blocks_free for engine in self._decodes)
        return [ReplicaReported(self._decode[0].replica, running, waiting, free)]

    def usage(self, now: Nanos) -> list[ReplicaUsage]:
        """Sums over all engines: the replica can be busy several seconds a second. ITL is that of decoding."""
        self._run(now)
        engines = [*self._prefills, *self._decodes]
        seen = Seen(*map(max, zip(*(engine.seen for engine in engines), strict=True)))
        return [
            ReplicaUsage(
                self._decode[0].replica,
                sum(engine.busy_ns for engine in engines),
                sum(engine.iterations for engine in engines),
                sum(engine.preemptions for engine in engines),
                sum(engine.itl_count for engine in self._decodes),
                sum(engine.itl_sum_ns for engine in self._decodes),
                prefill_busy_ns=sum(engine.prefill_busy_ns for engine in engines),
                prefix_queries=sum(engine.prefix_queries for engine in engines),
                prefix_hits=sum(engine.prefix_hits for engine in engines),
                seen=seen,
            )
        ]

    def startup_ns(self) -> int:
        """From start to healthy, all engines."""
        return max(llm.restart_ns for llm in (*self._prefill, *self._decode))

    def crash(self, now: Nanos) -> None:
        """Drop everything; nothing is told. The driver says that the replica left."""
        for engine in (*self._prefills, *self._decodes):
            engine.clear(now)
        self._transfers.clear()
        self._places.clear()
        self._link_free_at = [0] * len(self._prefill)
        self._prefill_tokens = [0] * len(self._prefill)
        self._decode_tokens = [0] * len(self._decode)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _advance(self, now: int) -> list[AnyEvent]:
        """Everything that happens up to ``now``, instant by instant: one engine's end is another's beginning."""
        events: list[AnyEvent] = []
        while (at := self.wakeup_at) < now:
            events += self._happen(at)
        return events + self._happen(now)

    def _run(self, now: int) -> None:
        for engine in (*self._prefills, *self._decodes):
            engine.run(now)

    def _happen(self, now: int) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        for index, engine in enumerate(self._prefills):
            for code, task, value in engine.advance(now):
                if code == FINISHED:
                    self._send(now, self._places[task])
                elif code == FAILED:
                    self._prefill_tokens[index] -= self._places.pop(task).task.input_tokens
                    events.append(self._failed(self._prefill[index], task, value))
        while self._transfers and self._transfers[0].at <= now:
            self._arrive(now, heappop(self._transfers).place)
        for index, engine in enumerate(self._decodes):
            for code, task, value in engine.advance(now):
                if code == FIRST_TOKEN:
                    events.append(TokensProduced(task, value))
                    continue
                self._decode_tokens[index] -= self._places.pop(task).tokens
                failed = code == FAILED
                events.append(self._failed(self._decode[index], task, value) if failed else TaskFinished(task, value))
        return events

    def _send(self, now: int, place: _Place) -> None:
        self._prefill_tokens[place.prefill] -= place.task.input_tokens
        place.decode = self._decode_tokens.index(min(self._decode_tokens))
        self._decode_tokens[place.decode] += place.tokens
        begin = max(now, self._link_free_at[place.prefill])
        self._link_free_at[place.prefill] = begin + self._link.transfer_ns(place.task.input_tokens)
        self._number += 1
        heappush(self._transfers, _Transfer(self._link_free_at[place.prefill], self._number, place))

    def _arrive(self, now: int, place: _Place) -> None:
        task = place.task
        assert place.decode is not None
        place.arrived = True
        self._decodes[place.decode].submit_llm(
            now, task.task, task.input_tokens, place.output_tokens, task.priority, (), True
        )

    def _failed(self, engine: LlmReplica, task: int, value: int) -> TaskFailed:
        return TaskFailed(task, why_failed(engine, value), retryable=False)

    def _apply(self, now: int, command: AnyCommand) -> None:
        if not isinstance(command, Dispatch | Cancel) or command.replica != self._decode[0].replica:
            raise IllegalEvent(f"device {self._device}: {type(command).__name__} is not for a replica of this device")
        if isinstance(command, Cancel):
            self._cancel(now, command.task)
        else:
            for task in command.tasks:
                self._submit(now, task)

    def _submit(self, now: int, task: Task) -> None:
        request = request_of(task.task)
        output_tokens = min(self._output_tokens(request, task.stage), task.output_tokens_max)
        if output_tokens < 1 or task.input_tokens < 1:
            raise ConfigError(
                f"request {request}: {task.input_tokens} input and {output_tokens} output tokens; an LLM task has at "
                f"least one of each (see the load's input_tokens, output_tokens and output_tokens_max)"
            )
        to = self._prefill_tokens.index(min(self._prefill_tokens))
        self._prefills[to].submit_llm(now, task.task, task.input_tokens, 1, task.priority)
        self._prefill_tokens[to] += task.input_tokens
        self._places[task.task] = _Place(task, output_tokens, to)

    def _cancel(self, now: int, task: int) -> None:
        """What is on its way arrives, and is dropped: a link does not stop."""
        place = self._places.pop(task, None)
        if place is None:
            return
        if place.decode is None:
            self._prefill_tokens[place.prefill] -= place.task.input_tokens
            self._prefills[place.prefill].cancel(now, task)
            return
        self._decode_tokens[place.decode] -= place.tokens
        if place.arrived:
            self._decodes[place.decode].cancel(now, task)
        else:
            self._transfers = [transfer for transfer in self._transfers if transfer.place is not place]
            heapify(self._transfers)
