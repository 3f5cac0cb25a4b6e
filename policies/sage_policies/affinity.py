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
from sage_core.units import Nanos
from sage_policies.bounds import require
from sage_policies.hashing import draws

OVERLOADED: Final = 2.0**52
"""Where replicas without room begin; a draw is a whole number below it, so scores are exact."""

AWAY: Final = 2.0**60
"""More than any replica that is not the home may be better, ns; 36 years."""


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
    """Prompts with a prefix go to its home, and wait in the queue while that takes no more, unless it has more than its share;
    everything else goes where ``inner`` says.

    The home is the replica with the lowest draw. Its share is that of :class:`PrefixAffinity`. What waits is the plane's: others go
    first meanwhile, and when the home falls behind the others the prompt may go to any of them.

    inner: must be live. load_factor: see :class:`PrefixAffinity`.
    """

    inner: Route
    load_factor: float = 1.25
    live = True
    load_weight = 0.0

    def __post_init__(self) -> None:
        require("load_factor", self.load_factor, 1.0, 1e6)

    def score(self, now: Nanos, tasks: TaskView, replicas: ReplicaView) -> Scores:
        """Of ``inner``; where a prefix has a home that is not over its share, every other replica ``inf`` if the home has work (it will
        have room in a moment), else ``AWAY`` more."""
        scores = self.inner.score(now, tasks, replicas)
        if len(replicas) == 0:
            return scores
        in_flight = replicas.in_flight.astype(np.float64)
        mean = (in_flight.sum() + 1.0) / float(len(replicas))
        room = in_flight + 1.0 <= np.ceil(self.load_factor * mean)
        waits = np.where(in_flight > 0.0, np.inf, AWAY)
        home = draws(tasks.prefix, replicas.replica).argmin(axis=1)
        bound = (tasks.prefix != 0) & room[home]
        elsewhere = np.arange(len(replicas))[None, :] != home[:, None]
        kept: Scores = np.where(bound[:, None] & elsewhere, scores + waits[home][:, None], scores)
        return kept

    def native(self) -> Any:
        from sage_core import _native

        inner = native_twin(self.inner)
        if inner is self.inner:  # it has no twin, so neither has this
            return self
        return _native.PrefixHome(inner, self.load_factor)
