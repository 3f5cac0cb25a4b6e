"""The fit script reproduces every shipped file, reports true held-out errors, and refuses the impossible."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "tools"))

import fit_profiles  # noqa: E402
import profile_table  # noqa: E402
from document import with_part  # noqa: E402
from fit_profiles import RECIPES  # noqa: E402
from profile_fit import checks  # noqa: E402
from profile_fit.architecture import (  # noqa: E402
    BF16,
    FP16,
    LLAMA_2_70B,
    LLAMA_31_8B,
    QWEN3_30B_A3B,
    QWEN3_32B,
    RTX4090,
    Architecture,
    read_device,
)
from profile_fit.assembly import Setup  # noqa: E402
from profile_fit.fit import BoundError, Limits, Parts, check_bounds, fit_curve, fit_iterations, fit_parts  # noqa: E402
from profile_fit.kernels import Kernels, LayerProfile  # noqa: E402
from profile_fit.steps import Floats, Points, Step, Steps, decode, predict_us, prefill  # noqa: E402

from sage_sim.iteration import IterationTime, IterationWork  # noqa: E402
from sage_sim.profile import Attention, Curve, Prefill, TimeModel, load_profile, profile_names  # noqa: E402

needs_data = pytest.mark.skipif(
    not (DATA / "hardware_specs.csv").exists(), reason="calibration tables are not in ../shared/data"
)
TRUE = TimeModel(
    token=Curve([1, 64, 512, 4096], [16_000.0, 18_000.0, 60_000.0, 380_000.0]),
    head=Curve([1, 64, 256], [1_100.0, 1_200.0, 1_900.0]),
    prefill=Prefill(Curve([16, 1024], [300.0, 1_500.0]), per_pair_ns=4.0, per_context_token_ns=400.0),
    attention=Attention(
        seqs=[1, 8, 64],
        context=[16, 512, 4096],
        decode_us=[[300.0, 420.0, 1_200.0], [450.0, 1_900.0, 10_000.0], [1_000.0, 6_000.0, 40_000.0]],
        mixed_us=[[100.0, 500.0, 3_000.0], [400.0, 3_000.0, 18_000.0], [2_600.0, 11_000.0, 75_000.0]],
        mixed_per_seq_token_ns=50.0,
    ),
)
LIMITS = Limits.of(LLAMA_31_8B, RTX4090, BF16, 1)
PROMPTS = (16, 40, 100, 256, 400, 900, 2048)
CONTEXTS = (16, 100, 512, 1500, 4096)


def true_parts() -> Parts:
    """Noise-free kernel times of ``TRUE``, each the difference of two iterations of its law."""
    law = TRUE.law()
    tokens, heads = np.unique(np.geomspace(1, 4096, 60).round()), np.arange(1.0, 257.0, 3.0)
    token = Points(tokens, np.interp(tokens, TRUE.token.at, TRUE.token.us))
    head = Points(heads, np.interp(heads, *((TRUE.head.at, TRUE.head.us) if TRUE.head else ((), ()))))

    def attention(rows: list[Step]) -> Steps:
        steps = Steps.of(rows)
        rest = np.interp(steps.tokens + steps.seqs, TRUE.token.at, TRUE.token.us)
        assert TRUE.head is not None
        rest += np.interp(steps.chunks + steps.seqs, TRUE.head.at, TRUE.head.us)
        return steps.timed(predict_us(law, steps) - rest)

    seqs = (1, 2, 8, 20, 64)
    prefills = [prefill(b, p, c, 0.0) for b in (1, 2) for p in PROMPTS for c in (0, 64, 1024, 4096)]
    mixed = [p._replace(seqs=n, kv=n * c) for p in prefills for n in seqs for c in CONTEXTS]
    return Parts(
        token=token,
        head=head,
        decode=attention([decode(n, n * c, 0.0) for n in seqs for c in CONTEXTS]),
        prefill=attention(prefills),
        mixed=attention(mixed),
        prompts=(16, 6144),
    )


def with_columns(steps: Steps, **changes: Any) -> Steps:
    return Steps(**{name: changes.get(name, getattr(steps, name)) for name in Step._fields})


def test_fit_recovers_a_known_law() -> None:
    parts = true_parts()
    fitted, errors = fit_parts("synthetic", parts, kv_tokens_max=10**9)
    law = fitted.law()
    assert isinstance(parts.mixed, Steps)
    for steps, worst in ((parts.decode, 0.005), (parts.prefill, 0.01), (parts.mixed, 0.02)):
        whole = parts.iterations(steps)
        assert np.abs(predict_us(law, whole) / whole.time_us - 1).max() < worst
    assert fitted.prefill.per_pair_ns == pytest.approx(4.0, rel=0.05)
    assert errors.keys() == {"decode", "prefill", "mixed"}
    assert all(error.mape_pct < 1.0 for error in errors.values())


def test_attention_beside_a_prefill_may_be_assumed() -> None:
    parts = dataclasses.replace(true_parts(), mixed=1.5)
    fitted, errors = fit_parts("assumed", parts, kv_tokens_max=10**9)
    assert fitted.attention is not None
    assert np.allclose(fitted.attention.mixed_us, 1.5 * np.array(fitted.attention.decode_us), rtol=1e-3)
    assert "mixed" not in errors  # nothing measured, no error told


def test_knots_that_no_point_decides_go_on_in_a_line() -> None:
    parts = true_parts()
    assert isinstance(parts.mixed, Steps)
    few = dataclasses.replace(parts, mixed=parts.mixed.where(parts.mixed.seqs <= 8))
    fitted, _ = fit_parts("few", few, kv_tokens_max=10**9)
    assert fitted.attention is not None
    table = dict(zip(fitted.attention.seqs, np.array(fitted.attention.mixed_us), strict=True))
    assert np.allclose(table[64], table[8] + (table[8] - table[2]) * 56 / 6, rtol=0.1)


def test_curve_follows_a_step() -> None:
    sizes = np.arange(1.0, 513.0)
    times = np.where(sizes <= 256, 100.0, 140.0) + sizes / 10
    curve = fit_curve(Points(sizes, times))
    assert len(curve.at) < 8
    assert np.abs(np.interp(sizes, curve.at, curve.us) / times - 1).max() < 0.005


def test_curve_does_not_fall_where_it_goes_on() -> None:
    curve = fit_curve(Points(np.arange(1.0, 9.0), np.array([1, 2, 3, 4, 5, 6, 7, 3.0])))
    assert curve.us[-1] >= curve.us[-2]


def test_whole_iterations_give_back_floor_line_and_decode() -> None:
    def truth(steps: Steps) -> Steps:
        prompt = np.maximum(25_000, 5_000 + 110 * steps.tokens) + 6e-3 * steps.pairs
        decoding = 20_000 + 40 * (steps.seqs - 1) + 0.15 * steps.kv
        return steps.timed(np.where(steps.tokens > 0, prompt, decoding))

    decoding = truth(Steps.of(decode(n, n * c, 0.0) for n in (1, 2, 8, 32) for c in CONTEXTS))
    prompts = truth(Steps.of(prefill(b, p, 0, 0.0) for b in (1, 2, 4) for p in (16, 64, 128, 256, 512, 1024, 4096)))
    fitted, errors = fit_iterations("whole", decoding, prompts, LIMITS)
    law = fitted.law()
    for steps in (decoding, prompts):
        assert np.abs(predict_us(law, steps) / steps.time_us - 1).max() < 0.01
    assert all(error.mape_pct < 1.0 for error in errors.values())
    # Beside a prompt, decodes add what more of them add to an iteration of their own.
    alone = law.iteration_ps(IterationWork(0, 0, 1, 512, 0, 512**2))
    beside = law.iteration_ps(IterationWork(8, 8_000, 1, 512, 0, 512**2))
    assert (beside - alone) / 1e6 == pytest.approx(40 * 7 + 0.15 * 8_000, rel=0.02)


def test_fit_of_whole_iterations_never_goes_below_the_hardware() -> None:
    decoding = Steps.of(decode(n, n * c, 20_000.0) for n in (1, 8) for c in CONTEXTS)  # a cache that costs nothing
    prompts = Steps.of(prefill(1, p, 0, 100.0 * p) for p in (64, 256, 1024, 2048, 4096))  # attention neither
    fitted, _ = fit_iterations("cheap", decoding, prompts, LIMITS)
    assert fitted.prefill.per_pair_ns == pytest.approx(LIMITS.pair_us * 1e3, rel=1e-3)
    assert fitted.attention is not None
    low, high = fitted.attention.decode_us[-1]
    assert (high - low) / (8 * 4096) == pytest.approx(LIMITS.kv_us, rel=1e-3)


def test_held_out_conditions_share_nothing_with_the_fitted() -> None:
    repeats = Steps.of([decode(n, n * 100, 1000.0 + r) for n in range(1, 41) for r in range(5)])
    train, held = repeats.split("repeats")
    assert len(held) == 50 and len(train) == 150
    assert not set(train.seqs) & set(held.seqs)
    assert np.array_equal(repeats.split("repeats")[1].time_us, held.time_us)
    assert not np.array_equal(repeats.split("other name")[1].seqs, held.seqs)


def test_flop_bound_refuses_a_doctored_fit() -> None:
    steps = Steps.of([prefill(1, 4096, 0, 1.0)])
    assert check_bounds(TRUE.law(), steps, LIMITS) < 1
    doctored = msgspec.structs.replace(TRUE, token=Curve([1, 4096], [16_000.0, 200_000.0]))
    with pytest.raises(BoundError, match=r"beats the FLOP bound 1\.\d\d times at P=4096"):
        check_bounds(doctored.law(), steps, LIMITS)


def test_bandwidth_bound_refuses_a_doctored_fit() -> None:
    steps = Steps.of([decode(1, 128, 1.0)])
    assert check_bounds(TRUE.law(), steps, LIMITS) < 1
    doctored = msgspec.structs.replace(TRUE, token=Curve([1], [8_000.0]))  # 15 GB in 8 ms over 1 TB/s
    with pytest.raises(BoundError, match=r"beats the bandwidth bound 1\.\d\d times at P=0"):
        check_bounds(doctored.law(), steps, LIMITS)


def test_units_slip_in_a_source_is_refused() -> None:
    parts = true_parts()
    slipped = dataclasses.replace(parts, token=Points(parts.token.size, parts.token.time_us / 1e3))  # us taken for ns
    fitted, _ = fit_parts("slipped", slipped, kv_tokens_max=10**9)
    with pytest.raises(BoundError):
        check_bounds(fitted.law(), parts.decode, LIMITS)


def test_architectures_have_the_published_size() -> None:
    assert LLAMA_31_8B.parameters == 8_030_261_248
    assert LLAMA_2_70B.parameters == 68_976_648_192
    assert LLAMA_2_70B.kv_bytes_per_token(2) == 327_680
    assert QWEN3_32B.parameters == pytest.approx(32.76e9, rel=1e-3)
    assert QWEN3_30B_A3B.parameters == pytest.approx(30.53e9, rel=1e-3)
    assert QWEN3_30B_A3B.active_parameters + 2 * 151936 * 2048 == pytest.approx(3.35e9, rel=1e-2)


def test_experts_are_hit_one_after_another() -> None:
    assert QWEN3_30B_A3B.experts_hit(1) == pytest.approx(8)
    assert QWEN3_30B_A3B.experts_hit(2) == pytest.approx(8 + 8 * 120 / 128)
    assert QWEN3_30B_A3B.experts_hit(4096) == pytest.approx(128)


def test_without_data_the_script_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_profiles.main(["--data", str(tmp_path)]) == 2
    assert "give the data folder with --data" in capsys.readouterr().err


def test_every_shipped_profile_has_a_recipe() -> None:
    assert sorted(RECIPES) == profile_names()


@needs_data
@pytest.mark.parametrize("name", RECIPES)
def test_refit_reproduces_the_shipped_file(name: str) -> None:
    shipped, refitted = (msgspec.to_builtins(p) for p in (load_profile(name), fit_profiles.build(name, DATA)))
    assert _leaves(refitted).keys() == _leaves(shipped).keys()
    for key, value in _leaves(shipped).items():
        # Another BLAS may move the last of five digits; errors are rounded to 0.01 per cent.
        same = pytest.approx(value, rel=1e-3, abs=0.021) if isinstance(value, float) else value
        assert _leaves(refitted)[key] == same, key


def _leaves(tree: object, at: str = "") -> dict[str, object]:
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(i), value) for i, value in enumerate(tree)]
    else:
        return {at.strip("."): tree}
    return {key: leaf for name, value in items for key, leaf in _leaves(value, f"{at}.{name}").items()}


@needs_data
def test_errors_in_a_measured_file_are_those_on_held_out_points() -> None:
    pd = pytest.importorskip("pandas")
    name = "llama-3.1-8b-a100-tp4-sageserve"
    rows = pd.read_parquet(DATA / "calibration_sageserve.parquet")
    rows = rows[(rows.model == "Llama-3.1-8B") & (rows.tensor_parallel == 4)]
    note = rows.note.fillna("")
    rows = rows[~note.str.startswith("SUSPECT") & ~note.str.startswith("prompt batch may be")]
    setup = Setup(LLAMA_31_8B, read_device(DATA, "a100_sxm", FP16), FP16, 4)
    decoding, prompts = checks.measured_iterations(rows)
    kept_decoding, held_decoding = decoding.split(f"{name}/decode")
    kept_prompts, held_prompts = prompts.split(f"{name}/prefill")
    law = fit_iterations("again", kept_decoding, kept_prompts, setup.limits)[0].law()
    told = load_profile(name).errors
    for phase, held in (("decode", held_decoding), ("prefill", held_prompts)):
        error = _error_pct(law, held)
        assert told[phase].held_out == len(held)
        assert told[phase].mape_pct == pytest.approx(np.mean(np.abs(error)), abs=0.02)
        assert told[phase].ape_pct_p95 == pytest.approx(np.percentile(np.abs(error), 95), abs=0.05)
        assert told[phase].bias_pct == pytest.approx(np.mean(error), abs=0.02)


@needs_data
@pytest.mark.parametrize(
    ("name", "decode_pct", "prefill_pct", "mixed_pct"),
    [("llama-3.1-8b-rtx4090-tp1", 0.5, 1, 2), ("qwen3-30b-a3b-rtxpro6000-tp1", 1, 1.5, 3)],
)
def test_shipped_files_follow_their_kernels(name: str, decode_pct: float, prefill_pct: float, mixed_pct: float) -> None:
    """The file, not the fit on three quarters, against every iteration of its source that fits the cache."""
    profile = load_profile(name)
    gpu, arch = ("RTX4090", LLAMA_31_8B) if "4090" in name else ("RTXPRO6000", QWEN3_30B_A3B)
    parts = LayerProfile(DATA, gpu, arch, 1).parts()
    for phase, most in (("decode", decode_pct), ("prefill", prefill_pct), ("mixed", mixed_pct)):
        steps = parts.phases()[phase]
        whole = parts.iterations(steps.where(steps.kv + steps.context + steps.tokens <= profile.kv_tokens_max))
        assert np.mean(np.abs(_error_pct(profile.iteration_time(), whole))) < most


def _error_pct(law: IterationTime, steps: Steps) -> Floats:
    times = np.array([law.iteration_ps(work) for work in steps.works()]) / 1e6
    return np.asarray(100 * (times / steps.time_us - 1), dtype=np.float64)


@needs_data
@pytest.mark.parametrize(("gpu", "arch"), [("RTX4090", LLAMA_31_8B), ("RTXPRO6000", QWEN3_32B)])
def test_composition_equals_the_published_one(gpu: str, arch: Architecture) -> None:
    """Our sum over layers gives, to rounding, the iteration times the data set composed from the same kernels."""
    pd = pytest.importorskip("pandas")
    table = pd.read_parquet(DATA / "calibration_llmservingsim_composed.parquet", filters=[("gpu", "=", gpu)])
    table = table[(table.model == arch.name) & (table.tensor_parallel == 1)]
    parts = LayerProfile(DATA, gpu, arch, 1).parts()
    phases = {phase: parts.iterations(steps) for phase, steps in parts.phases().items()}
    decoding = table[table.phase == "decode"]
    theirs = {
        (b, kv): ms for b, kv, ms in zip(decoding.batch_size, decoding.kv_tokens_total, decoding.time_ms, strict=True)
    }
    whole = phases["decode"]
    assert len(whole) == len(theirs) > 50
    for seqs, kv, time_us in zip(whole.seqs, whole.kv, whole.time_us, strict=True):
        assert time_us / 1e3 == pytest.approx(theirs[seqs, kv], rel=1e-9)
    for phase in ("prefill", "mixed"):
        published = np.sort(table[table.phase == phase].time_ms.to_numpy())
        assert np.sort(phases[phase].time_us) / 1e3 == pytest.approx(published, rel=1e-9)


@needs_data
def test_composed_kernels_respect_the_bandwidth() -> None:
    device = read_device(DATA, "l40s", BF16)
    kernels = Kernels(DATA, LLAMA_31_8B, device, BF16, 1)
    faster_in_cache = 0
    for (seqs, context), time_us in kernels.generation.items():
        least_us = seqs * context * LLAMA_31_8B.kv_bytes_per_token(2) / 32 / (device.bandwidth_gb_s * 1e3)
        faster_in_cache += time_us < least_us
        assert kernels.generation_us(seqs, context) >= least_us
    assert faster_in_cache > 0  # the rule is not idle: this table has cache-resident rows


def test_documented_table_is_that_of_the_files() -> None:
    document = (ROOT / "docs" / "profiles.md").read_text("utf-8")
    assert with_part(profile_table.DOCUMENT, document, profile_table.PART, profile_table.table()) == document
