"""The hybrid policy's own order and limit: laxity and shortness, demotion, fairness, anti-starvation; room in engines.

The idea: serve the work whose objective is nearest to being missed, of equals the cheapest, and not work that has missed
it already; never let a tenant or an old task be forgotten; and keep the queue in the plane, where it can still be
reordered, by giving engines no more than keeps them busy and their tokens on time. ``docs/hybrid.md`` states both parts one task at a time; a test runs that text against
this file.

Rules kept here. A score is a whole number of nanoseconds below 2**53, so it is exact, and two tasks on time keep their
relation as time passes. Estimates are rounded down to whole nanoseconds once, with the operations in the order written,
so that the native twins give the same bits. Every ingredient has a switch, and switched off it leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sage_core.policy import Column, Limits, QueueView, ReplicaView, Scores, TaskView
from sage_core.units import MILLISECOND, NEVER, SECOND, Nanos, PoolKind
from sage_policies.bounds import require
from sage_policies.limit import share_of, unlimited

TIER_NS: Final = 2**52
"""Distance between tiers (starving -1, on time 0, late 1)."""

INSTANT_NS_MAX: Final = 2**50
"""Due times are clipped to this (13 days of run time), so that tiers never mix."""

SPAN_NS_MAX: Final = 2**48
"""Estimates of work and the laxity given to a class are clipped to this (3 days), for the same reason."""


FIXED_TIMES: Final = 10.0
"""A batch of embeddings works at least this many times as long as it costs to begin one."""

TOKENS_MAX: Final = 2.0**53
"""More than any batch has."""


@dataclass(frozen=True, slots=True)
class HybridOrder:
    """Class-aware least laxity that prefers short work.

    laxity: order by slack to the nearest objective; off, by arrival. shortest, work_weight: laxity given per unit of work,
    which is a task's tokens at prefill cost, a predicted output token counting twice. budget_ns: soft response time per kind (chat,
    generate, embedding) for tasks without an objective. classes, priority_spacing_ns: laxity a task is given per
    priority level. demotion, late_margin: tasks whose objective is out of reach go behind all others; the margin is the
    fraction of the time allowed (arrival to due) that is kept for waiting inside engines. starvation, starvation_ns,
    starvation_bypass: the oldest task goes first of all once it has waited that long and been passed over that often.
    fairness, fairness_weight, fairness_cap_ns: laxity given per token (at its prefill cost) that a tenant was served
    beyond the least-served tenant queued.
    """

    laxity: bool = True
    shortest: bool = True
    work_weight: float = 5.0
    budget_ns: tuple[int, int, int] = (60 * SECOND, 60 * SECOND, 60 * SECOND)
    classes: bool = True
    priority_spacing_ns: int = 5 * SECOND
    demotion: bool = True
    late_margin: float = 0.2
    starvation: bool = True
    starvation_ns: int = 30 * SECOND
    starvation_bypass: int = 32
    fairness: bool = True
    fairness_weight: float = 1.0
    fairness_cap_ns: int = SECOND // 2
    static = False

    def __post_init__(self) -> None:
        require("work_weight", self.work_weight, 0.0, 1e6)
        require("priority_spacing_ns", self.priority_spacing_ns, 0, SPAN_NS_MAX)
        require("late_margin", self.late_margin, 0.0, 1.0)
        require("starvation_ns", self.starvation_ns, 0)
        require("starvation_bypass", self.starvation_bypass, 0)
        require("fairness_weight", self.fairness_weight, 0)
        require("fairness_cap_ns", self.fairness_cap_ns, 0, INSTANT_NS_MAX)
        for budget in self.budget_ns:
            require("budget_ns", budget, 0, INSTANT_NS_MAX)

    def score(self, now: Nanos, queued: TaskView) -> Scores:
        """``tier * TIER_NS + value``: value in ns of laxity (on time) or of arrival (late)."""
        if not len(queued):
            return np.empty(0)
        start_by, late_after = self._latest_start(queued)
        offset = _whole(queued.priority.astype(np.float64) * (float(self.priority_spacing_ns) if self.classes else 0.0))
        late = (now > late_after) & self.demotion
        slack = (start_by if self.laxity else queued.arrived_at) - now
        on_time = slack + offset + self._cost(queued) + self._overserved(queued)
        score = np.where(late, TIER_NS + (queued.arrived_at - now) + offset, on_time)
        score[self._starving(now, queued)] = -TIER_NS
        return score.astype(np.float64)

    def _latest_start(self, queued: TaskView) -> tuple[Column, Column]:
        """Latest instant at which an idle replica must start to meet the objectives (soft due time where there are
        none), and the instant after which the task is late: the same less the margins, NEVER without objectives."""
        speed = queued.speed
        prefill = _whole(speed.fixed_ns + speed.input_token_ns * queued.input_tokens.astype(np.float64))
        work = prefill + _whole(speed.output_token_ns * queued.output_tokens.astype(np.float64))
        start_by = late_after = np.full(len(queued), NEVER, dtype=np.int64)
        for due_at, needed in ((queued.ttft_due_at, prefill), (queued.due_at, work)):
            latest = np.minimum(due_at, INSTANT_NS_MAX) - needed
            allowed = np.minimum(due_at, INSTANT_NS_MAX) - queued.arrived_at
            margin = _whole(self.late_margin * allowed.astype(np.float64))
            start_by = np.where(due_at < NEVER, np.minimum(start_by, latest), start_by)
            late_after = np.where(due_at < NEVER, np.minimum(late_after, latest - margin), late_after)
        soft_due_at = queued.arrived_at + np.array(self.budget_ns, dtype=np.int64)[queued.kind]
        return np.where(start_by < NEVER, start_by, np.minimum(soft_due_at, INSTANT_NS_MAX) - work), late_after

    def _cost(self, queued: TaskView) -> Column:
        """Laxity given for work. Without it an overload is spent on long tasks, each at the price of several short ones."""
        weight = self.work_weight * queued.speed.input_token_ns if self.shortest else 0.0
        return _whole(weight * (queued.input_tokens.astype(np.float64) + 2.0 * queued.output_tokens.astype(np.float64)))

    def _overserved(self, queued: TaskView) -> Column:
        """Laxity given to tenants served beyond the least-served tenant queued."""
        token_ns = self.fairness_weight * queued.speed.input_token_ns if self.fairness else 0.0
        excess = (queued.tenant_service - queued.tenant_service.min()).astype(np.float64)
        given: Column = np.floor(np.minimum(excess * token_ns, float(self.fairness_cap_ns))).astype(np.int64)
        return given

    def _starving(self, now: Nanos, queued: TaskView) -> Any:
        """(tasks,) bool: at most the oldest task."""
        passed_over = self.starvation and queued.bypassed >= self.starvation_bypass
        return (queued.task == queued.oldest) & (now - queued.queued_at > self.starvation_ns) & passed_over

    def native(self) -> Any:
        from sage_core import _native

        return _native.HybridOrder(
            laxity=self.laxity,
            budget_ns=list(self.budget_ns),
            priority_spacing_ns=self.priority_spacing_ns if self.classes else 0,
            demotion=self.demotion,
            late_margin=self.late_margin,
            starvation=self.starvation,
            starvation_ns=self.starvation_ns,
            starvation_bypass=self.starvation_bypass,
            fairness_weight=self.fairness_weight if self.fairness else 0.0,
            fairness_cap_ns=self.fairness_cap_ns,
            work_weight=self.work_weight if self.shortest else 0.0,
        )


@dataclass(frozen=True, slots=True)
class HybridLimit:
    """Engines get what keeps them busy and no more.

    LLM pools (``in_flight_limits``): with ``tpot_limit`` no more tasks than are predicted to keep the time per output token
    within ``tpot_ns`` (0: there is no such objective); a fraction ``reserve`` of the slots is kept for priority 0, unless the oldest task
    has waited longer than ``starvation_ns`` (or promoting it would be in vain: every slot that urgent work leaves is the
    reserve's); at most ``prefill_depth`` token budgets of prompts (and what is left of the last one) are in the engine;
    and predicted KV use stays below ``kv_fill``.
    Embedding pools (``embedding_batches``): a batch is full at the engine's own size, or at as many tokens (unpadded) as it works
    through in ``batch_ns`` (0: there is no such bound; in ``FIXED_TIMES`` its fixed time where that is longer: below that, batches cost
    throughput). An idle engine takes a batch at once, one text however long; a busy one takes one more behind it when that batch is full, when its oldest task has waited ``window_ns``, or when the earliest due time that can
    still be met is ``margin_ns`` away from being too late. Off, and for operators: the engine's own concurrency.
    """

    in_flight_limits: bool = True
    tpot_limit: bool = True
    tpot_ns: int = 40 * MILLISECOND
    reserve: float = 0.1
    prefill_depth: float = 2.0
    kv_fill: float = 0.95
    embedding_batches: bool = True
    batch_ns: int = 20 * MILLISECOND
    window_ns: int = 5 * MILLISECOND
    margin_ns: int = 2 * MILLISECOND
    starvation_ns: int = 30 * SECOND

    def __post_init__(self) -> None:
        require("starvation_ns", self.starvation_ns, 0)
        require("tpot_ns", self.tpot_ns, 0, SPAN_NS_MAX)
        require("reserve", self.reserve, 0.0, 1.0)
        require("prefill_depth", self.prefill_depth, 0.0, 1e6)
        require("kv_fill", self.kv_fill, 0.0, 1e6)
        require("batch_ns", self.batch_ns, 0, SPAN_NS_MAX)
        require("window_ns", self.window_ns, 0, SPAN_NS_MAX)
        require("margin_ns", self.margin_ns, 0, SPAN_NS_MAX)

    def limit(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
        """See the class; a maximum of 0 in a replica's own columns means unknown, hence unlimited."""
        if queue.pool_kind == PoolKind.LLM and self.in_flight_limits:
            return self._llm(now, replicas, queue)
        if queue.pool_kind == PoolKind.EMBEDDING and self.embedding_batches:
            return self._embedding(now, replicas, queue)
        open_end = unlimited(len(replicas))
        return Limits(replicas.tasks_max, replicas.tasks_max, open_end, open_end, np.zeros_like(open_end))

    def _llm(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
        starving = now - queue.oldest_queued_at > self.starvation_ns
        prompts = share_of(replicas.batch_tokens_max, self.prefill_depth)
        kv = share_of(replicas.kv_tokens_max, self.kv_fill)
        tasks = self._within_tpot(replicas)
        return Limits(
            tasks_max=tasks,
            tasks_max_batch=tasks if starving else share_of(tasks, 1.0 - self.reserve),
            prefill_tokens_max=np.where(replicas.batch_tokens_max > 0, prompts, NEVER),
            kv_tokens_max=np.where(replicas.kv_tokens_max > 0, kv, NEVER),
            hold_until=np.zeros(len(replicas), dtype=np.int64),
        )

    def _within_tpot(self, replicas: ReplicaView) -> Column:
        """(replicas,) tasks that keep the time per output token: expected for that many, times the slowdown observed, in
        which the prompts of others show. Where a task's share of an iteration is unknown, the engine's own maximum."""
        if not self.tpot_limit or self.tpot_ns == 0:
            return replicas.tasks_max
        each = np.where(replicas.output_seq_ns > 0.0, replicas.output_seq_ns, 1.0)
        most = replicas.tasks_max.astype(np.float64)
        fits = (replicas.output_token_ns + each * most) * replicas.slowdown <= float(self.tpot_ns)
        with np.errstate(over="ignore"):  # next to nothing a task: infinitely many
            within = np.floor((float(self.tpot_ns) / replicas.slowdown - replicas.output_token_ns) / each)
        tasks = np.minimum(np.maximum(within, 1.0), most).astype(np.int64)
        return np.where(fits | (replicas.output_seq_ns <= 0.0), replicas.tasks_max, tasks)

    def _embedding(self, now: Nanos, replicas: ReplicaView, queue: QueueView) -> Limits:
        open_end = unlimited(len(replicas))
        busy = replicas.in_flight > 0
        batches = np.where(busy, 2, 1)
        tokens_max = self._batch_tokens(replicas)
        tasks = batches * replicas.tasks_max
        tokens = np.where(tokens_max < NEVER, batches * np.minimum(tokens_max, NEVER // 2), NEVER)
        # Behind one text there is room for another, however long: an engine must not idle between them.
        tokens = np.where(replicas.in_flight == 1, np.maximum(tokens, replicas.prefill_tokens + 1), tokens)
        full = (queue.tasks >= replicas.tasks_max) | (queue.input_tokens >= tokens_max)
        hold = np.minimum(self._window_end(queue), self._due_end(now, replicas, queue, tokens_max))
        return Limits(tasks, tasks, tokens, open_end, np.where(busy & ~full, hold, 0))

    def _batch_tokens(self, replicas: ReplicaView) -> Column:
        """(replicas,) tokens of a full batch, at least 1; NEVER where neither the engine's size nor its speed is known."""
        of_engine = np.where(replicas.batch_tokens_max > 0, replicas.batch_tokens_max, NEVER)
        known = (replicas.input_token_ns > 0.0) & (self.batch_ns > 0)
        batch_ns = np.maximum(float(self.batch_ns), FIXED_TIMES * replicas.fixed_ns)
        with np.errstate(over="ignore"):  # next to nothing a token: infinitely many
            in_time = np.maximum(batch_ns / np.where(known, replicas.input_token_ns, 1.0), 1.0)
        known &= in_time < TOKENS_MAX
        return np.where(known, np.minimum(of_engine, np.where(known, in_time, 1.0).astype(np.int64)), of_engine)

    def _window_end(self, queue: QueueView) -> int:
        return min(queue.oldest_queued_at + self.window_ns, NEVER)

    def _due_end(self, now: Nanos, replicas: ReplicaView, queue: QueueView, tokens_max: Any) -> Any:
        """(replicas,) last instant at which the batch behind should leave for the earliest due time; NEVER if none."""
        tokens = np.minimum(queue.input_tokens, tokens_max).astype(np.float64)
        batch_ns = np.ceil(replicas.fixed_ns + replicas.input_token_ns * tokens).astype(np.int64)
        latest = queue.earliest_due_at - batch_ns
        reachable = (latest >= now) & (queue.earliest_due_at < NEVER)
        return np.where(reachable, latest - self.margin_ns, NEVER)

    def native(self) -> Any:
        from sage_core import _native

        return _native.HybridLimit(
            in_flight_limits=self.in_flight_limits,
            reserve=self.reserve,
            prefill_depth=self.prefill_depth,
            kv_fill=self.kv_fill,
            embedding_batches=self.embedding_batches,
            batch_ns=self.batch_ns,
            window_ns=self.window_ns,
            margin_ns=self.margin_ns,
            starvation_ns=self.starvation_ns,
            tpot_ns=self.tpot_ns if self.tpot_limit else 0,
        )


def _whole(span_ns: Scores) -> Column:
    """Rounded down to whole ns, within SPAN_NS_MAX either way."""
    whole: Column = np.floor(np.minimum(np.maximum(span_ns, -float(SPAN_NS_MAX)), float(SPAN_NS_MAX))).astype(np.int64)
    return whole
