"""A core of a shared machine as a clock: work time and seconds, the process that probes, and a twin that is slowed as the core was."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sage_bench.calibrate.shots import Answers, Range, Shot
from sage_bench.core_speed import BIN_NS, NAME, CoreSpeed, Probes, Reference, probes_in, watching
from sage_bench.results.schema import CORE_SPEED
from sage_bench.run import RunResult
from sage_bench.validate.live import validate_run
from sage_core.errors import ConfigError, DataError, EngineError
from sage_core.units import SECOND, RequestKind
from sage_live.loadgen.options import Options
from sage_sim.profile import PROFILES

Go = Callable[..., RunResult]
Sage = Callable[..., Any]

PROFILE = "llama-3.1-8b-h100-tp1"
MS = 1_000_000


def probed(slowness: list[float], probe_ns: int = 8000) -> Probes:
    """Probes every 5 ms; each factor holds for a bin."""
    each = BIN_NS // (5 * MS)
    at_ns = np.arange(len(slowness) * each) * 5 * MS
    return Probes(at_ns, np.repeat(np.round(np.array(slowness) * probe_ns), each).astype(np.int64))


EIGHT = Reference(8.0, 1.0)


def test_work_goes_on_at_the_speed_of_the_probe() -> None:
    speed = CoreSpeed(probed([1.0, 2.0, 1.0, 1.0]), EIGHT)
    assert speed.work(4 * BIN_NS) - speed.work(0) == pytest.approx(3.5 * BIN_NS)
    assert speed.work(2 * BIN_NS) - speed.work(BIN_NS) == pytest.approx(0.5 * BIN_NS)
    assert speed.slowness.tolist() == [1, 2, 1, 1]
    # An engine that is twice as sensitive as the probe, and one that is not sensitive at all.
    assert CoreSpeed(probed([1.0, 2.0, 1.0, 1.0]), Reference(8.0, 2.0)).slowness.tolist() == [1, 4, 1, 1]
    assert CoreSpeed(probed([1.0, 2.0, 1.0, 1.0]), Reference(8.0, 0.0)).work(4 * BIN_NS) == pytest.approx(4 * BIN_NS)


def test_an_interruption_is_no_slowness() -> None:
    probes = probed([1.0] * 4)
    probes.took_ns[70] = 300 * 8000
    assert CoreSpeed(probes, EIGHT).slowness.max() < 1.1


@given(
    st.lists(st.floats(0.5, 3.5), min_size=2, max_size=12),
    st.lists(st.integers(-10 * SECOND, 20 * SECOND), min_size=2, max_size=9),
)
def test_seconds_and_work_are_each_other_s_inverse(slowness: list[float], instants_ns: list[int]) -> None:
    """Of whole nanoseconds, which all instants are: of parts of one, rounding could change the order."""
    speed = CoreSpeed(probed(slowness), EIGHT)
    instants = np.sort(np.array(instants_ns))  # before the first probe and after the last, too
    assert speed.real(speed.work(instants)) == pytest.approx(instants, abs=10)
    assert (np.diff(speed.work(instants)) >= 0).all()


def test_a_core_is_probed_while_the_block_runs(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with watching(core, tmp_path / "samples"):
        began = time.monotonic_ns()
        while not (tmp_path / "samples").exists() or (tmp_path / "samples").stat().st_size < 16 * 50:
            assert time.monotonic_ns() - began < 30e9
            time.sleep(0.05)
    ended = time.monotonic_ns()
    probes = probes_in(tmp_path / "samples")
    assert (np.diff(probes.at_ns) > 0).all() and probes.at_ns[-1] <= ended
    assert 1e2 < np.median(probes.took_ns) < 1e7
    size = (tmp_path / "samples").stat().st_size
    time.sleep(0.3)
    assert (tmp_path / "samples").stat().st_size == size  # it has ended


def test_a_core_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="core 4095 cannot be watched: OSError"), watching(4095, tmp_path / "samples"):
        raise AssertionError("the block must not begin")
    with pytest.raises(EngineError, match="has not been probed"):
        probes_in(tmp_path / "samples")


def test_calibration_counts_work_time(tmp_path: Path) -> None:
    """The first half of the volley on a core at full speed, the second at half."""
    np.stack(probed([1.0] * 4 + [2.0] * 4), axis=1).tofile(tmp_path / "samples")

    def volley(at: int, took: float) -> Answers:
        """One token after ``took`` bins."""
        ended = np.array([round(took * BIN_NS)], np.int64)
        return Answers([Shot(0, 8, 1)], np.zeros(1, np.int64), ended, ended, [ended], at * BIN_NS)

    aim = Range(Options("http://127.0.0.1:1", {}), RequestKind.LLM_GENERATE, tmp_path / "samples")
    aim.reference = EIGHT
    (worked,) = asyncio.run(aim.timed([volley(2, 6)]))
    assert worked.ended_ns / BIN_NS == pytest.approx(4) and worked.tokens_ns[0] / BIN_NS == pytest.approx(4)
    unwatched, shot = Range(Options("http://127.0.0.1:1", {}), RequestKind.LLM_GENERATE), [volley(2, 6)]
    assert asyncio.run(unwatched.timed(shot)) is shot

    # The reference is the mean of the first look, and the power that which makes repetitions alike.
    def scatter(answers: Sequence[Answers]) -> float:
        return float(np.std([each.ended_ns[0] for each in answers]))

    aim = Range(Options("http://127.0.0.1:1", {}), RequestKind.LLM_GENERATE, tmp_path / "samples")
    asyncio.run(aim.timed([volley(0, 0.5), volley(6, 0.5 * 2**1.5)], scatter))
    assert aim.reference == Reference(pytest.approx(12.0), 1.5)
    asyncio.run(aim.timed([volley(0, 0.5), volley(6, 0.5)], scatter))
    assert aim.reference.power == 1.5  # and stays


def test_a_sampler_that_ends_too_early_is_told(tmp_path: Path) -> None:
    """Killed, or on a full disk: what it was to tell of went on for longer."""
    np.stack(probed([1.0] * 4), axis=1).tofile(tmp_path / "samples")
    aim = Range(Options("http://127.0.0.1:1", {}), RequestKind.LLM_GENERATE, tmp_path / "samples")
    late = np.array([60 * 10**9], np.int64)
    volley = Answers([Shot(0, 8, 1)], np.zeros(1, np.int64), late, late, [late], 0)
    with pytest.raises(EngineError, match="has ended too early"):
        asyncio.run(aim.timed([volley], lambda _: 0.0))


# --- a run and its twin --------------------------------------------------------------------------------------------------


def profile(tmp_path: Path, name: str, *, times: float, probe_us: float | None) -> str:
    """The shipped one with every time multiplied."""

    def scaled(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {inner: scaled(each, inner) for inner, each in value.items()}
        if isinstance(value, list):
            return value if key in ("at", "seqs", "context") else [scaled(each) for each in value]
        return value * times if isinstance(value, int | float) else value

    made = yaml.safe_load((PROFILES / f"{PROFILE}.yaml").read_text(encoding="utf-8"))
    made["time"] = scaled(made["time"])
    made["name"] = name
    if probe_us is not None:
        made["hardware"]["probe_us"] = probe_us
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    return str(path)


def cluster(path: str) -> str:
    return f"cluster.devices=[{{node: here, llm: {{profile: {path}, max_num_seqs: 16, kv_tokens: 64000}}}}]"


LOAD = ("load.rate=12", "load.duration_s=6", "~load.classes.embedding", "cluster.network={delay_s: 0.0, jitter_s: 0.0}")


def write_speed(run: Path, slowness: list[float]) -> None:
    pq.write_table(pa.table(list(probed(slowness)), schema=CORE_SPEED), run / NAME)


def test_a_twin_is_as_slow_as_the_core_was(go: Go, tmp_path: Path) -> None:
    """Of a core that was at half its speed throughout: the same as a profile of twice the times."""
    slow = go(*LOAD, cluster(profile(tmp_path, "slow", times=2.0, probe_us=None)), "seed=3")
    write_speed(slow.folder, [2.0] * 2 * 8)
    override = cluster(profile(tmp_path, "fast", times=1.0, probe_us=8.0))
    found = validate_run(slow.folder, tmp_path / "out", [override])
    assert found.slowness is not None and found.slowness.mean == pytest.approx(2.0)
    assert found.compared == found.requests
    for latencies in found.kinds.values():
        for latency in latencies.values():
            for statistic in (latency.mean, latency.p95):
                assert statistic.simulated == pytest.approx(statistic.measured, rel=2e-3, abs=1e-6)
    # Without the core's speed it is off by half, and says what is missing.
    (slow.folder / NAME).unlink()
    blind = validate_run(slow.folder, tmp_path / "out", [override])
    assert blind.kinds["chat"]["tpot"].mean.error_pct == pytest.approx(-50, abs=10)
    assert any("watch_core" in note for note in blind.warnings)


def test_only_what_ran_in_the_slow_seconds_is_slow(go: Go, sage: Sage, tmp_path: Path) -> None:
    fast = profile(tmp_path, "fast", times=1.0, probe_us=8.0)
    plain = go(*LOAD, cluster(fast), "seed=3")
    write_speed(plain.folder, [1.0] * 2 * 3 + [3.0] * 2 * 5)
    done = sage("validate", str(plain.folder), "--out", str(tmp_path / "out"))
    assert done.code == 0, done.err
    assert "work took 2.25 times as long" in done.out
    rows = pq.read_table(tmp_path / "out" / "fidelity_requests.parquet").to_pandas().dropna()
    ended_s = rows["scheduled_s"] + rows[["measured_e2e_s", "simulated_e2e_s"]].max(axis=1)
    before, after = rows[ended_s < 2.9], rows[rows["scheduled_s"] > 3.1]
    assert len(before) > 5 and len(after) > 5
    assert before["simulated_e2e_s"].to_numpy() == pytest.approx(before["measured_e2e_s"].to_numpy(), rel=1e-3)
    assert (after["simulated_tpot_s"] > 2 * after["measured_tpot_s"]).all()


def test_broken_records_and_profiles_are_one_line(go: Go, sage: Sage, tmp_path: Path) -> None:
    run = go(*LOAD, cluster(profile(tmp_path, "fast", times=1.0, probe_us=8.0)), "seed=3")
    pq.write_table(CORE_SPEED.empty_table(), run.folder / NAME)
    done = sage("validate", str(run.folder), "--out", str(tmp_path / "out"))
    assert done.code == DataError.exit_code and "holds no probe" in done.err and "Traceback" not in done.err
    (run.folder / NAME).write_bytes(b"not parquet")
    done = sage("validate", str(run.folder), "--out", str(tmp_path / "out"))
    assert done.code == DataError.exit_code and NAME in done.err and "Traceback" not in done.err
    for wrong in (0.0, -1.0):
        path = profile(tmp_path, "wrong", times=1.0, probe_us=wrong)
        done = sage("validate", str(run.folder), cluster(path), "--out", str(tmp_path / "out"))
        assert done.code == DataError.exit_code and "probe_us" in done.err and "Traceback" not in done.err


def test_profiles_in_different_times(go: Go, tmp_path: Path) -> None:
    run = go(*LOAD, cluster(profile(tmp_path, "fast", times=1.0, probe_us=8.0)), "seed=3")
    write_speed(run.folder, [1.0] * 2 * 8)
    both = (
        f"cluster.devices=[{{node: here, llm: {{profile: {tmp_path / 'fast.yaml'}, max_num_seqs: 16, kv_tokens: 64000}}}},"
        f"{{node: here, llm: {{profile: {PROFILE}, max_num_seqs: 16, kv_tokens: 64000}}}}]"
    )
    with pytest.raises(ConfigError, match="in different times"):
        validate_run(run.folder, tmp_path / "out", [both])
