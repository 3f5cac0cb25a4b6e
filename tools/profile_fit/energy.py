"""Power while busy, as fractions of TDP, from whole engine steps on A100s.

The source measures power as a fraction of TDP per step: its peak for a prompt, its mean for decoding. Zeros stand where
nothing was recorded and are left out. Every group (model, tensor-parallel degree) counts once, whatever its number of
rows. Rules kept:

* Prompts of fewer than 1,024 tokens in all do not load eight GPUs, so the prefill fraction is that of larger ones.
* A peak is not a mean: a sustained fraction cannot pass 1, so group means above it count as 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sage_sim.profile import Phase

POWER = "calibration_splitwise_a100.parquet"
BUSY_TOKENS = 1024


@dataclass(frozen=True)
class BusyFraction:
    """Mean over the groups, and the lowest and highest group mean."""

    mean: float
    lowest: float
    highest: float
    groups: int


def busy_fractions(data: Path) -> dict[Phase, BusyFraction]:
    """``prefill`` and ``decode`` of one A100, as fractions of its TDP. Raises OSError when the table is absent."""
    rows = pd.read_parquet(data / POWER)
    rows = rows[rows.power_frac_tdp > 0]
    tokens = rows.batch_size * rows.prompt_tokens
    phases: dict[Phase, pd.DataFrame] = {
        "prefill": rows[(rows.phase == "prefill") & (tokens >= BUSY_TOKENS)],
        "decode": rows[rows.phase == "decode"],
    }
    return {phase: _over_groups(chosen) for phase, chosen in phases.items()}


def _over_groups(rows: pd.DataFrame) -> BusyFraction:
    means = rows.groupby(["model", "tensor_parallel"]).power_frac_tdp.mean().clip(upper=1.0)
    return BusyFraction(float(means.mean()), float(means.min()), float(means.max()), len(means))
