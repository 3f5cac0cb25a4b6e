"""The simulated device, one iteration at a time: the meaning of ``sage_core._native.Engine``.

One device with an LLM engine in the manner of vLLM v1, an embedding engine, or both. Nothing here is fast on purpose;
the native twin gives the same events at the same nanoseconds (a property test), and jumps where this one walks.

Time. The device's own clock counts picoseconds, and an iteration starts at the exact picosecond at which the last one
ended; events are told at the first whole nanosecond not before they happen. Work that ends at ``now`` has ended; work
that could start at ``now`` has not started yet, so everything submitted at one instant meets the same iteration. An
iteration in progress is never taken back: what arrives during it waits for the next.

LLM iteration, as vLLM 0.19 (v1) decides it. (1) Running sequences in running order: one token each while decoding, or
the next chunk of a prompt that is still being prefilled, within the token budget and, if set, the
``long_prefill_token_threshold``. One that needs a KV block when none is free preempts the last running sequence
(priority queue: the least urgent, then the latest). The preempted one gives back all its blocks, goes back to the front
of its class in the waiting queue, and prompt and generated tokens are later prefilled again, but for what the prefix
cache still has. One that preempts itself ends the pass: whoever is behind it misses the iteration. (2) If nobody was
preempted, waiting sequences are admitted in order of arrival (priority queue: the lower priority value first, then
arrival) while sequences, budget and blocks suffice; the first that does not fit stops the rest. With
``scheduler_reserve_full_isl`` one fits if there are blocks for all of its prompt, else if there are for its first chunk;
``watermark_blocks`` must stay free unless nothing else is scheduled. Blocks are taken as tokens are computed. The
iteration that completes a prefill yields a token, and the last token of a prompt is always computed, so that a prompt
that is cached to the end recomputes its last block.

Asynchronous scheduling: an iteration is decided when the one before it starts, from what is known then: what arrives
later misses it, and what the one before it will finish still holds its slot and its blocks. Nobody is scheduled past
its last token. After a pause there is nothing before it, and an iteration is decided when it starts. When an iteration
that was decided finds all its members cancelled it does not take place; otherwise a cancellation shortens neither the
iteration in progress nor the one decided.

CPU. Scheduling takes ``scheduler_ns + scheduler_seq_ns`` per sequence of the iteration: beside the GPU where it is
asynchronous (the longer of the two counts), before it otherwise. One API-server process tokenises
(``api_server_ns + api_server_token_ns`` per input token), one request after another; ``ingress_ns`` is latency on top.
The tokens of an iteration are told ``egress_ns + detokenizer_token_ns`` per token of that iteration after its end, and
never before those of an earlier one.

Speculative decoding (``draft_tokens`` > 0): every decode verifies that many draft tokens. The n-th verification of a
sequence yields ``floor(n y) - floor((n - 1) y)`` tokens, where y = ``draft_yield_ppm`` / 10^6 is the expected number, so
the mean is right and nothing is random. It costs a decode of 1 + ``draft_tokens`` sequences over one context, and
``draft_ns`` for the drafts of an iteration. Blocks are taken for all drafts.

Known differences from vLLM. What fills up while decoding enters the prefix cache when the sequence gives it back (see
``kv_cache_reference``). ``max_num_partial_prefills`` (0: any number, as vLLM v1, which ignores its own setting) stops
admission while that many prompts would remain incomplete. An iteration in which nobody is scheduled takes no time.
Without chunked prefill a task that may exceed the budget fails at once (vLLM refuses to start). Drafts accepted by an
iteration in progress are known to the one decided during it.

Shared device. When both engines have work they take turns: one LLM iteration, one embedding batch. This is time
slicing at the granularity of iterations. A device shared by MPS is two of these (sage_sim.sharing).
"""

from __future__ import annotations

import pickle
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from sage_core.errors import IllegalEvent
from sage_core.units import NEVER
from sage_sim.iteration import IterationTime, IterationWork
from sage_sim.kv_cache_reference import Content, Held, KvCache

FIRST_TOKEN, FINISHED, FAILED = 0, 1, 2
"""Event codes. Values: output tokens so far (1); output tokens in all (0 for an embedding); KV blocks it would need, or
less the tokens it would need where those exceed the longest sequence."""

TOKENS_MAX = 2**31 - 1
"""Most tokens in or out of a task; keeps the native sums far from their limits."""

CONTENT_MAX = 2**63 - 1
"""Largest content id of a block."""


class Seen(NamedTuple):
    """The largest iterations that have ended, against the range of a profile; 0 where there was none."""

    decode_seqs: int = 0
    decode_kv_tokens: int = 0
    prefill_tokens: int = 0  # new prompt tokens of an iteration, or (padded) tokens of an embedding batch
    prompt_tokens: int = 0  # context at the end of a prefill chunk, or the longest text of a batch


class Engine:
    """A device's engines in virtual time. ``llm`` and ``embed`` are whole numbers by name, ``None`` where absent.

    llm: IterationTime.numbers and the fields of sage_sim.engine.LlmReplica, flags as 0 or 1, with
    ``draft_yield_ppm`` for its acceptance rate. embed: coefficients, max_batch_tasks, max_batch_tokens, padding (0 or 1),
    ingress_ns, egress_ns.

    ``now`` (ns) never goes back. A task id is never used twice. Raises IllegalEvent for misuse by the caller.
    """

    def __init__(self, llm: Mapping[str, Any] | None, embed: Mapping[str, Any] | None) -> None:
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

    def submit_llm(
        self,
        now: int,
        task: int,
        input_tokens: int,
        output_tokens: int,
        priority: int,
        contents: Sequence[int] = (),
        prefilled: bool = False,
    ) -> None:
        """Give the LLM engine a task of ``input_tokens`` that will generate exactly ``output_tokens`` (both from 1).

        contents: ids (from 0) of its first full blocks, chained; may be fewer than the prompt has, or go on into what it
        will generate where that is known to be asked for again. prefilled: keys and values of its prompt come with it;
        only the prompt's last token is computed, and after a preemption everything.
        """
        llm = self.llm
        if llm is None:
            raise IllegalEvent("this device has no LLM engine")
        _check_tokens(task, input_tokens, output_tokens)
        if contents and not all(0 <= content <= CONTENT_MAX for content in contents):
            raise IllegalEvent(f"task {task}: expected contents from 0 to {CONTENT_MAX}")
        self._enter(now, task)
        if llm.longest_sequence and input_tokens + output_tokens > llm.longest_sequence:
            self._tell(now, FAILED, task, -(input_tokens + output_tokens))
            return
        blocks = _ceil_div(input_tokens + output_tokens - 1 + llm.draft_tokens, llm.block_size)
        if blocks > llm.kv_blocks:
            self._tell(now, FAILED, task, blocks)
            return
        key = (priority if llm.priority_queue else 0, self._arrival())
        visible_at = llm.tokenised_at(now, input_tokens) + llm.ingress_ns
        seq = _Sequence(key, task, visible_at * 1000, input_tokens, output_tokens, tuple(contents), prefilled)
        llm.pending.append(seq)

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

        The iteration it was part of takes as long as it would have, and so does one that was decided with it.
        """
        self.run(now)
        if task not in self.known:
            return False
        self.known.remove(task)
        self._wakeup_at = None
        self.outbox = [entry for entry in self.outbox if entry[2] != task]
        if self.llm is not None:
            self.llm.drop(task)
        for queue in self._queues():
            queue[:] = [seq for seq in queue if seq.task != task]
        if self.work is not None:
            self.work.members = [member for member in self.work.members if member.seq.task != task]
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
        if self.llm is not None:
            self.llm.clear()

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

    def generated(self, tasks: Sequence[int]) -> list[int]:
        """Output tokens of each task in iterations that have ended, told or not; 0 for one whose end was told, that is
        not known, or that is an embedding. What happens between two events: a server that streams asks for it."""
        sequences = [] if self.llm is None else [*self.llm.waiting, *self.llm.running]
        tokens = {seq.task: seq.generated for seq in sequences}
        tokens |= {task: value for _, code, task, value in self.outbox if code == FINISHED}
        return [tokens.get(task, 0) for task in tasks]

    @property
    def boundary_at(self) -> int:
        """Earliest instant (ns) after ``now`` at which :meth:`generated` may give other counts if nothing is submitted:
        the end of the iteration or batch in progress, or the start of the next; NEVER when there is none."""
        at = self._next_start() if self.work is None else self.work.end
        return NEVER if at is None else max(self.now + 1, _ceil_div(at, 1000))

    # --- what the engine publishes about itself, as of the last ``now`` -------------------------------------------------

    @property
    def running(self) -> int:
        return 0 if self.llm is None else len(self.llm.running)

    @property
    def waiting(self) -> int:
        return 0 if self.llm is None else len(self.llm.waiting) + self._visible(self.llm.pending)

    @property
    def kv_blocks_free(self) -> int:
        """Blocks that nobody uses, findable contents or not."""
        return 0 if self.llm is None else self.llm.cache.free

    @property
    def preemptions(self) -> int:
        return 0 if self.llm is None else self.llm.preemptions

    @property
    def prefix_queries(self) -> int:
        """Tokens to prefill of every admission, resumed ones included; 0 without a prefix cache."""
        return 0 if self.llm is None else self.llm.prefix_queries

    @property
    def prefix_hits(self) -> int:
        """Those of them that were cached."""
        return 0 if self.llm is None else self.llm.prefix_hits

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
    def embed_tokens(self) -> int:
        """Tokens of the texts in them."""
        return 0 if self.embed is None else self.embed.tokens

    @property
    def embed_padded_tokens(self) -> int:
        """Tokens that they cost: more than ``embed_tokens`` where texts are padded."""
        return 0 if self.embed is None else self.embed.padded_tokens

    @property
    def busy_ns(self) -> int:
        """Time spent in LLM iterations so far, the elapsed part of one in progress included."""
        return 0 if self.llm is None else self._busy_ns(self.llm.busy_ps, "llm")

    @property
    def prefill_busy_ns(self) -> int:
        """The part of ``busy_ns`` in iterations with a prefill chunk (the rest only decode)."""
        return 0 if self.llm is None else self._busy_ns(self.llm.prefill_busy_ps, "llm", prefill=True)

    @property
    def embed_busy_ns(self) -> int:
        """Time spent in embedding batches so far."""
        return 0 if self.embed is None else self._busy_ns(self.embed.busy_ps, "embed")

    @property
    def seen(self) -> Seen:
        return Seen() if self.llm is None else self.llm.seen

    @property
    def embed_seen(self) -> Seen:
        return Seen() if self.embed is None else self.embed.seen

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
        engine.seen = Seen(*map(max, engine.seen, work.seen))
        self.work, self.free_at = None, work.end
        at = engine.told_at(work)
        engine.finish(work, lambda code, task, value: self._tell(at, code, task, value))

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
        return _ceil_div(clock, 1000) + min(engine.egress_min_ns for engine in (self.llm, self.embed) if engine)

    def _account(self, work: _Work, until: int) -> None:
        engine = self.llm if work.engine == "llm" else self.embed
        assert engine is not None
        engine.busy_ps += until - work.start
        if work.engine == "llm" and work.seen.prefill_tokens:
            assert self.llm is not None
            self.llm.prefill_busy_ps += until - work.start

    def _busy_ns(self, ended_ps: int, engine: Literal["llm", "embed"], prefill: bool = False) -> int:
        work = self.work
        if work is not None and work.engine == engine and (not prefill or work.seen.prefill_tokens):
            ended_ps += self.now * 1000 - work.start
        return ended_ps // 1000

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
    given: tuple[int, ...] = ()  # contents
    prefilled: bool = False
    generated: int = 0  # output tokens
    flying: int = 0  # output tokens of iterations that are decided and have not ended
    computed: int = 0  # tokens whose keys and values are in the cache, or will be when those iterations have ended
    prompt_done: bool = False  # what comes next is a decode
    verifications: int = 0  # decodes so far, where they are speculative
    held: Held = field(default_factory=list)
    last_token_at: int = 0  # ps

    @property
    def tokens(self) -> int:
        """Prompt and output, those of iterations that have not ended included."""
        return self.input_tokens + self.generated + self.flying

    def contents(self, blocks: int) -> list[Content]:
        """Of its first ``blocks`` blocks."""
        return [*self.given[:blocks], *((self.task, index) for index in range(len(self.given), blocks))]


@dataclass(eq=False, slots=True)
class _Member:
    """A sequence's part in an iteration or a batch: ``tokens`` computed on top of ``context``, ``outputs`` generated."""

    seq: _Sequence
    tokens: int
    context: int = 0
    outputs: int = 0
    decode: bool = False


@dataclass(eq=False, slots=True)
class _Work:
    """An iteration or an embedding batch in progress."""

    engine: Literal["llm", "embed"]
    start: int  # ps
    end: int
    members: list[_Member]
    seen: Seen


@dataclass(eq=False, slots=True)
class _Decided:
    """An iteration that has not started."""

    members: list[_Member]
    duration: int  # ps
    seen: Seen


_Tell = Callable[[int, int, int], None]


class _Llm:
    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.time = _iteration_time(numbers)
        self.max_num_seqs = numbers["max_num_seqs"]
        self.max_num_batched_tokens = numbers["max_num_batched_tokens"]
        self.block_size = numbers["block_size"]
        self.kv_blocks = numbers["kv_blocks"]
        self.chunked_prefill = bool(numbers["chunked_prefill"])
        self.long_prefill_token_threshold = numbers["long_prefill_token_threshold"]
        self.max_num_partial_prefills = numbers["max_num_partial_prefills"]
        self.reserve_full_prompt = bool(numbers["scheduler_reserve_full_isl"])
        self.watermark_blocks = numbers["watermark_blocks"]
        self.longest_sequence = numbers["max_model_len"]
        if not self.chunked_prefill:
            self.longest_sequence = min(
                self.longest_sequence or self.max_num_batched_tokens, self.max_num_batched_tokens
            )
        self.priority_queue = bool(numbers["priority_queue"])
        self.caching = bool(numbers["prefix_caching"])
        self.async_scheduling = bool(numbers["async_scheduling"])
        self.draft_tokens = numbers["draft_tokens"]
        self.draft_yield_ppm = numbers["draft_yield_ppm"]
        self.draft_ps = numbers["draft_ns"] * 1000
        self.scheduler_ps = numbers["scheduler_ns"] * 1000
        self.scheduler_seq_ps = numbers["scheduler_seq_ns"] * 1000
        self.api_server_ns = numbers["api_server_ns"]
        self.api_server_token_ns = numbers["api_server_token_ns"]
        self.ingress_ns = numbers["ingress_ns"]
        self.egress_ns = numbers["egress_ns"]
        self.detokenizer_token_ns = numbers["detokenizer_token_ns"]
        self.busy_ps = self.prefill_busy_ps = self.iterations = self.preemptions = self.itl_sum_ps = 0
        self.prefix_queries = self.prefix_hits = 0
        self.itl: dict[int, int] = {}
        self.seen = Seen()
        self.pending: list[_Sequence] = []  # submitted, not yet visible
        self.waiting: list[_Sequence] = []  # by key
        self.running: list[_Sequence] = []  # in order of admission
        self.clear()

    def clear(self) -> None:
        """Forget the state of all that is not a queue."""
        self.cache = KvCache(self.kv_blocks, self.caching)
        self.ahead: _Decided | None = None
        self.tokenised = self.last_told_at = 0  # ns

    # --- outside the engine core -------------------------------------------------------------------------------------

    def tokenised_at(self, now: int, input_tokens: int) -> int:
        """When the API server is done with a request that comes at ``now`` (ns)."""
        work = self.api_server_ns + self.api_server_token_ns * input_tokens
        if work == 0:
            return now
        self.tokenised = max(now, self.tokenised) + work
        return self.tokenised

    @property
    def egress_min_ns(self) -> int:
        return self.egress_ns + self.detokenizer_token_ns

    def told_at(self, work: _Work) -> int:
        """When the tokens of an iteration are told (ns)."""
        outputs = sum(member.outputs for member in work.members)
        at = _ceil_div(work.end, 1000) + self.egress_ns + self.detokenizer_token_ns * outputs
        return max(at, self.last_told_at)

    def drop(self, task: int) -> None:
        """Free what a cancelled task holds, and take it out of the iteration that is decided."""
        for seq in self.running:
            if seq.task == task:
                self._give_back(seq)
        if self.ahead is not None:
            self.ahead.members = [member for member in self.ahead.members if member.seq.task != task]

    # --- iterations --------------------------------------------------------------------------------------------------

    def start(self, start: int) -> _Work:
        """The iteration that starts now; with asynchronous scheduling the next one is decided."""
        decided = self.ahead
        while decided is None or not decided.members:
            decided = self._decide()
        self.ahead = self._decide() if self.async_scheduling else None
        return _Work("llm", start, start + decided.duration, decided.members, decided.seen)

    def finish(self, work: _Work, tell: _Tell) -> None:
        """The tokens of an iteration: first those of decodes, then those of prefills, in running order."""
        for member in sorted(work.members, key=lambda member: not member.decode):
            seq = member.seq
            seq.flying -= member.outputs
            if member.outputs == 0:
                continue  # the prompt goes on in a later iteration
            seq.generated += member.outputs
            if seq.generated == member.outputs:
                self.last_told_at = self.told_at(work)
                tell(FIRST_TOKEN, seq.task, member.outputs)
            else:
                self._count_gaps(work.end - seq.last_token_at, 1)
                self._count_gaps(0, member.outputs - 1)
            seq.last_token_at = work.end
            if seq.generated == seq.output_tokens:
                self.last_told_at = self.told_at(work)
                tell(FINISHED, seq.task, seq.output_tokens)
                if seq in self.running:
                    self.running.remove(seq)
                    self._give_back(seq)
                else:  # preempted in the iteration that gave it its last token
                    self.waiting.remove(seq)

    def _decide(self) -> _Decided:
        """The next iteration from what is known; ``computed`` and ``flying`` of its members already count it."""
        members, budget, preempted = self._schedule_running()
        if not preempted:
            self._admit(members, budget)
        return self._decided(members)

    def _schedule_running(self) -> tuple[list[_Member], int, bool]:
        budget = self.max_num_batched_tokens
        members: list[_Member] = []
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            seq = self.running[index]
            if seq.generated + seq.flying >= seq.output_tokens:
                index += 1  # its last token is on its way
                continue
            if seq.prompt_done:
                tokens = min(1 + self.draft_tokens, budget)
            else:
                tokens = self._chunk(seq.tokens - seq.computed, budget)
            need = self._blocks(seq.computed + tokens) - len(seq.held)
            while need > self.cache.free:
                victim = max(self.running, key=_key) if self.priority_queue else self.running[-1]
                preempted = True
                for member in [member for member in members if member.seq is victim]:
                    members.remove(member)
                    budget += member.tokens
                    victim.flying -= member.outputs
                    victim.computed -= member.outputs if member.decode else member.tokens
                if self.running.index(victim) < index:
                    index -= 1
                self._preempt(victim)
                if victim is seq:
                    return members, budget, True
            members.append(self._schedule(seq, tokens))
            budget -= tokens
            index += 1
        return members, budget, preempted

    def _admit(self, members: list[_Member], budget: int) -> None:
        partial = sum(not seq.prompt_done for seq in self.running)
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            seq = self.waiting[0]
            hits = [] if seq.prefilled else self.cache.find(seq.contents((seq.tokens - 1) // self.block_size))
            computed = seq.tokens - 1 if seq.prefilled else len(hits) * self.block_size
            tokens = self._chunk(seq.tokens - computed, budget)
            rest = seq.tokens - computed - tokens
            if not self.chunked_prefill and self._chunk(seq.tokens - computed) > budget:
                break
            if rest and 0 < self.max_num_partial_prefills <= partial:
                break
            blocks = self._blocks(seq.tokens if self.reserve_full_prompt else computed + tokens)
            idle = sum(block.users == 0 for block in hits)  # those are counted as free
            keep = self.watermark_blocks if members else 0
            if blocks - len(hits) + idle > self.cache.free - keep:
                break
            if self.caching and not seq.prefilled:
                self.prefix_queries += seq.tokens
                self.prefix_hits += len(hits) * self.block_size
            partial += rest > 0
            self.running.append(self.waiting.pop(0))
            self.cache.hold(hits)
            seq.held = list(hits)
            seq.computed = computed
            seq.prompt_done = seq.prefilled
            members.append(self._schedule(seq, tokens))
            budget -= tokens

    def _schedule(self, seq: _Sequence, tokens: int) -> _Member:
        """Put ``tokens`` more of it into the iteration. There are blocks for them."""
        context, decode = seq.computed, seq.prompt_done
        need = self._blocks(context + tokens) - len(seq.held)
        seq.held += self.cache.take(max(0, need))
        if decode:
            outputs = min(
                self._verified(seq) if tokens > 1 else 1, tokens, seq.output_tokens - seq.generated - seq.flying
            )
            seq.computed += outputs
        else:
            seq.computed += tokens
            seq.prompt_done = seq.computed == seq.tokens
            outputs = int(seq.prompt_done)
            self.cache.fill(seq.held, seq.given[: seq.computed // self.block_size])
        seq.flying += outputs
        return _Member(seq, tokens, context, outputs, decode)

    def _verified(self, seq: _Sequence) -> int:
        """Tokens that the next verification yields."""
        n = seq.verifications
        seq.verifications += 1
        return (n + 1) * self.draft_yield_ppm // 10**6 - n * self.draft_yield_ppm // 10**6

    def _decided(self, members: list[_Member]) -> _Decided:
        decodes = [member for member in members if member.decode]
        prefills = [member for member in members if not member.decode]
        work = IterationWork(
            seqs=sum(member.tokens for member in decodes),
            kv_tokens=sum(member.context for member in decodes),
            chunks=len(prefills),
            prefill_tokens=sum(member.tokens for member in prefills),
            prefill_context=sum(member.context for member in prefills),
            attention2=sum(member.tokens * (2 * member.context + member.tokens) for member in prefills),
        )
        duration = self.time.iteration_ps(work) + (self.draft_ps if decodes else 0)
        scheduler = self.scheduler_ps + self.scheduler_seq_ps * len(members)
        duration = max(duration, scheduler) if self.async_scheduling else duration + scheduler
        prompt_tokens = max((member.context + member.tokens for member in prefills), default=0)
        return _Decided(members, duration, Seen(work.seqs, work.kv_tokens, work.prefill_tokens, prompt_tokens))

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _preempt(self, seq: _Sequence) -> None:
        self.preemptions += 1
        self.running.remove(seq)
        self._give_back(seq)
        seq.computed = 0
        seq.prompt_done = seq.prefilled = False
        # All that wait are later than all that run, so the front of the queue is the place its key gives it.
        insort(self.waiting, seq, key=_key)

    def _give_back(self, seq: _Sequence) -> None:
        """Full blocks get their contents on the way; the last token has none, its keys and values are not computed."""
        full = min(seq.computed, seq.tokens - 1) // self.block_size
        self.cache.fill(seq.held, seq.contents(full))
        self.cache.give_back(seq.held)
        seq.held = []

    def _count_gaps(self, gap_ps: int, count: int) -> None:
        if count:
            self.itl_sum_ps += gap_ps * count
            bucket = bisect_right(ITL_EDGES_NS, gap_ps // 1000) - 1
            self.itl[bucket] = self.itl.get(bucket, 0) + count

    def _chunk(self, rest: int, budget: int = TOKENS_MAX) -> int:
        """How many of ``rest`` prompt tokens one iteration may take."""
        return min(rest, self.long_prefill_token_threshold or rest, budget)

    def _blocks(self, tokens: int) -> int:
        return _ceil_div(tokens, self.block_size)


class _Embed:
    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.time = _iteration_time(numbers)
        self.max_batch_tasks = numbers["max_batch_tasks"]
        self.max_batch_tokens = numbers["max_batch_tokens"]
        self.padding = bool(numbers["padding"])
        self.ingress_ns = numbers["ingress_ns"]
        self.egress_min_ns = numbers["egress_ns"]
        self.pending: list[_Sequence] = []
        self.waiting: list[_Sequence] = []
        self.busy_ps = self.iterations = self.tokens = self.padded_tokens = 0
        self.seen = Seen()

    def told_at(self, work: _Work) -> int:
        """When a batch is told (ns)."""
        return _ceil_div(work.end, 1000) + self.egress_min_ns

    def start(self, start: int) -> _Work:
        """Take tasks in order while the batch has room; at least one. ``max_batch_tokens`` counts unpadded tokens."""
        batch = [self.waiting.pop(0)]
        while self.waiting and len(batch) < self.max_batch_tasks:
            if sum(seq.input_tokens for seq in batch) + self.waiting[0].input_tokens > self.max_batch_tokens:
                break
            batch.append(self.waiting.pop(0))
        sizes = [seq.input_tokens for seq in batch]
        self.tokens += sum(sizes)
        if self.padding:
            sizes = [max(sizes)] * len(sizes)
        self.padded_tokens += sum(sizes)
        duration = self.time.batch_ps(sum(sizes), sum(size * size for size in sizes))
        members = [_Member(seq, seq.input_tokens) for seq in batch]
        return _Work(
            "embed", start, start + duration, members, Seen(prefill_tokens=sum(sizes), prompt_tokens=max(sizes))
        )

    def finish(self, work: _Work, tell: _Tell) -> None:
        for member in work.members:
            tell(FINISHED, member.seq.task, 0)


def _itl_edges() -> tuple[int, ...]:
    edges = [0]
    while edges[-1] < 10**18:
        edges.append(edges[-1] + max(1, edges[-1] // 100))
    return tuple(edges)


ITL_EDGES_NS = _itl_edges()
"""Lower edges of the ITL buckets: every ns up to 200, then 1 % wide, by integer arithmetic alone."""


def _iteration_time(numbers: Mapping[str, Any]) -> IterationTime:
    return IterationTime(**{f.name: numbers[f.name] for f in fields(IterationTime)})


def _check_tokens(task: int, *counts: int) -> None:
    for count in counts:
        if not 1 <= count <= TOKENS_MAX:
            raise IllegalEvent(f"task {task}: expected token counts from 1 to {TOKENS_MAX}, got {count}")


def _key(seq: _Sequence) -> tuple[int, int]:
    return seq.key


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
