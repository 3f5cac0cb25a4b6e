"""`make bench-fidelity` says what is not equal, what is not known, and nothing that was not measured."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sage_sim.profile import load_profile

BENCH = Path(__file__).resolve().parents[2] / "benchmarks" / "fidelity.py"


@pytest.fixture
def bench() -> dict[str, Any]:
    return runpy.run_path(str(BENCH))


def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_without_the_data_the_keys_are_null_and_the_reason_is_told(bench: dict[str, Any], tmp_path: Path) -> None:
    figures: dict[str, Any] = {}
    out = console()
    bench["measured_run"](figures, out, tmp_path)
    bench["silicon"](figures, out, tmp_path)
    wanted = {f"rtx4090_{n}_{s}_err_pct" for n in ("ttft", "tpot", "e2e") for s in ("mean", "p50", "p95", "p99")}
    assert figures == dict.fromkeys([*wanted, "tpot_silicon_loo_pct"])
    assert out.file.getvalue().count("skipped, there is no") == 2  # type: ignore[attr-defined]
    json.dumps(figures)


def test_held_out_errors_are_those_of_the_files(bench: dict[str, Any]) -> None:
    figures: dict[str, Any] = {}
    bench["held_out"](figures, console())
    files = [load_profile(name).errors for name in bench["SWEEPS"]]
    assert figures["decode_heldout_mape_pct"] == max(each["decode"].mape_pct for each in files)
    assert figures["prefill_heldout_mape_pct"] == max(each["prefill"].mape_pct for each in files)


def test_the_jump_is_compared_over_as_many_scenarios_as_stated(bench: dict[str, Any]) -> None:
    figures: dict[str, Any] = {}
    bench["jump"](figures, console(), 25, 7)
    assert figures == {"jump_equals_reference": True, "jump_scenarios": 25, "jump_seed": 7}


def test_canary_a_difference_is_told(bench: dict[str, Any]) -> None:
    """The reference with one more nanosecond of egress is another engine."""
    module = bench["differential"]()
    pair = module.Pair
    jump = bench["jump"]

    class Off(pair):  # type: ignore[misc, valid-type]
        def __init__(self, llm: Any, embed: Any) -> None:
            super().__init__(llm, embed)
            if llm is not None:
                self.reference = type(self.reference)({**llm, "egress_ns": llm["egress_ns"] + 1}, embed)

    module.Pair = Off
    jump.__globals__["differential"] = lambda: module
    figures: dict[str, Any] = {}
    out = console()
    jump(figures, out, 300, 7)
    assert figures["jump_equals_reference"] is False
    assert "NOT EQUAL" in out.file.getvalue()  # type: ignore[attr-defined]
