"""``sage calibrate``: what it recovers from an engine whose times are known, and what its parts make of exact instants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sage_bench.calibrate.design import Limits, Pace, designed, injections, ladder
from sage_bench.calibrate.engine import ask
from sage_bench.calibrate.fit import STIFFNESS, Terms
from sage_bench.calibrate.llm import held_out
from sage_bench.calibrate.observation import (
    Condition,
    Observation,
    chunks,
    mended,
    of_burst,
    of_decode,
    of_mixed,
    repeated,
)
from sage_bench.calibrate.session import Interleaved, Wanted
from sage_bench.calibrate.shots import Answers, Shot
from sage_bench.config import EmbedConfig, LlmConfig
from sage_bench.emulate import emulation
from sage_core.errors import DataError, EngineError
from sage_core.rng import Streams
from sage_sim.iteration import IterationTime, IterationWork
from sage_sim.profile import load_profile

Sage = Callable[..., Any]

TRUTH = "llama-3.1-8b-h100-tp1"
MS = 1_000_000


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """An emulated engine in a process of its own: its URL."""
    command = [sys.executable, "-m", "sage_bench", "llm", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.communicate(timeout=20)


# --- a live engine whose times are known --------------------------------------------------------------------------------


def test_the_times_of_an_emulated_engine_are_found_again(sage: Sage, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    with serving("--emulate", TRUTH, "--max-num-seqs", "4", "--model", "m") as url:
        options = ("--max-num-seqs", "4", "--prompt-max", "512", "--budget-s", "10")
        done = sage("calibrate", url, "--out", str(out), *options)
    assert done.code == 0, done.err
    ours, truth = load_profile(str(out)), load_profile(TRUTH)
    longest = ours.valid.prefill_tokens[1]  # a slow machine has time for shorter prompts only
    off = [
        abs(ours.iteration_time().iteration_ps(work) / truth.iteration_time().iteration_ps(work) - 1)
        for work in (
            *(IterationWork(seqs, seqs * context) for seqs in (1, 2, 4) for context in (40, longest // 2, longest)),
            *(
                IterationWork(0, 0, 1, tokens, 0, tokens * tokens)
                for tokens in (longest // 3, 2 * longest // 3, longest)
            ),
        )
    ]
    # Half of that is what a quiet machine gives; between two sizes that were measured lie tiles of kernels.
    assert float(np.median(off)) < 0.02, off
    assert max(off) < 0.25, off
    assert (ours.kind, ours.engine.name, ours.source.kind) == ("llm", "sage-emulated", "measured")
    assert {"decode", "prefill", "mixed"} == set(ours.errors)
    assert [check.against.rpartition(" ")[2] for check in ours.checks] == ["TTFT", "TPOT", "E2E"] * 2
    assert "held-out load" in done.out and "noise" in done.out

    # What lies beside it is a device: it can be simulated and emulated as it stands.
    device = json.loads((tmp_path / "mine.device.json").read_text())
    assert (device["max_num_seqs"], device["max_num_batched_tokens"], device["block_size"]) == (4, 2048, 16)
    served = emulation(msgspec.convert(device, LlmConfig), None).llm
    assert served is not None and served.kv_cache.kv_blocks == device["kv_tokens"] // 16


def test_an_embedding_engine(sage: Sage, tmp_path: Path) -> None:
    out = tmp_path / "texts.yaml"
    tokenizer = word_tokenizer(tmp_path)
    with serving("--embed-profile", "bge-small-en-v1.5-cpu", "--embed-model", "e") as url:
        options = ("--kind", "embedding", "--tokenizer", str(tokenizer), "--prompt-max", "64", "--budget-s", "4")
        done = sage("calibrate", url, "--out", str(out), *options, "--max-batch-tasks", "8")
    assert done.code == 0, done.err
    ours, truth = load_profile(str(out)), load_profile("bge-small-en-v1.5-cpu")
    # Whole batches, on which the truth is far from its floor and from where overheads count.
    sizes = [(64 * count, 64 * 64 * count) for count in (2, 4, 8)]
    off = [abs(ours.iteration_time().batch_ps(*size) / truth.iteration_time().batch_ps(*size) - 1) for size in sizes]
    assert float(np.median(off)) < 0.15, off
    device = json.loads((tmp_path / "texts.device.json").read_text())
    assert emulation(None, msgspec.convert(device, EmbedConfig)).embedding is not None


def test_rounds_with_other_work_between_them_on_a_watched_core(sage: Sage, tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with serving("--emulate", TRUTH, "--max-num-seqs", "4", "--model", "m") as url:
        wanted = Wanted(url, budget_s=6.0, max_num_seqs=4, prompt_max=128, watch_core=core)
        with Interleaved(wanted) as calibration:
            calibration.round()
            first = calibration.solved(tmp_path / "first.yaml")
            calibration.round()
            calibration.round()
            report = calibration.solved(tmp_path / "all.yaml")
        done = sage("calibrate", url, "--out", str(tmp_path / "x.yaml"), "--watch-core", "4095", "--budget-s", "2")
    assert done.code == EngineError.exit_code and "core 4095 cannot be watched" in done.err
    profile = load_profile(str(tmp_path / "all.yaml"))
    assert profile.hardware.probe_us is not None and 0.1 < profile.hardware.probe_us < 1e4
    assert any("work time" in each for each in profile.assumptions)
    assert report.requests > first.requests and not profile.checks
    assert len(set(report.notes)) == len(report.notes)
    work = IterationWork(4, 400)
    ours, truth = (each.iteration_time().iteration_ps(work) for each in (profile, load_profile(TRUTH)))
    assert ours == pytest.approx(truth, rel=0.3)


def test_texts_instead_of_chats(sage: Sage, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    with serving("--emulate", TRUTH, "--max-num-seqs", "2", "--model", "m") as url:
        options = ("--tokenizer", str(tokenizer), "--prompt-max", "64", "--budget-s", "2", "--max-num-seqs", "2")
        done = sage("calibrate", url, "--out", str(tmp_path / "x.yaml"), "--prompts", "text", *options)
        assert done.code == 0, done.err
        assert "by /v1/completions;" in load_profile(str(tmp_path / "x.yaml")).source.method.replace("\n", " ")
        assert "chat templates is not in the profile" in done.out
        done = sage("calibrate", url, "--out", str(tmp_path / "y.yaml"), "--prompts", "ids", *options[2:])
        assert done.code == 0 and "with token ids" in done.out + (tmp_path / "y.yaml").read_text()
        missing = ("--prompts", "ids", "--tokenizer", str(tmp_path / "none.json"))
        done = sage("calibrate", url, "--out", str(tmp_path / "z.yaml"), *missing)
        assert done.code == DataError.exit_code and "none.json" in done.err
        done = sage("calibrate", url, "--out", str(tmp_path / "y.yaml"), "--prompts", "chat")
        assert done.code == 2 and "--tokenizer" in done.err
        done = sage("calibrate", url, "--out", str(tmp_path / "y.yaml"), "--kind", "embedding", "--prompts", "ids")
        assert done.code == 2 and "--prompts" in done.err


def test_mistakes_are_one_line(sage: Sage, tmp_path: Path) -> None:
    done = sage("calibrate", "http://127.0.0.1:9", "--out", str(tmp_path / "x.yaml"))
    assert done.code == EngineError.exit_code and "start the engine first" in done.err
    done = sage("calibrate", "http://127.0.0.1:9", "--out", str(tmp_path / "x.json"))
    assert done.code == 2 and ".yaml" in done.err
    with serving("--emulate", TRUTH, "--model", "m") as url:
        done = sage("calibrate", url, "--model", "other", "--out", str(tmp_path / "x.yaml"))
        assert done.code == 2 and "expected one of m" in done.err
        done = sage("calibrate", url, "--kind", "embedding", "--out", str(tmp_path / "x.yaml"))
        assert done.code == 2 and "--tokenizer" in done.err
        facts = ask(url, None)
    assert (facts.model, facts.block_size, facts.prefix_caching) == ("m", 16, True)
    assert facts.kv_tokens == load_profile(TRUTH).kv_tokens_max // 16 * 16
    assert not list(tmp_path.iterdir())


# --- the fit --------------------------------------------------------------------------------------------------------------

LAW = IterationTime(
    token_knots=(1, 16, 256, 1024),
    token_ps=(5 * 10**9, 6 * 10**9, 9 * 10**9, 30 * 10**9),
    head_knots=(0, 8),
    head_ps=(0, 8 * 10**7),
    attention_seqs=(1, 2, 4, 8),
    attention_context=(16, 1024),
    decode_ps=tuple(seqs * 2 * 10**8 * step for seqs in (0, 1, 3, 7) for step in (1, 3)),
    mixed_ps=tuple(
        base * 2 * 10**8 * step + seqs * (10**8 + 3 * 10**5 * context)
        for seqs, base in ((1, 0), (2, 1), (4, 3), (8, 7))
        for step, context in ((1, 16), (3, 1024))
    ),
    prefill_knots=(1,),
    prefill_ps=(10**9,),
    prefill_pair=2000,
)
INGRESS_US = 700.0


def observed(condition: Condition, works: tuple[tuple[float, IterationWork], ...]) -> Observation:
    time_us = sum(count * LAW.iteration_ps(work) / 1e6 for count, work in works)
    return Observation(condition, works, time_us + INGRESS_US * condition.ingress)


def conditions() -> list[Observation]:
    found = [
        observed(Condition("prefill", f"{tokens}", True), chunks(tokens, 1024))
        for tokens in (1, 8, 16, 64, 256, 512, 1024, 2048)
    ]
    for seqs in (1, 2, 4, 8):
        for context in (16, 500, 1024):
            work = IterationWork(seqs, seqs * context)
            found.append(observed(Condition("decode", f"{seqs} {context}", False), ((1, work),)))
            for tokens in (16, 256, 900):
                works = ((2.0, work), *chunks(tokens, 1024, seqs, seqs * context))
                found.append(observed(Condition("mixed", f"{seqs} {context} {tokens}", False), works))
    return found


def test_a_law_of_the_form_is_found_exactly() -> None:
    observations = repeated(conditions() * 3)
    terms = Terms([1, 2, 4, 8, 16, 256, 1024], [1, 2, 4, 8], [16, 1024])
    fit, errors = terms.solved(observations, Streams(0))
    assert fit.predicted_us == pytest.approx([each.median.time_us for each in observations], rel=1e-3)
    assert fit.ingress_us == pytest.approx(INGRESS_US, rel=0.2)  # some of it could as well be of every iteration
    law = fit.time.law()
    for work in (
        IterationWork(3, 900),
        IterationWork(0, 0, 1, 100, 0, 10_000),
        IterationWork(6, 1200, 1, 300, 0, 90_000),
    ):
        assert law.iteration_ps(work) == pytest.approx(LAW.iteration_ps(work), rel=0.02)
    assert {phase: error.held_out for phase, error in errors.items()} == {"decode": 12, "prefill": 8, "mixed": 36}
    assert errors["mixed"].mape_pct < 5


def test_one_outlier_of_many_repetitions_changes_nothing() -> None:
    plain = conditions()
    late = [Observation(each.condition, each.works, 10 * each.time_us) for each in plain]
    terms = Terms([1, 2, 4, 8, 16, 256, 1024], [1, 2, 4, 8], [16, 1024])
    with_them, without = (terms.solved(repeated(each), Streams(0))[0] for each in (plain * 4 + late, plain * 4))
    assert with_them.time == without.time


def test_noise_is_not_drawn_as_bends() -> None:
    """Of an engine that repeats itself within 40 %, what the held-out errors choose is nearer to the truth than the loosest curves; of one
    that repeats itself within 0.1 %, nearer than the stiffest, which miss its bends."""
    terms = Terms([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], [1, 2, 4, 8], [16, 256, 512, 1024])
    works = [IterationWork(seqs, seqs * context) for seqs in (2, 3, 6, 8) for context in (50, 300, 900)]
    works += [IterationWork(0, 0, 1, tokens, 0, tokens * tokens) for tokens in (24, 100, 400, 800)]

    def off(stiffness: tuple[float, ...], scatter: float) -> float:
        """Mean over five engines."""
        errors = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("sage_bench.calibrate.fit.STIFFNESS", stiffness)
            for seed in range(5):
                rng = np.random.default_rng(seed)
                noisy = [
                    Observation(each.condition, each.works, each.time_us * factor)
                    for each in conditions()
                    for factor in rng.lognormal(0, scatter, 3)
                ]
                law = terms.solved(repeated(noisy), Streams(0))[0].time.law()
                errors += [abs(law.iteration_ps(work) / LAW.iteration_ps(work) - 1) for work in works]
        return float(np.mean(errors))

    assert off(STIFFNESS, 0.4) < off(STIFFNESS[:1], 0.4)
    assert off(STIFFNESS, 0.001) < 0.01 < off(STIFFNESS[-1:], 0.001)


# --- instants -------------------------------------------------------------------------------------------------------------


def answers(shots: list[Shot], tokens_ms: list[list[float]]) -> Answers:
    """As if read from a socket at these instants."""
    tokens = [np.array([round(at * MS) for at in of], np.int64) for of in tokens_ms]
    return Answers(
        shots,
        np.array([shot.at_ns for shot in shots]),
        np.array([of[0] for of in tokens]),
        np.array([of[-1] for of in tokens]),
        tokens,
        0,
    )


def test_decode_is_the_slope_of_each_number_of_sequences() -> None:
    long = [10 + 4.0 * k for k in range(20)] + [10 + 4 * 19 + 3.0 * k for k in range(1, 21)]
    found = of_decode(answers([Shot(0, 100, 20), Shot(0, 100, 40)], [long[:20], long]), "ladder")
    assert [each.works[0][1].seqs for each in found] == [2, 1]
    assert [each.time_us for each in found] == pytest.approx([4000, 3000])
    assert found[0].works[0][1].kv_tokens == pytest.approx(2 * 111, abs=4)


def test_a_prompt_takes_what_the_others_waited() -> None:
    # Iterations of 5 ms; the prompt comes at 52 and is prefilled in one of 25 ms, after the one in progress.
    decode = [5.0 * k for k in range(1, 12)] + [80 + 5.0 * k for k in range(10)]
    volley = answers([Shot(0, 64, 21), Shot(52 * MS, 200, 1)], [decode, [80]])
    (found,) = of_mixed(volley, 2048, "beside 1")
    (plain, _), (once, work) = found.works
    assert (plain, once, work.seqs, work.prefill_tokens) == (3, 1, 1, 200)
    assert found.time_us == 40_000  # from 50 to 90: 5, 25, 5, 5


def test_a_burst_shows_its_second_iteration() -> None:
    volley = answers([Shot(0, 32, 1)] * 4, [[10], [24], [24.1], [23.9]])
    (found,) = of_burst(volley, 2048, "prompts", 2.5 * MS)
    assert (found.works[0][1].chunks, found.works[0][1].prefill_tokens) == (3, 96)
    assert found.time_us == pytest.approx(14_000)


def test_tokens_told_together_get_instants_where_it_is_clear_which() -> None:
    whole = [5.0 * k for k in range(1, 21)]
    merged = whole[:7] + whole[8:]
    assert np.array_equal(
        mended(answers([Shot(0, 8, 20)], [merged])).tokens_ns[0], answers([Shot(0, 8, 20)], [whole]).tokens_ns[0]
    )
    # A gap in which another answer began was long for its own reason.
    beside = answers([Shot(0, 8, 20), Shot(36 * MS, 99, 1)], [merged, [45]])
    assert not mended(beside).whole(0)


def test_the_design_fits_the_engine_and_the_time() -> None:
    pace = Pace(0.01, 0.02, 1e-4)
    small = Limits(16, 2048, 4096, 60_000, prompt_min=30)
    for round_s in (10.0, 40.0, 200.0):
        design = designed(small, pace, round_s)
        for volley in design.volleys:
            assert all(shot.input_tokens + shot.output_tokens <= 4096 for shot in volley.shots)
            assert all(shot.input_tokens >= 30 for shot in volley.shots)
            assert sum(shot.input_tokens + shot.output_tokens for shot in volley.shots) <= 60_000
        assert design.cost_s(pace) <= round_s or max(design.prompts) <= 8 * 30
        assert {volley.kind for volley in design.volleys} == {"prefill", "decode", "mixed", "burst"}
    alone = designed(Limits(1, 512, 1024, 4096), pace, 10.0)
    assert all(volley.shots for volley in alone.volleys)
    outputs = sorted(shot.output_tokens for shot in ladder(8, 16, 2048))
    assert outputs == [24] * 4 + [48] * 2 + [72, 96]
    assert [shot.output_tokens for shot in injections(2, 16, [64, 128], pace)][2:] == [1, 1]


def test_held_out_loads_are_drawn_by_the_seed() -> None:
    limits = Limits(16, 2048, 4096, 60_000, prompt_max=1024)
    shots = held_out(limits, 10.0, 20.0, Streams(1), "load")
    assert shots == held_out(limits, 10.0, 20.0, Streams(1), "load") != held_out(limits, 10.0, 20.0, Streams(2), "load")
    assert len(shots) == 200 and shots[-1].at_ns == pytest.approx(20e9, rel=0.3)
    assert max(shot.input_tokens for shot in shots) <= 512


def word_tokenizer(folder: Path) -> Path:
    """A tokenizer of a hundred plain words, each one token."""
    words = [a + b + c for a in "bdfgk" for b in "aeiou" for c in "lmnr"]
    vocabulary = {"[UNK]": 0} | {word: number for number, word in enumerate(words, 1)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    split = {"type": "Whitespace"}
    parts = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    file = folder / "tokenizer.json"
    file.write_text(
        json.dumps(
            dict.fromkeys(parts) | {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model}
        )
    )
    return file
