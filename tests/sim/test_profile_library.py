"""What the library's composed profiles rest on: the closed loop, the comparison with real engines, the roofline prior."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "tools"))

from profile_fit import closed_loop, silicon  # noqa: E402
from profile_fit.aiconfigurator import NeighbouringShapes, more_sequences, shape_checks  # noqa: E402
from profile_fit.architecture import BF16, FP8, LLAMA_31_8B, Architecture, Device, Precision, read_device  # noqa: E402
from profile_fit.closed_loop import WORK, Costs, Load, Rules, work_per_token  # noqa: E402
from profile_fit.fit import Limits  # noqa: E402
from profile_fit.kernels import Kernels  # noqa: E402
from profile_fit.models import BGE_M3, LLAMA_2_13B, LLAMA_31_70B, LLAMA_32_3B, QWEN_25_7B  # noqa: E402
from profile_fit.roofline import (  # noqa: E402
    MEASURED,
    Efficiency,
    RooflineKernels,
    calibrate_once,
    left_out_checks,
    measured,
    prior,
)
from profile_fit.silicon import Correction, LeftOut, Measured, fit, left_out  # noqa: E402

from sage_core.errors import DataError  # noqa: E402
from sage_core.rng import Streams  # noqa: E402

needs_data = pytest.mark.skipif(
    not (DATA / "hardware_specs.csv").exists(), reason="calibration tables are not in ../shared/data"
)
AMPLE = 10**9


class LineCosts(Costs):
    """Costs that are lines, so that a stretch of iterations is exactly the sum of its iterations."""

    def __init__(self) -> None:
        self.dense = [0.0] + [10 + 0.1 * tokens for tokens in range(1, 9000)]
        self.finish = [0.5] * 600

    def decode(self, seqs: int, kv: float) -> float:
        return 0.2 * seqs + 0.001 * kv

    def prompt(self, tokens: int, context: int) -> float:
        return 1e-5 * tokens * (context + tokens / 2)


class StepByStep(closed_loop._Loop):
    """The same loop, one iteration at a time."""

    def _stretch(self) -> int:
        return 1


loads = st.builds(
    Load,
    isl=st.integers(1, 300),
    osl=st.integers(1, 60),
    clients=st.integers(1, 12),
    requests=st.integers(1, 40),
    shortest=st.sampled_from([0.5, 0.8, 1.0]),
)
rules = st.builds(Rules, budget=st.integers(16, 512), mixed=st.booleans(), reserve=st.booleans())


def test_one_client_by_hand() -> None:
    load = Load(isl=100, osl=5, clients=1, requests=3)
    work = work_per_token(load, Rules(64, mixed=True, reserve=False), LineCosts(), AMPLE, "alone")
    # Four tokens after the first, over 101, 102, 103 and 104 cached tokens; nobody else's prompt comes between.
    named = dict(zip(WORK, work, strict=True))
    assert named["dense"] == pytest.approx(10.1 + 0.5)
    assert named["decode attention"] == pytest.approx(0.2 + 0.001 * 102.5)
    assert (named["iterations"], named["sequences"], named["requests"], named["prompts"]) == (1, 1, 0, 0)


def test_others_prompts_stand_between_tokens() -> None:
    load = Load(isl=50, osl=101, clients=8, requests=80)
    mixed = dict(zip(WORK, work_per_token(load, Rules(512, True, True), LineCosts(), AMPLE, "eight"), strict=True))
    # All eight run in step: no prompt falls between the tokens of another request, but for the first wave's.
    assert mixed["requests"] < 0.01
    load = dataclasses.replace(load, shortest=0.5)
    spread = dict(zip(WORK, work_per_token(load, Rules(512, True, True), LineCosts(), AMPLE, "eight"), strict=True))
    # Out of step: in the time of one request the other seven each send one prompt.
    assert spread["requests"] == pytest.approx(7 / 76, rel=0.25)
    assert spread["prompts"] > 0


@settings(deadline=None, max_examples=150)
@given(loads, rules, st.integers(400, 3000))
def test_every_request_is_served_and_nothing_is_left(load: Load, rule: Rules, kv_tokens: int) -> None:
    loop = closed_loop._Loop(load, rule, LineCosts(), kv_tokens, "all")
    _, outputs = load.lengths("all")
    if max(outputs) == 1:
        return
    loop.run()
    assert (loop.kv, loop.reserved, loop.sent) == (0, 0, load.requests)
    assert len(loop.means) == sum(output > 1 for output in outputs)
    assert all((mean >= 0).all() for mean in loop.means)
    assert all(mean[WORK.index("iterations")] >= 1 for mean in loop.means)


@settings(deadline=None, max_examples=100)
@given(loads, rules, st.integers(400, 3000))
def test_stretches_equal_single_iterations(load: Load, rule: Rules, kv_tokens: int) -> None:
    if max(load.lengths("steps")[1]) == 1:
        return
    jumped = closed_loop._Loop(load, rule, LineCosts(), kv_tokens, "steps").run()
    stepped = StepByStep(load, rule, LineCosts(), kv_tokens, "steps").run()
    assert jumped == pytest.approx(stepped, rel=1e-9, abs=1e-12)


def test_a_small_cache_preempts_and_costs_more() -> None:
    load = Load(isl=100, osl=100, clients=8, requests=32)
    ample, scarce = (
        dict(zip(WORK, work_per_token(load, Rules(512, True, False), LineCosts(), kv, "kv"), strict=True))
        for kv in (AMPLE, 1000)
    )
    assert scarce["prompts"] > ample["prompts"]
    reserved = dict(zip(WORK, work_per_token(load, Rules(512, True, True), LineCosts(), 1000, "kv"), strict=True))
    assert reserved["sequences"] <= 5  # 1,000 tokens hold five whole requests


# --- The correction ----------------------------------------------------------------------------------------------


def synthetic(correction: Correction, count: int, name: str = "synthetic") -> tuple[np.ndarray, np.ndarray]:
    stream = Streams(0).stream(name)
    low, high = np.array([4, 0.2, 0.1, 1, 1, 0.001]), np.array([12, 8, 20, 1.2, 128, 0.8])
    work = low * (high / low) ** stream.random((count, len(WORK)))
    return work, correction.tpot_ms(work)


def measured_rows(work: np.ndarray, tpot: np.ndarray, groups: int = 3) -> list[Measured]:
    names = [(f"gpu{i}", "model", "vllm" if i < 2 else "sglang", "fp8") for i in range(groups)]
    return [
        Measured(names[i % groups], 1 + i // groups % 2, Load(1, 1, 1, 1), row, float(time))
        for i, (row, time) in enumerate(zip(work, tpot, strict=True))
    ]


def test_fit_recovers_weights() -> None:
    true = Correction(np.array([1.1, 1.3, 0.9, 0.7, 0.01, 4.0]))
    found = fit(*synthetic(true, 40))
    assert found.weights == pytest.approx(true.weights, rel=1e-6)
    assert (found.per_sequence_ms, found.per_request_ms) == (0, 0)


def test_fit_finds_a_ceiling() -> None:
    true = Correction(np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), per_sequence_ms=0.3)
    work, tpot = synthetic(true, 120)
    assert 0.1 < 1 - true.limited_by_engine(work).mean() < 0.6
    found = fit(work, tpot)
    assert found.per_sequence_ms == pytest.approx(0.3, rel=0.02)
    assert found.error(work, tpot) < 0.01
    assert fit(work, tpot, ceilings=False).error(work, tpot) > 0.05


def test_a_row_left_out_is_not_seen() -> None:
    true = Correction(np.array([1.1, 1.3, 0.9, 0.7, 0.01, 4.0]))
    work, tpot = synthetic(true, 90)
    tpot = tpot * np.exp(0.05 * Streams(0).stream("noise").standard_normal(len(tpot)))
    rows = measured_rows(work, tpot)

    def of(chosen: list[Measured]) -> np.ndarray:
        return silicon._predicted(chosen, lambda row, other: other.group == row.group and other is not row, True)

    before = of(rows)
    after = of([dataclasses.replace(rows[0], tpot_ms=10 * rows[0].tpot_ms), *rows[1:]])
    assert after[0] == before[0]
    same_group = [i for i, row in enumerate(rows) if row.group == rows[0].group and i]
    assert any(after[i] != before[i] for i in same_group)


def test_each_way_of_leaving_out_leaves_that_out() -> None:
    """Every group follows its own law; only a correction that saw the group can know it."""
    rows = []
    for i, factor in enumerate((1.0, 1.6, 2.5)):
        work, tpot = synthetic(Correction(factor * np.array([1.1, 1.3, 0.9, 0.7, 0.01, 4.0])), 30, f"group{i}")
        rows += [
            dataclasses.replace(row, group=(f"gpu{i}", "model", "vllm", "fp8"))
            for row in measured_rows(work, tpot, groups=1)
        ]
    told = left_out(rows, {})
    assert told.row.mape_pct < 0.01 and told.degree.mape_pct < 0.01
    assert told.setup.mape_pct > 20
    assert told.uncorrected.mape_pct > 20
    assert told.row.configurations == 90


def test_a_group_with_cached_prompts_is_not_of_the_comparison_by_setup() -> None:
    work, tpot = synthetic(Correction(np.array([1.1, 1.3, 0.9, 0.7, 0.01, 4.0])), 90)
    rows = measured_rows(work, tpot)
    impossible = dataclasses.replace(rows[0], tpot_ms=0.5 * float(rows[0].work[WORK.index("prompts")]))
    told = left_out([impossible, *rows[1:]], {})
    assert told.setup.configurations == 60
    assert told.row.configurations == 90


def test_errors_by_hand() -> None:
    rows = measured_rows(np.ones((2, len(WORK))), np.array([10.0, 20.0]))
    assert LeftOut.of(np.array([11.0, 18.0]), rows) == LeftOut(10.0, 10.0, 0.0, 2)


@pytest.fixture(scope="module")
def told() -> silicon.Silicon:
    return silicon.leave_one_out(DATA)


@needs_data
def test_time_per_token_of_real_engines_is_within_five_per_cent(told: silicon.Silicon) -> None:
    assert told.row.configurations == 553 and len(told.by_group) == 8
    assert sum(told.small.values()) == 18
    assert told.row.mape_pct <= 5
    assert abs(told.row.bias_pct) < 1
    assert told.row.mape_pct < told.degree.mape_pct < told.setup.mape_pct < told.uncorrected.mape_pct
    assert told.degree.mape_pct <= 6 and told.setup.mape_pct <= 9


@needs_data
def test_kernels_alone_are_near_the_engine_they_are_of(told: silicon.Silicon) -> None:
    vllm = told.by_group["h100_sxm", "meta-llama/Llama-3.1-70B", "vllm", "fp8"]
    assert vllm["uncorrected"].mape_pct < 8
    assert vllm["row"].mape_pct < 3


@needs_data
def test_kernels_alone_are_those_of_the_comparison(told: silicon.Silicon) -> None:
    group = ("h100_sxm", "meta-llama/Llama-3.1-70B", "vllm", "fp8")
    checks = [silicon.kernels_alone(DATA, group, degree) for degree in (2, 4, 8)]
    assert [check.points for check in checks] == [15, 15, 15]
    together = told.by_group[group]["uncorrected"]
    assert np.mean([check.mape_pct for check in checks]) == pytest.approx(together.mape_pct, abs=0.01)
    assert np.mean([check.bias_pct for check in checks]) == pytest.approx(together.bias_pct, abs=0.01)


@needs_data
def test_another_table_is_compared_with_corrections_of_this_one(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    table = pd.read_parquet(DATA / silicon.SILICON)
    mine = table[(table.gpu == "h100_sxm") & (table.engine == "vllm") & (table.model == "meta-llama/Llama-3.1-70B")]
    path = tmp_path / "other.parquet"
    mine.head(6).to_parquet(path)
    other = silicon.compare(DATA, path)
    assert other.configurations == 6 and other.mape_pct < 5
    path = tmp_path / "unknown.parquet"
    mine.head(1).assign(engine="abacus").to_parquet(path)
    with pytest.raises(DataError, match=r"under abacus is not known; known models: .*; engines: vllm"):
        silicon.compare(DATA, path)


# --- The roofline prior ------------------------------------------------------------------------------------------

IDEAL = Efficiency(0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1)


@needs_data
@pytest.mark.parametrize("precision", [BF16, FP8], ids=["bf16", "fp8"])
def test_efficiencies_are_shares(precision: Precision) -> None:
    for name in measured(precision):
        known = dataclasses.asdict(calibrate_once(DATA, name, precision))
        for field, value in known.items():
            if name == "a100_sxm" and field.startswith("encoder"):
                assert np.isnan(value)
            elif field.endswith("_us"):
                assert 0 <= value < 100, (name, field)
            else:
                assert 0.05 < value <= 1, (name, field)


@needs_data
def test_the_prior_without_a_gpu_does_not_know_it() -> None:
    everything = prior(DATA, BF16)
    for name in MEASURED:
        assert prior(DATA, BF16, without=name) != everything


@needs_data
def test_error_of_the_prior_on_gpus_it_has_not_seen() -> None:
    checks = left_out_checks(DATA, LLAMA_31_8B, BF16)
    assert len(checks) == 2 * len(MEASURED)
    decode = [check.mape_pct for check in checks if check.against.endswith("decode")]
    prompts = [check.mape_pct for check in checks if check.against.endswith("prefill")]
    assert np.mean(decode) < 8 and max(decode) < 12
    assert np.mean(prompts) < 11 and max(prompts) < 15
    encoders = left_out_checks(DATA, BGE_M3, BF16)
    assert len(encoders) == len(MEASURED) - 1  # no encoder attention was measured on an A100


@needs_data
@pytest.mark.parametrize("model", [LLAMA_31_8B, LLAMA_31_70B, BGE_M3], ids=lambda model: model.name)
def test_an_ideal_roofline_is_the_bound(model: Architecture) -> None:
    """Without launches, at full rates, a layer's matrices take what the bound says: no FLOP or byte is lost."""
    device = Device("l4", 24.0, 300.0, 121.0, 72.0)
    kernels = RooflineKernels(DATA, model, device, BF16, 1, IDEAL)
    limits = Limits.of(model, device, BF16, 1)
    gemms = model.layer_gemms(1)
    layers = model.layers
    many = layers * sum(kernels.gemm_us(8192, n, k) for n, k in gemms)
    assert many == pytest.approx(8192 * limits.token_us, rel=1e-9)
    one = layers * sum(kernels.gemm_us(1, n, k) for n, k in gemms)
    read = 2 * model.linear_parameters / 300e3
    assert read <= one < 1.01 * read
    pairs = layers * kernels.prompts_us(1, 4096)
    assert pairs == pytest.approx(4096**2 / 2 * limits.pair_us, rel=1e-9)


@needs_data
def test_tensor_parallel_without_a_link_is_refused() -> None:
    nowhere = Device("abacus", 24.0, 300.0, 121.0, 72.0)
    alone = RooflineKernels(DATA, LLAMA_31_8B, nowhere, BF16, 1, IDEAL)
    assert alone.linear_us(1) > 0
    with pytest.raises(KeyError, match="abacus has no link_gb_s"):
        RooflineKernels(DATA, LLAMA_31_8B, nowhere, BF16, 2, IDEAL).linear_us(1)


# --- Unmeasured shapes -------------------------------------------------------------------------------------------


def test_architectures_beside_the_first_have_the_published_size() -> None:
    assert LLAMA_2_13B.parameters == 13_015_864_320
    assert LLAMA_31_70B.parameters == 70_553_706_496
    assert LLAMA_32_3B.parameters == 3_212_749_824
    # Published: 7,615,616,512 and 567,754,752; the rest are biases, which no time here depends on.
    assert QWEN_25_7B.parameters == pytest.approx(7_615_616_512, rel=2e-4)
    assert BGE_M3.parameters == pytest.approx(567_754_752, rel=3e-3)


def test_more_heads_are_more_sequences() -> None:
    table = {(seqs, 512): 10.0 + 2.0 * seqs for seqs in (1, 2, 4, 8, 16)}
    made = more_sequences(table, 2.5)
    assert made == {(1, 512): 15.0, (2, 512): 20.0, (4, 512): 30.0}


@needs_data
@pytest.mark.parametrize("device", MEASURED)
@pytest.mark.parametrize("model", [QWEN_25_7B, LLAMA_2_13B], ids=lambda model: model.name)
def test_rules_of_unmeasured_heads_hold_on_measured_ones(device: str, model: Architecture) -> None:
    (check,) = shape_checks(DATA, model, read_device(DATA, device, BF16), BF16, 1)
    assert check.points > 100
    assert check.mape_pct < 5 and abs(check.bias_pct) < 2


@needs_data
def test_a_measured_shape_is_taken_as_it_is() -> None:
    device = read_device(DATA, "h100_sxm", BF16)
    measured_, made = (kind(DATA, LLAMA_31_8B, device, BF16, 1) for kind in (Kernels, NeighbouringShapes))
    assert made.generation == measured_.generation
