"""Named random streams from one seed.

A stream is identified by its name, not by the order in which streams are made: adding a consumer does not move
anybody else's numbers, and two arms of an experiment with the same seed see the same arrivals (common random numbers).
"""

from __future__ import annotations

import hashlib

import numpy as np

from sage_core.errors import ConfigError


class Streams:
    """Independent generators by name, all from ``seed`` (a whole number from 0)."""

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed: expected a whole number from 0, got {seed!r}")
        self.seed = seed

    def stream(self, name: str) -> np.random.Generator:
        """A fresh generator for ``name``; the same name always starts from the same state."""
        words = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype="<u4")
        sequence = np.random.SeedSequence(self.seed, spawn_key=tuple(int(word) for word in words))
        return np.random.Generator(np.random.PCG64(sequence))
