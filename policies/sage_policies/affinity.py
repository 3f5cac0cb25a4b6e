"""Requests that share a prompt prefix go to the replica that has it cached, unless that one is overloaded.

The preference is rendezvous hashing (Thaler and Ravishankar, IEEE/ACM ToN 1998): each replica draws a number for the
prefix and the lowest is preferred, so a replica that joins or leaves moves only the prefixes it wins or loses. The
bound is that of consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, SODA'18): a replica takes at
most ``load_factor`` times the mean load, rounded up, and what does not fit spills to the next in the prefix's own
ranking.
Routers of prefix caches (the KubeAI, SGLang and Ray Serve routers) do the same with a tree of prefixes or a hash ring;
the core sees a prefix only as an id, so what is preferred is where it would be cached, not where it was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sage_core.policy import ReplicaView, Route, Scores, TaskView, native_twin
from sage_core.units import Nanos, PoolKind
from sage_policies.bounds import require
from sage_policies.hashing import draws

OVERLOADED: Final = 2.0**52
"""Where replicas without room begin; a draw is a whole number below it, so scores are exact."""

PEER: Final = 1.5
"""Replicas that take so much longer than the fastest are no home: to wait for them costs more than a cache gains."""


@dataclass(frozen=True, slots=True)
class PrefixAffinity:
    """The first replica in the prefix's ranking that has room; without a prefix, the one with fewest tasks in flight.

    load_factor: room, as a multiple of the mean number of tasks in flight (this task included).
    """

    load_factor: float = 1.25
    live = True
    load_weight = 0.0

    def __post_init__(self) -> None:
        require("load_factor", self.load_factor, 1.0, 1e6)

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """The replica's draw for the prefix, plus ``OVERLOADED`` where ``in_flight + 1 > ceil(load_factor * mean)``;
        tasks in flight for tasks without a prefix."""
        in_flight = replicas.in_flight.astype(np.float64)
        mean = (in_flight.sum() + 1.0) / float(max(len(replicas), 1))
        overloaded = np.where(in_flight + 1.0 > np.ceil(self.load_factor * mean), OVERLOADED, 0.0)
        ranked = draws(tasks.prefix, replicas.replica).astype(np.float64) + overloaded[None, :]
        return np.where((tasks.prefix != 0)[:, None], ranked, in_flight[None, :])

    def native(self) -> Any:
        from sage_core import _native

        return _native.PrefixAffinity(self.load_factor)


@dataclass(frozen=True, slots=True)
class PrefixHome:
    """Prompts with a prefix go to its home, and wait in the queue while that takes no more, as long as the home has a slot and no more
    than its share; everything else goes where ``inner`` says.

    Homes are among *peers*, the replicas that alone would take at most ``PEER`` times as long as the fastest: of these the home is the
    one with the lowest draw. Its share is of what all peers have in flight, by slots (``tasks_max``). Where there is one peer there is
    no choice, and no home; replicas that are none are as ``inner`` says. What waits is the plane's, and others go first meanwhile.
    Pools without prompts have no homes.

    inner: live. load_factor: of the share that a home may hold. wait_ns: longest time in the queue for which a prompt is kept.
    """

    inner: Route
    load_factor: float = 1.25
    wait_ns: int = 3_000_000_000
    live = True
    load_weight = 0.0

    def __post_init__(self) -> None:
        require("load_factor", self.load_factor, 1.0, 1e6)
        require("wait_ns", self.wait_ns, 0, 2**48)

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """Of ``inner``; ``inf`` on the peers of its home where a prompt is kept for it. The home has work then: it will have room in a
        moment."""
        scores = self.inner.score(now, tasks, replicas)
        if tasks.pool_kind != PoolKind.LLM or len(replicas) == 0:
            return scores
        inputs = tasks.input_tokens.astype(np.float64)[:, None]
        outputs = tasks.output_tokens.astype(np.float64)[:, None]
        alone = replicas.fixed_ns + replicas.input_token_ns * inputs + replicas.output_token_ns * outputs
        peers = alone <= PEER * alone.min(axis=1)[:, None]
        drawn = draws(tasks.prefix, replicas.replica).astype(np.float64)
        home = np.where(peers, drawn, np.inf).argmin(axis=1)
        in_flight, slots = replicas.in_flight.astype(np.float64), replicas.tasks_max.astype(np.float64)
        held = np.where(peers, in_flight, 0.0).sum(axis=1) + 1.0
        share = np.ceil(self.load_factor * held * slots[home] / np.where(peers, slots, 0.0).sum(axis=1))
        room = (in_flight[home] > 0.0) & (in_flight[home] < slots[home]) & (in_flight[home] + 1.0 <= share)
        kept = (tasks.prefix != 0) & room & (now - tasks.queued_at <= self.wait_ns)
        elsewhere = peers & (np.arange(len(replicas))[None, :] != home[:, None])
        return np.where(kept[:, None] & elsewhere, np.inf, scores)

    def native(self) -> Any:
        from sage_core import _native

        inner = native_twin(self.inner)
        if inner is self.inner:  # it has no twin, so neither has this
            return self
        return _native.PrefixHome(inner, self.load_factor, self.wait_ns)
