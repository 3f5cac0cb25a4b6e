"""What embeddings cost on different hardware, over their rate: price, energy and latency, the crossovers marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pandas as pd
from matplotlib.figure import Figure

from sage_bench.figures.style import MARKERS, legend_above, line, plain_log, styled
from sage_bench.hetero import ARMS, EXPENSES, Crossing

NAMES: Final = {"shared": "LLM GPUs", "gpu": "a GPU of its own", "mixed": "GPU and CPU", "cpu": "CPU"}

ABOVE_MAX: Final = 20.0
"""Per cent above the first arm up to which a panel reaches: an arm that leaves it cannot keep up."""


def hetero(means: pd.DataFrame, crossings: Sequence[Crossing]) -> Figure:
    """means: of :meth:`sage_bench.hetero.Hetero.means`. Expenses stand against the first arm, because the GPUs that generate are most
    of every one; a dotted line is a crossover of two arms."""
    arms = [arm for arm in ARMS if arm in set(means["arm"])]
    parts = {arm: means[means["arm"] == arm].sort_values("rate") for arm in arms}
    with styled(len(EXPENSES) + 1, 5.0, sharex=True) as (figure, axes):
        for axis, expense in zip(axes, EXPENSES, strict=False):
            least = parts[arms[0]].set_index("rate")[expense]
            for i, arm in enumerate(arms):
                above = 100 * (parts[arm].set_index("rate")[expense] / least - 1).dropna()
                axis.plot(above.index, above, marker=MARKERS[i], label=NAMES[arm], **line(i))
            for each in crossings:
                if each.expense == expense:
                    axis.axvline(each.rate, color="black", ls=":", lw=0.7)
            axis.set_ylim(-3, ABOVE_MAX)
            axis.set_ylabel(f"{expense} of 1,000 good,\n% above {NAMES[arms[0]]}")
        for i, arm in enumerate(arms):
            axes[-1].plot(parts[arm]["rate"], parts[arm]["embedding_ns_p95"] / 1e9, marker=MARKERS[i], **line(i))
        axes[-1].set_xscale("log")
        axes[-1].set_yscale("log")
        plain_log(axes[-1].xaxis)
        plain_log(axes[-1].yaxis)
        axes[-1].set_ylabel("embedding E2E p95 (s)")
        axes[-1].set_xlabel("documents (requests/s), simulated")
        legend_above(figure, axes[0])
        return figure
