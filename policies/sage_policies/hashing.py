"""Draws without a random number: a hash of an id decides, so a replay draws the same and nothing has to be
remembered."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from sage_core.policy import Column

UNIT: Final = 2.0**-53
"""The upper 53 bits of a hash times this are uniform on [0, 1)."""

_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_FIRST: Final = np.uint64(0xBF58476D1CE4E5B9)
_SECOND: Final = np.uint64(0x94D049BB133111EB)


def mix(numbers: Column | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each number as 64 well-mixed bits: one step of SplitMix64 (Steele, Lea and Flood, OOPSLA'14), wrapping around."""
    bits: NDArray[np.uint64] = numbers.astype(np.uint64) + _STEP
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    mixed: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed


def draws(prefixes: Column, replicas: Column) -> NDArray[np.uint64]:
    """(prefixes, replicas) of what each replica draws for each prefix, below 2^52: the lowest is where the prefix should be
    cached (rendezvous hashing). A replica that joins or leaves moves only the prefixes that it wins or loses."""
    drawn: NDArray[np.uint64] = mix(mix(prefixes)[:, None] ^ replicas.astype(np.uint64)[None, :]) >> np.uint64(12)
    return drawn


def uniform(numbers: Column) -> NDArray[np.float64]:
    """Each number as a draw from [0, 1)."""
    return (mix(numbers) >> np.uint64(11)).astype(np.float64) * UNIT
