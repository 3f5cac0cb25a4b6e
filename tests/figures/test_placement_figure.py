"""The figure of ``benchmarks/placement.py``: a curve a strategy, from its figures and nothing else."""

from __future__ import annotations

import pytest

from sage_bench.figures.placement import placement
from sage_core.errors import DataError


def test_a_curve_is_drawn_for_each_strategy_by_rising_size() -> None:
    figures = {
        "plan_cpu_s_cpu_offload_200": 0.3,
        "plan_cpu_s_cpu_offload_25": 0.1,
        "plan_cpu_s_pack_25": 0.2,
        "events": 9.0,
    }
    axis = placement({**figures, "plan_cpu_s_pack_full": 1.0}).axes[0]
    drawn = {line.get_label(): [*zip(line.get_xdata(), line.get_ydata(), strict=True)] for line in axis.get_lines()}
    assert drawn == {"cpu_offload": [(25, 0.1), (200, 0.3)], "pack": [(25, 0.2)]}


def test_without_plans_there_is_no_figure() -> None:
    with pytest.raises(DataError, match="no key plan_cpu_s_STRATEGY_NODES"):
        placement({"events": 1.0})
