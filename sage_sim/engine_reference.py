"""The simulated device, one iteration at a time: the meaning of ``sage_core._native.Engine``.

One device with an LLM engine in the manner of vLLM v1, an embedding engine, or both. Nothing here is fast on purpose;
the native twin gives the same events at the same nanoseconds (a property test), and jumps where this one walks.

Time. The device's own clock counts picoseconds, and an iteration starts at the exact picosecond at which the last one
ended; events are told at the first whole nanosecond not before they happen. Work that ends at ``now`` has ended; work
that could start at ``now`` has not started yet, so everything submitted at one instant meets the same iteration. An
iteration in progress is never taken back: what arrives during it waits for the next.

LLM iteration. (1) Running sequences in running order: one token each while decoding, or the next chunk of a prompt
that is still being prefilled, within the token budget. One that needs a KV block when none is free preempts the last
running sequence (priority queue: the least urgent, then the latest), possibly itself: all its blocks are freed, it goes
back to the front of its class in the waiting queue, and prompt and generated tokens are later prefilled again.
(2) If nobody was preempted, waiting sequences are admitted in order of arrival (priority queue: the lower priority
value first, then arrival) while sequences, budget and blocks suffice; the first that does not fit stops the rest.
Blocks are taken as tokens are computed: ``ceil(tokens / block_size)`` per sequence. The iteration that completes a
prefill yields a token.

Where this differs from vLLM, knowingly. When a sequence of a priority queue preempts itself, vLLM ends the pass and
everybody behind it loses an iteration; here the pass goes on. Without chunked prefill a prompt is never split: the
first prompt of an iteration is taken whole, even over the budget, and further ones only if they fit in what is left
(vLLM refuses prompts longer than the budget in this mode).

Shared device. When both engines have work they take turns: one LLM iteration, one embedding batch. This is time
slicing at the granularity of iterations; a device shared by MPS or MIG behaves otherwise.
"""

from __future__ import annotations

import pickle
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from sage_core.errors import IllegalEvent
from sage_core.units import NEVER
from sage_sim.iteration import IterationTime, IterationWork

FIRST_TOKEN, FINISHED, FAILED = 0, 1, 2
"""Event codes. Values: output tokens so far (1); output tokens in all (0 for an embedding); KV blocks it would need."""

TOKENS_MAX = 2**31 - 1
"""Most tokens in or out of a task; keeps the native sums far from their limits."""


class Engine:
    """A device's engines in virtual time. ``llm`` and ``embed`` are whole numbers by name, ``None`` where absent.

    llm: the coefficients of IterationTime (ps), max_num_seqs, max_num_batched_tokens, block_size (tokens), kv_blocks,
    chunked_prefill and priority_queue (0 or 1), ingress_ns (submitted to visible), egress_ns (happened to told).
    embed: coefficients, max_batch_tasks, max_batch_tokens, padding (0 or 1), ingress_ns, egress_ns.

    ``now`` (ns) never goes back. Raises IllegalEvent for misuse by the caller.
    """

    def __init__(self, llm: Mapping[str, int] | None, embed: Mapping[str, int] | None) -> None:
        self.llm = None if llm is None else _Llm(llm)
        self.embed = None if embed is None else _Embed(embed)
        self.now = 0
        self.free_at = 0  # ps
        self.ran_last: Literal["llm", "embed"] = "embed"
        self.work: _Work | None = None
        self.outbox: list[tuple[int, int, int, int]] = []  # (at ns, code, task, value), in order of telling
        self.known: set[int] = set()  # tasks whose end has not been told
        self.arrivals = 0
        self._wakeup_at: int | None = None  # None: to be found again

    # --- commands ----------------------------------------------------------------------------------------------------

    def submit_llm(self, now: int, task: int, input_tokens: int, output_tokens: int, priority: int) -> None:
        """Give the LLM engine a task of ``input_tokens`` that will generate exactly ``output_tokens`` (both from 1)."""
        llm = self.llm
        if llm is None:
            raise IllegalEvent("this device has no LLM engine")
        _check_tokens(task, input_tokens, output_tokens)
        self._enter(now, task)
        blocks = _ceil_div(input_tokens + output_tokens - 1, llm.block_size)  # the last token is never computed on
        if blocks > llm.kv_blocks:
            self._tell(now, FAILED, task, blocks)
            return
        key = (priority if llm.priority_queue else 0, self._arrival())
        llm.pending.append(_Sequence(key, task, (now + llm.ingress_ns) * 1000, input_tokens, output_tokens))

    def submit_embed(self, now: int, task: int, tokens: int) -> None:
        """Give the embedding engine a task of ``tokens`` input tokens (from 1)."""
        if self.embed is None:
            raise IllegalEvent("this device has no embedding engine")
        _check_tokens(task, tokens)
        self._enter(now, task)
        visible_at = (now + self.embed.ingress_ns) * 1000
        self.embed.pending.append(_Sequence((0, self._arrival()), task, visible_at, tokens, 0))

    def cancel(self, now: int, task: int) -> bool:
        """Drop the task; nothing more is told of it. False if its end was already told, or it was never here.

        The iteration it was part of takes as long as it would have.
        """
        self.run(now)
        if task not in self.known:
            return False
        self.known.remove(task)
        self._wakeup_at = None
        self.outbox = [entry for entry in self.outbox if entry[2] != task]
        for queue in self._queues():
            queue[:] = [seq for seq in queue if seq.task != task]
        if self.work is not None:
            self.work.members = [(seq, tokens) for seq, tokens in self.work.members if seq.task != task]
        return True

    def clear(self, now: int) -> None:
        """Forget everything at ``now``: a crash. Nothing is told."""
        self.run(now)
        if self.work is not None:
            self._account(self.work, self.now * 1000)
        self.work, self.free_at, self._wakeup_at = None, self.now * 1000, None
        self.outbox.clear()
        self.known.clear()
        for queue in self._queues():
            queue.clear()

    def advance(self, now: int) -> list[tuple[int, int, int]]:
        """Everything to be told up to and including ``now`` that was not told yet: (code, task, value) in order."""
        self.run(now)
        told = [entry[1:] for entry in self.outbox if entry[0] <= now]
        self.outbox = [entry for entry in self.outbox if entry[0] > now]
        self.known -= {task for code, task, _ in told if code != FIRST_TOKEN}
        if told:
            self._wakeup_at = None
        return told

    def run(self, now: int) -> None:
        """Go to ``now`` without telling anything; :meth:`advance` will."""
        if now < self.now:
            raise IllegalEvent(f"time went back: {now} after {self.now}")
        self.now = now
        while True:
            if self.work is not None:
                if self.work.end > now * 1000:
                    return
                self._finish(self.work)
            else:
                start = self._next_start()
                if start is None or start >= now * 1000:
                    return
                self._start(start)

    @property
    def wakeup_at(self) -> int:
        """Instant (ns) of the next event to be told if nothing else is submitted; NEVER when there is none."""
        if self._wakeup_at is None:
            self._wakeup_at = self._look_ahead()
        return self._wakeup_at

    # --- what the engine publishes about itself, as of the last ``now`` -------------------------------------------------

    @property
    def running(self) -> int:
        return 0 if self.llm is None else len(self.llm.running)

    @property
    def waiting(self) -> int:
        return 0 if self.llm is None else len(self.llm.waiting) + self._visible(self.llm.pending)

    @property
    def kv_blocks_free(self) -> int:
        return 0 if self.llm is None else self.llm.kv_blocks_free

    @property
    def preemptions(self) -> int:
        return 0 if self.llm is None else self.llm.preemptions

    @property
    def iterations(self) -> int:
        """LLM iterations that have ended."""
        return 0 if self.llm is None else self.llm.iterations

    @property
    def embed_running(self) -> int:
        return len(self.work.members) if self.work is not None and self.work.engine == "embed" else 0

    @property
    def embed_waiting(self) -> int:
        return 0 if self.embed is None else len(self.embed.waiting) + self._visible(self.embed.pending)

    @property
    def embed_batches(self) -> int:
        """Embedding batches that have ended."""
        return 0 if self.embed is None else self.embed.iterations

    @property
    def busy_ns(self) -> int:
        """Time spent in LLM iterations so far, the elapsed part of one in progress included."""
        return 0 if self.llm is None else self._busy_ns(self.llm)

    @property
    def embed_busy_ns(self) -> int:
        """Time spent in embedding batches so far."""
        return 0 if self.embed is None else self._busy_ns(self.embed)

    @property
    def itl_count(self) -> int:
        """Gaps between successive output tokens of one sequence, over all sequences."""
        return 0 if self.llm is None else sum(self.llm.itl.values())

    @property
    def itl_sum_ns(self) -> int:
        """Exact sum of those gaps, rounded down once."""
        return 0 if self.llm is None else self.llm.itl_sum_ps // 1000

    def itl_samples(self) -> dict[int, int]:
        """How many gaps (rounded down to ns) fell in each bucket, by the bucket's lower edge in ns (ITL_EDGES_NS)."""
        return {} if self.llm is None else {ITL_EDGES_NS[bucket]: n for bucket, n in sorted(self.llm.itl.items())}

    # --- time --------------------------------------------------------------------------------------------------------

    def _look_ahead(self) -> int:
        probe: Engine = pickle.loads(pickle.dumps(self, protocol=-1))  # a deep copy, only faster
        while not (probe.outbox and probe._earliest_told_ns() >= probe.outbox[0][0]):
            if probe.work is not None:
                probe._finish(probe.work)
            elif (start := probe._next_start()) is not None:
                probe._start(start)
            else:
                break
        return probe.outbox[0][0] if probe.outbox else NEVER

    def _next_start(self) -> int | None:
        """When the free device starts its next iteration (ps)."""
        if (self.llm and (self.llm.running or self.llm.waiting)) or (self.embed and self.embed.waiting):
            return self.free_at
        pending = [engine.pending[0].visible_at for engine in (self.llm, self.embed) if engine and engine.pending]
        return max(self.free_at, min(pending)) if pending else None

    def _start(self, start: int) -> None:
        for engine in (self.llm, self.embed):
            if engine is not None:
                while engine.pending and engine.pending[0].visible_at <= start:
                    insort(engine.waiting, engine.pending.pop(0), key=_key)
        llm_has_work = self.llm is not None and bool(self.llm.running or self.llm.waiting)
        embed_has_work = self.embed is not None and bool(self.embed.waiting)
        if embed_has_work and (self.ran_last == "llm" or not llm_has_work):
            assert self.embed is not None
            self.ran_last = "embed"
            self.work = self.embed.start(start)
        else:
            assert self.llm is not None
            self.ran_last = "llm"
            self.work = self.llm.start(start)

    def _finish(self, work: _Work) -> None:
        engine = self.llm if work.engine == "llm" else self.embed
        assert engine is not None
        self._account(work, work.end)
        engine.iterations += 1
        self.work, self.free_at = None, work.end
        engine.finish(
            work, lambda code, task, value: self._tell(_ceil_div(work.end, 1000) + engine.egress_ns, code, task, value)
        )

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _enter(self, now: int, task: int) -> None:
        self.run(now)
        if task in self.known:
            raise IllegalEvent(f"task {task} was submitted twice")
        self.known.add(task)
        self._wakeup_at = None

    def _arrival(self) -> int:
        self.arrivals += 1
        return self.arrivals

    def _tell(self, at: int, code: int, task: int, value: int) -> None:
        insort(self.outbox, (at, code, task, value), key=lambda entry: entry[0])

    def _earliest_told_ns(self) -> int:
        """No event yet to come can be told before this instant."""
        clock = self.free_at if self.work is None else self.work.end
        return _ceil_div(clock, 1000) + min(engine.egress_ns for engine in (self.llm, self.embed) if engine)

    def _account(self, work: _Work, until: int) -> None:
        engine = self.llm if work.engine == "llm" else self.embed
        assert engine is not None
        engine.busy_ps += until - work.start

    def _busy_ns(self, engine: _Llm | _Embed) -> int:
        in_progress = 0
        if self.work is not None and engine is (self.llm if self.work.engine == "llm" else self.embed):
            in_progress = self.now * 1000 - self.work.start
        return (engine.busy_ps + in_progress) // 1000

    def _visible(self, pending: list[_Sequence]) -> int:
        return sum(seq.visible_at <= self.now * 1000 for seq in pending)

    def _queues(self) -> list[list[_Sequence]]:
        queues = []
        if self.llm is not None:
            queues += [self.llm.pending, self.llm.waiting, self.llm.running]
        if self.embed is not None:
            queues += [self.embed.pending, self.embed.waiting]
        return queues


@dataclass(eq=False, slots=True)
class _Sequence:
    key: tuple[int, int]  # (priority, running number of the submission)
    task: int
    visible_at: int  # ps
    input_tokens: int
    output_tokens: int
    generated: int = 0  # output tokens
    computed: int = 0  # tokens whose keys and values are in the cache, or will be when the iteration ends
    decoding: bool = False
    last_token_at: int = 0  # ps


@dataclass(eq=False, slots=True)
class _Work:
    """An iteration or an embedding batch in progress. ``members``: (sequence, tokens computed for it)."""

    engine: Literal["llm", "embed"]
    start: int  # ps
    end: int
    members: list[tuple[_Sequence, int]] = field(default_factory=list)


_Tell = Callable[[int, int, int], None]


class _Llm:
    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.time = _iteration_time(numbers)
        self.max_num_seqs = numbers["max_num_seqs"]
        self.max_num_batched_tokens = numbers["max_num_batched_tokens"]
        self.block_size = numbers["block_size"]
        self.kv_blocks = numbers["kv_blocks"]
        self.chunked_prefill = bool(numbers["chunked_prefill"])
        self.priority_queue = bool(numbers["priority_queue"])
        self.ingress_ns = numbers["ingress_ns"]
        self.egress_ns = numbers["egress_ns"]
        self.pending: list[_Sequence] = []  # submitted, not yet visible
        self.waiting: list[_Sequence] = []  # by key
        self.running: list[_Sequence] = []  # in order of admission
        self.busy_ps = self.iterations = self.preemptions = self.itl_sum_ps = 0
        self.itl: dict[int, int] = {}

    @property
    def kv_blocks_free(self) -> int:
        return self.kv_blocks - sum(self._blocks(seq.computed) for seq in self.running)

    def start(self, start: int) -> _Work:
        """Form the iteration; ``computed`` of its members already counts what it computes."""
        budget = self.max_num_batched_tokens
        members: list[tuple[_Sequence, int]] = []
        preempted = False
        for seq in list(self.running):
            if seq not in self.running:
                continue  # preempted for one before it
            tokens = min(seq.input_tokens + seq.generated - seq.computed, budget)
            need = self._blocks(seq.computed + tokens) - self._blocks(seq.computed)
            while need > 0 and need > self.kv_blocks_free:
                victim = max(self.running, key=_key) if self.priority_queue else self.running[-1]
                preempted = True
                budget += sum(taken for other, taken in members if other is victim)
                members = [member for member in members if member[0] is not victim]
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                seq.computed += tokens
                budget -= tokens
                members.append((seq, tokens))
        while not preempted and self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            seq = self.waiting[0]
            tokens = seq.input_tokens + seq.generated
            if self.chunked_prefill:
                tokens = min(tokens, budget)
            elif tokens > budget and any(not other.decoding for other, _ in members):
                break
            if self._blocks(tokens) > self.kv_blocks_free:
                break
            self.running.append(self.waiting.pop(0))
            seq.computed = tokens
            budget -= tokens
            members.append((seq, tokens))
        return _Work("llm", start, start + self._duration_ps(members), members)

    def finish(self, work: _Work, tell: _Tell) -> None:
        for seq, _ in work.members:
            if seq.computed < seq.input_tokens + seq.generated:
                continue  # the prompt goes on in the next iteration
            seq.generated += 1
            seq.decoding = True
            if seq.generated == 1:
                tell(FIRST_TOKEN, seq.task, 1)
            else:
                self._count_gap(work.end - seq.last_token_at)
            seq.last_token_at = work.end
            if seq.generated == seq.output_tokens:
                self.running.remove(seq)
                tell(FINISHED, seq.task, seq.output_tokens)

    def _preempt(self, seq: _Sequence) -> None:
        self.preemptions += 1
        self.running.remove(seq)
        seq.computed = 0
        seq.decoding = False
        # All that wait are later than all that run, so the front of the queue is the place its key gives it.
        insort(self.waiting, seq, key=_key)

    def _duration_ps(self, members: list[tuple[_Sequence, int]]) -> int:
        decodes = [seq for seq, _ in members if seq.decoding]
        prefills = [(seq.computed - tokens, tokens) for seq, tokens in members if not seq.decoding]
        return self.time.iteration_ps(
            IterationWork(
                seqs=len(decodes),
                kv_tokens=sum(seq.computed - 1 for seq in decodes),
                chunks=len(prefills),
                prefill_tokens=sum(tokens for _, tokens in prefills),
                prefill_context=sum(context for context, _ in prefills),
                attention2=sum(tokens * (2 * context + tokens) for context, tokens in prefills),
            )
        )

    def _count_gap(self, gap_ps: int) -> None:
        self.itl_sum_ps += gap_ps
        bucket = bisect_right(ITL_EDGES_NS, gap_ps // 1000) - 1
        self.itl[bucket] = self.itl.get(bucket, 0) + 1

    def _blocks(self, tokens: int) -> int:
        return _ceil_div(tokens, self.block_size)


class _Embed:
    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.time = _iteration_time(numbers)
        self.max_batch_tasks = numbers["max_batch_tasks"]
        self.max_batch_tokens = numbers["max_batch_tokens"]
        self.padding = bool(numbers["padding"])
        self.ingress_ns = numbers["ingress_ns"]
        self.egress_ns = numbers["egress_ns"]
        self.pending: list[_Sequence] = []
        self.waiting: list[_Sequence] = []
        self.busy_ps = self.iterations = 0

    def start(self, start: int) -> _Work:
        """Take tasks in order while the batch has room; at least one. ``max_batch_tokens`` counts unpadded tokens."""
        batch = [self.waiting.pop(0)]
        while self.waiting and len(batch) < self.max_batch_tasks:
            if sum(seq.input_tokens for seq in batch) + self.waiting[0].input_tokens > self.max_batch_tokens:
                break
            batch.append(self.waiting.pop(0))
        sizes = [seq.input_tokens for seq in batch]
        if self.padding:
            sizes = [max(sizes)] * len(sizes)
        duration = self.time.batch_ps(sum(sizes), sum(size * size for size in sizes))
        return _Work("embed", start, start + duration, [(seq, seq.input_tokens) for seq in batch])

    def finish(self, work: _Work, tell: _Tell) -> None:
        for seq, _ in work.members:
            tell(FINISHED, seq.task, 0)


def _itl_edges() -> tuple[int, ...]:
    edges = [0]
    while edges[-1] < 10**18:
        edges.append(edges[-1] + max(1, edges[-1] // 100))
    return tuple(edges)


ITL_EDGES_NS = _itl_edges()
"""Lower edges of the ITL buckets: every ns up to 200, then 1 % wide, by integer arithmetic alone."""


def _iteration_time(numbers: Mapping[str, int]) -> IterationTime:
    return IterationTime(**{f.name: numbers[f.name] for f in fields(IterationTime)})


def _check_tokens(task: int, *counts: int) -> None:
    for count in counts:
        if not 1 <= count <= TOKENS_MAX:
            raise IllegalEvent(f"task {task}: expected token counts from 1 to {TOKENS_MAX}, got {count}")


def _key(seq: _Sequence) -> tuple[int, int]:
    return seq.key


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
