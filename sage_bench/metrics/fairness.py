"""Jain's fairness index: 1 when all get the same, 1/n when one of n gets everything."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def jain(shares: ArrayLike) -> float:
    """``(sum x)^2 / (n sum x^2)``; NaN below two shares or when all are zero. Source: Jain, Chiu and Hawe, 1984."""
    x = np.asarray(shares, np.float64)
    if len(x) < 2 or not x.any():
        return math.nan
    return float(x.sum() ** 2 / (len(x) * np.square(x).sum()))
