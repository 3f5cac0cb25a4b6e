"""How fast an engine answers, and whether that is slow: like is compared with like.

Nanoseconds an output token depend on what is asked: a long prompt with a short answer looks slow, and an engine that a
router gives all of these looks slow without being so. So answers are kept by class, of prompt and answer lengths within a
factor of four, and only a class that both sides have answered counts. What is compared are medians of the last minute: a
pause of the machine moves few of them.

More load also makes slow. But an engine that takes longer because it has more to do gets more done; one that takes longer
and does not is slow by itself. That is Little's law at work: of two equal engines the one with more in flight has the higher
throughput, until both are full, and then they are equal.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sage_core.units import SECOND

WINDOW_NS: Final = 60 * SECOND
"""Older answers say nothing of now."""

ANSWERS_KEPT: Final = 256
CLASS_ANSWERS_MIN: Final = 4
"""Of a class that is compared, on each side."""

PEERS_MIN: Final = 2
"""Of two engines nobody can say which is the odd one."""

BUSIER: Final = 1.5
"""Times the throughput of the others from which more load is the explanation."""


@dataclass(frozen=True, slots=True)
class Class:
    """Answers of one class: how many, and their median in nanoseconds an output token (a request, of embeddings)."""

    count: int
    median_ns: float


class Pace:
    """The recent answers of one engine. ``answers`` counts all there ever were."""

    __slots__ = ("_classes", "_classes_at", "_recent", "answers", "throughput")

    def __init__(self) -> None:
        self.answers = 0
        self.throughput = 0.0
        """Answers a second, over those that are kept and not too old."""
        self._recent: deque[tuple[int, int, float]] = deque(maxlen=ANSWERS_KEPT)
        self._classes: Mapping[int, Class] = {}
        self._classes_at = -1

    def saw(self, now: int, took_ns: int, input_tokens: int, output_tokens: int) -> None:
        """One answer, complete. output_tokens 0: an embedding."""
        self.answers += 1
        lengths = (input_tokens.bit_length() >> 1 << 6) + (output_tokens.bit_length() >> 1)
        self._recent.append((now, lengths, took_ns / (output_tokens or 1)))

    def clear(self) -> None:
        """What it was says nothing of what it will be."""
        self._recent.clear()
        self._classes_at = -1

    def classes(self, now: int) -> Mapping[int, Class]:
        """Of the last minute. Reckoned at most once a second, with :attr:`throughput`: all the others of its pool ask."""
        if self._classes_at < 0 or now - self._classes_at >= SECOND:
            recent = [each for each in self._recent if now - each[0] <= WINDOW_NS]
            found: dict[int, list[float]] = {}
            for _, lengths, each_ns in recent:
                found.setdefault(lengths, []).append(each_ns)
            self._classes = {
                lengths: Class(len(each), statistics.median(each))
                for lengths, each in found.items()
                if len(each) >= CLASS_ANSWERS_MIN
            }
            self.throughput = len(recent) * SECOND / max(now - recent[0][0], 1) if recent else 0.0
            self._classes_at = now
        return self._classes


def slowness(own: Pace, others: Sequence[Pace], now: int, answers_min: int) -> float:
    """How many times as long as the others it takes; 1.0 where that cannot be said, or where its load explains it.

    answers_min: of its own, in classes that at least two others have answered too.
    """
    mine = own.classes(now)
    alike = [other for other in others if mine.keys() & other.classes(now).keys()]
    theirs = [other.classes(now) for other in alike]
    count, logarithms = 0, 0.0
    for lengths, each in mine.items():
        medians = [classes[lengths].median_ns for classes in theirs if lengths in classes]
        if len(medians) >= PEERS_MIN:
            count += each.count
            logarithms += each.count * math.log(max(each.median_ns, 1.0) / max(statistics.median(medians), 1.0))
    if not count or count < answers_min:
        return 1.0
    if own.throughput > BUSIER * statistics.median(other.throughput for other in alike):
        return 1.0
    return math.exp(logarithms / count)
