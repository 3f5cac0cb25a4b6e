"""How true the simulated engine is: ``make bench-fidelity`` prints tables and writes ``fidelity.json``.

*measured run*: the RTX 4090 run of the shared data replayed as ``sage validate`` does it, with a profile made of kernel
tables and not fitted on that run. *held out*: errors of the shipped profiles on points that their fit has not seen.
*silicon*: steady-state TPOT of real engines, each left out of the fit that predicts it. *jump*: the native engine
against the one-iteration-at-a-time reference, over random scenarios made here.

What needs the shared data is skipped where they are absent, and the table says so; its keys are null then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import hypothesis
from hypothesis import HealthCheck
from rich.console import Console
from rich.table import Table

from sage_bench.cli.validate import show
from sage_bench.validate.compare import STATISTICS
from sage_bench.validate.fidelity import LATENCIES, validate
from sage_bench.validate.prefixes import NO_TRACE
from sage_bench.validate.setup import Asked
from sage_sim.profile import load_profile, profile_names

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("results/bench/fidelity.json")
RUN = Path("results/bench/rtx4090")
DATA = Path("../shared/data")

PROFILE = "llama-3.1-8b-rtx4090-tp1"
SWEEPS = ("llama-3.1-8b-a100-tp2-sageserve", "llama-3.1-8b-a100-tp4-sageserve")
"""Profiles of the dense sweep: the two keys of held-out error are the worse of these."""

DIFFERENTIAL = ROOT / "tests" / "sim" / "test_engine_differential.py"
SCENARIOS = 2_000

Figures = dict[str, float | bool | str | dict[str, dict[str, float]] | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the measured data")
    parser.add_argument("--scenarios", type=int, default=SCENARIOS, help="random scenarios of jump against reference")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the scenarios; by default another each time"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    figures: Figures = {"load_average": os.getloadavg()[0]}
    console = Console(highlight=False, width=100)
    measured_run(figures, console, options.data)
    held_out(figures, console)
    silicon(figures, console, options.data)
    jump(figures, console, options.scenarios, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"wrote {options.out}")


def measured_run(figures: Figures, console: Console, data: Path) -> None:
    """Errors against the measured run, in per cent; their targets are in docs/validate.md."""
    keys = {(name, each): f"rtx4090_{name}_{each}_err_pct" for name in LATENCIES for each in STATISTICS}
    figures.update(dict.fromkeys(keys.values()))
    requests = data / "e2e_vllm_requests_rtx4090.parquet"
    if not requests.is_file():
        console.print(f"measured run: skipped, there is no {requests}", soft_wrap=True)
        return
    asked = Asked(PROFILE, max_num_seqs=256, kv_blocks=2588, prefix_trace=NO_TRACE)
    alone = validate(requests, asked, RUN / "without_prefix_trace")
    figures["rtx4090_without_prefix_trace_err_pct"] = {
        name: {each: getattr(alone.latencies[name], each).error_pct for each in STATISTICS} for name in LATENCIES
    }
    asked = replace(asked, prefix_trace=data / "trace_sharegpt_llama31_8b.parquet")
    found = validate(requests, asked, RUN, data / "e2e_vllm_timeseries_rtx4090.parquet")
    for (name, each), key in keys.items():
        figures[key] = getattr(found.latencies[name], each).error_pct
    show(found, console)
    cells = (
        f"{name.upper()} {alone.latencies[name].mean.error_pct:+.2f}, p95 {alone.latencies[name].p95.error_pct:+.2f}"
        for name in LATENCIES
    )
    console.print(f"without --prefix-trace, mean and p95 errors in %: {'; '.join(cells)}", soft_wrap=True)


def held_out(figures: Figures, console: Console) -> None:
    """Errors (MAPE) of every shipped LLM profile on the points its fit has not seen, as its file states them."""
    table = Table("profile", "source", "decode %", "prefill %", "mixed %", title="held-out error (MAPE)")
    errors: dict[str, dict[str, float]] = {}
    for name in profile_names():
        profile = load_profile(name)
        if profile.kind == "llm":
            errors[name] = {phase: error.mape_pct for phase, error in profile.errors.items()}
            cells = (f"{errors[name][p]:.2f}" if p in errors[name] else "-" for p in ("decode", "prefill", "mixed"))
            table.add_row(name, profile.source.kind, *cells)
    console.print(table)
    figures["heldout_mape_pct"] = errors
    for phase in ("decode", "prefill"):
        figures[f"{phase}_heldout_mape_pct"] = max(errors[name][phase] for name in SWEEPS)


def silicon(figures: Figures, console: Console, data: Path) -> None:
    """Steady-state TPOT of real engines: kernels corrected by other rows. The key is of one row left out; beside it,
    all rows of a tensor-parallel degree, all rows of a machine and engine, and kernels without a correction."""
    figures["tpot_silicon_loo_pct"] = None
    sys.path.insert(0, str(ROOT / "tools"))
    from profile_fit.silicon import SILICON, leave_one_out

    if not (data / SILICON).is_file():
        console.print(f"silicon: skipped, there is no {data / SILICON}", soft_wrap=True)
        return
    found = leave_one_out(data)
    table = Table("left out", "configurations", "MAPE %", "p95 %", "bias %", title="TPOT of real engines")
    parts = {"row": found.row, "degree": found.degree, "setup": found.setup, "uncorrected": found.uncorrected}
    for name, each in parts.items():
        numbers = (f"{each.mape_pct:.2f}", f"{each.ape_pct_p95:.2f}", f"{each.bias_pct:+.2f}")
        table.add_row(name, str(each.configurations), *numbers)
    console.print(table)
    figures["tpot_silicon_loo_pct"] = found.row.mape_pct
    figures["tpot_silicon_pct"] = {name: {"mape": each.mape_pct, "bias": each.bias_pct} for name, each in parts.items()}


def jump(figures: Figures, console: Console, scenarios: int, seed: int) -> None:
    """Whether the native engine says what the reference says, at the same nanoseconds, in every scenario."""
    module = differential()
    ran = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=scenarios, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @hypothesis.given(module.scripts())
    def compare(script: object) -> None:
        nonlocal ran
        ran += 1
        module.test_native_says_what_the_reference_says.hypothesis.inner_test(script)

    started = time.process_time()
    try:
        compare()
        figures["jump_equals_reference"] = True
    except AssertionError as error:
        figures["jump_equals_reference"] = False
        console.print(str(error), markup=False)
    figures |= {"jump_scenarios": ran, "jump_seed": seed}
    verdict = "equal" if figures["jump_equals_reference"] else "NOT EQUAL"
    console.print(
        f"jump against reference: {verdict}, {ran:,} scenarios, seed {seed}, {time.process_time() - started:.0f} CPU s"
    )


def differential() -> ModuleType:
    """The differential test: its scenarios and its comparison are used here, so there is one of each."""
    spec = importlib.util.spec_from_file_location("sage_engine_differential", DIFFERENTIAL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
