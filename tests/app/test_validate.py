"""`sage validate`: a measured run against its simulation, and every mistake a user can make with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sage_bench.results.reader import load_runs
from sage_bench.validate.fidelity import FIDELITY, REQUESTS, SERIES_FILE
from sage_sim.profile import PROFILES

PROFILE = "llama-3.1-8b-a100-tp1"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

Sage = Callable[..., Any]


def table(n: int = 40, **columns: Any) -> pa.Table:
    """A measured run of ``n`` requests at 8/s: 100 to 139 prompt tokens, 20 to 29 output tokens."""
    i = np.arange(n)
    queued = 0.125 * i + 0.01
    output = 20 + i % 10
    whole: dict[str, Any] = {
        "arrival_s": 0.125 * i,
        "queued_s": queued,
        "scheduled_s": queued + 0.01,
        "first_token_s": queued + 0.05,
        "last_token_s": queued + 0.05 + 0.02 * (output - 1),
        "prompt_tokens": pa.array(100 + i % 40, pa.int32()),
        "output_tokens": pa.array(output, pa.int32()),
        "max_num_seqs": np.full(n, 16),
        "kv_tokens": np.full(n, 4096),
    }
    whole |= columns
    return pa.table({name: column for name, column in whole.items() if column is not None})


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., Path]:
    """``measured(column=values)``: a file of :func:`table`; ``None`` drops the column."""

    def make(name: str = "measured", n: int = 40, **columns: Any) -> Path:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table(n, **columns), path)
        return path

    return make


@pytest.fixture
def fidelity(sage: Sage, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``fidelity(file, *options)``: what ``fidelity.json`` holds."""

    def call(file: Path, *options: object, profile: object = PROFILE) -> dict[str, Any]:
        done = sage(
            "validate", "--measured", file, "--profile", profile, "--out", tmp_path / "out", "--no-figures", *options
        )
        assert done.code == 0, done.err
        found: dict[str, Any] = json.loads((tmp_path / "out" / FIDELITY).read_bytes())
        return found

    return call


def simulated_as_measured(requests: Path, of: pa.Table) -> dict[str, Any]:
    """The instants of a simulation in the place of the measured ones."""
    rows = pq.read_table(requests)
    start = rows["start_s"].to_numpy()
    first = start + rows["simulated_ttft_s"].to_numpy()
    return {"scheduled_s": start, "first_token_s": first, "last_token_s": start + rows["simulated_e2e_s"].to_numpy()}


@pytest.mark.parametrize("arrivals", ["queued", "arrival"])
def test_a_simulation_validated_against_itself_has_no_error(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]], tmp_path: Path, arrivals: str
) -> None:
    queued = None if arrivals == "queued" else {"queued_s": table()["arrival_s"]}
    fidelity(measured(**(queued or {})), "--arrivals", arrivals)
    again = measured(**(queued or {}), **simulated_as_measured(tmp_path / "out" / REQUESTS, table()))
    found = fidelity(again, "--arrivals", arrivals)
    for name in ("ttft", "tpot", "e2e"):
        each = found["latencies"][name]
        assert each["by_request_mape_pct"] == pytest.approx(0, abs=1e-4), name
        assert [each[s]["error_pct"] for s in ("mean", "p50", "p95", "p99")] == pytest.approx([0] * 4, abs=1e-4)
    assert found["makespan_s"]["error_pct"] == pytest.approx(0, abs=1e-4)


def test_canary_a_slower_profile_is_seen(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A tenth more overhead in every iteration must show as positive errors of about its size."""
    fidelity(measured())
    again = measured(**simulated_as_measured(tmp_path / "out" / REQUESTS, table()))
    true = fidelity(again)["latencies"]["tpot"]["mean"]["simulated"]
    profile = yaml.safe_load((PROFILES / f"{PROFILE}.yaml").read_text())
    profile["time"]["overhead_us"] = profile["time"].get("overhead_us", 0.0) + 0.1 * true * 1e6
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(profile))
    found = fidelity(again, profile=tmp_path / "slow.yaml")["latencies"]
    assert 8 < found["tpot"]["mean"]["error_pct"] < 25
    assert found["e2e"]["mean"]["error_pct"] > 8 and found["ttft"]["mean"]["error_pct"] > 0


def test_rows_stay_with_their_requests(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Requests that reach the engine in another order than they were sent in: each row is compared with its own."""
    queued, arrival = table()["queued_s"].to_numpy().copy(), table()["arrival_s"].to_numpy().copy()
    queued[[3, 4, 5]] = queued[[5, 3, 4]]
    arrival[[4, 5]] = arrival[3]
    shift = {
        name: queued + after for name, after in (("scheduled_s", 0.01), ("first_token_s", 0.05), ("last_token_s", 0.9))
    }
    fidelity(measured(arrival_s=arrival, queued_s=queued, **shift))
    rows = pq.read_table(tmp_path / "out" / REQUESTS).to_pandas()
    assert rows["row"].tolist() == list(range(40))
    assert rows["request"].tolist()[3:6] == [5, 3, 4]
    run = load_runs(tmp_path / "out")[0].frame("requests").set_index("request").loc[rows["request"]]
    assert (run["input_tokens"].to_numpy() == rows["prompt_tokens"]).all()
    assert (run["output_tokens"].to_numpy() == rows["output_tokens"]).all()
    assert run["scheduled_ns"].to_numpy() / 1e9 == pytest.approx(rows["start_s"].to_numpy())
    assert rows["measured_e2e_s"].to_numpy() == pytest.approx(np.full(40, 0.9))


def test_the_clock_of_the_file_does_not_matter(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]]
) -> None:
    """A year of Unix time before the first request is neither simulated nor reported over."""
    near = fidelity(measured())
    epoch = {name: table()[name].to_numpy() + 1.7e9 for name in table().column_names if name.endswith("_s")}
    far = fidelity(measured("far", **epoch))
    for name in ("ttft", "tpot", "e2e"):
        assert far["latencies"][name]["mean"]["simulated"] == pytest.approx(
            near["latencies"][name]["mean"]["simulated"], rel=1e-4
        )
    assert far["cpu_s"] < 60


def series_table(ticks: int = 12, **columns: Any) -> pa.Table:
    whole = {
        "t": np.arange(1.0, ticks + 1),
        "running": np.full(ticks, 3),
        "waiting": np.zeros(ticks, int),
        "kv_cache_pct": np.full(ticks, 5.0),
    }
    whole |= columns
    return pa.table({name: column for name, column in whole.items() if column is not None})


@pytest.mark.parametrize("replicas", [1, 2])
def test_series_are_those_of_the_engine_at_the_ticks(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]], tmp_path: Path, replicas: int
) -> None:
    pq.write_table(series_table(), tmp_path / "series.parquet")
    found = fidelity(measured(), "--timeseries", tmp_path / "series.parquet", "--data-parallel", replicas)
    rows = pq.read_table(tmp_path / "out" / SERIES_FILE).to_pandas()
    assert rows["t_s"].tolist() == list(range(1, 13))
    requests = pq.read_table(tmp_path / "out" / REQUESTS).to_pandas()
    for _, tick in rows.iterrows():
        inside = (requests["start_s"] <= tick["t_s"]) & (
            requests["start_s"] + requests["simulated_e2e_s"] > tick["t_s"]
        )
        assert tick["simulated_running"] + tick["simulated_waiting"] == inside.sum(), tick
        assert 0 <= tick["simulated_kv_cache_pct"] <= 100
    assert rows["simulated_running"].max() > 0 and rows["simulated_kv_cache_pct"].max() > 0
    assert rows["simulated_running"].iloc[-1] == rows["simulated_kv_cache_pct"].iloc[-1] == 0  # the run is over
    difference = rows["simulated_running"] - rows["measured_running"]
    assert found["series"]["running"]["bias"] == pytest.approx(difference.mean())
    assert found["series"]["running"]["mean_abs_error"] == pytest.approx(difference.abs().mean())
    assert {run.manifest.digest for run in load_runs(tmp_path / "out")} == {found["digest"]}


def test_usage_that_may_be_a_share_is_told(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for usage, told in ((0.9, True), (1.1, False), (0.0, False)):
        pq.write_table(series_table(kv_cache_pct=np.full(12, usage)), tmp_path / "series.parquet")
        notes = fidelity(measured(), "--timeseries", tmp_path / "series.parquet")["warnings"]
        assert any("kv_cache_pct never exceeds 1" in note for note in notes) == told, usage


def test_one_tick_of_the_run_is_enough(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    pq.write_table(
        series_table(t=np.arange(12.0) - 11 + 0.01), tmp_path / "series.parquet"
    )  # the last one is the first start
    assert fidelity(measured(), "--timeseries", tmp_path / "series.parquet")["series"]["running"]["ticks"] == 12


def test_files_of_another_call_do_not_stay(sage: Sage, measured: Callable[..., Path], tmp_path: Path) -> None:
    pq.write_table(series_table(), tmp_path / "series.parquet")
    out, file = tmp_path / "out", measured()
    always = ("validate", "--measured", file, "--profile", PROFILE, "--out", out)

    def names() -> set[str]:
        return {path.name for path in out.iterdir()}

    assert sage(*always, "--timeseries", tmp_path / "series.parquet").code == 0
    (out / "notes.txt").write_text("not ours")
    assert {"fidelity_series.png", "fidelity_latency.pdf", SERIES_FILE} < names()
    assert sage(*always, "--no-figures").code == 0
    assert names() == {FIDELITY, REQUESTS, "run", "notes.txt"}
    assert sage(*always, "--kv-blocks", 2).code == 2
    assert names() == {"run", "notes.txt"}


def test_settings_of_the_file_are_the_defaults(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]]
) -> None:
    found = fidelity(measured(max_num_batched_tokens=np.full(40, 512), data_parallel=np.full(40, 2)))
    assert (found["replicas"], found["engine"]["max_num_seqs"], found["engine"]["kv_tokens"]) == (2, 16, 4096 - 16)
    assert found["engine"]["max_num_batched_tokens"] == 512
    assert found["warnings"] == ["prompts are taken to have nothing in common; --prefix-trace says what they share"]


def test_settings_are_needed_only_where_the_file_is_silent(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]]
) -> None:
    silent = measured(max_num_seqs=None, kv_tokens=pa.nulls(40, pa.int64()))
    found = fidelity(silent, "--max-num-seqs", 8, "--kv-blocks", 100, "--engine", "ingress_s=0.5")
    assert (found["engine"]["max_num_seqs"], found["engine"]["kv_tokens"]) == (8, 99 * 16)
    assert found["latencies"]["ttft"]["mean"]["simulated"] > 0.5


def test_a_single_token_has_no_tpot(measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]]) -> None:
    one = measured(output_tokens=pa.array([1] * 40, pa.int32()), last_token_s=table()["first_token_s"])
    assert set(fidelity(one)["latencies"]) == {"ttft", "e2e"}
    tokens = [1] * 39 + [2]
    assert fidelity(measured(output_tokens=pa.array(tokens, pa.int32())))["latencies"]["tpot"]["samples"] == 1


def test_the_urgent_are_served_first_where_the_engine_does_so(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    same = {name: np.full(40, value) for name, value in (("arrival_s", 0.0), ("queued_s", 0.0), ("scheduled_s", 0.0))}
    late = {"first_token_s": np.full(40, 1.0), "last_token_s": np.full(40, 9.0)}
    file = measured(priority=np.arange(40)[::-1], max_num_seqs=np.full(40, 4), **same, **late)
    ttft = {}
    for scheduling in ("fcfs", "priority"):
        fidelity(file, "--scheduling", scheduling)
        ttft[scheduling] = pq.read_table(tmp_path / "out" / REQUESTS)["simulated_ttft_s"].to_numpy()
    assert ttft["fcfs"][0] < ttft["fcfs"][-1]
    assert ttft["priority"][0] > ttft["priority"][-1]


def test_a_plain_router_keeps_no_queue(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """What waits must wait in the engine, where the measured engine kept it, not in the plane."""
    crowd = {name: np.full(40, 0.0) for name in ("arrival_s", "queued_s", "scheduled_s")}
    fidelity(measured(max_num_seqs=np.full(40, 2), **crowd))
    run = load_runs(tmp_path / "out")[0]
    assert run.frame("requests")["queue_ns"].max() == 0
    assert run.frame("replicas")["waiting"].max() > 30


def test_what_prompts_share_is_computed_once(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """With one long prompt for all, everybody but the first finds it in the cache."""
    trace = pa.table({"prompt_tokens": [640] * 40, "hash_ids": [list(range(40))] * 40})
    pq.write_table(trace.replace_schema_metadata({"hash_block_tokens": "16"}), tmp_path / "trace.parquet")
    file = measured(prompt_tokens=np.full(40, 640))
    without = fidelity(file, "--engine", "prefix_caching=false")
    alone = fidelity(file)
    shared = fidelity(file, "--prefix-trace", tmp_path / "trace.parquet")
    ttft = [each["latencies"]["ttft"]["mean"]["simulated"] for each in (without, alone, shared)]
    assert ttft[0] == ttft[1]
    assert ttft[2] < 0.8 * ttft[1]
    assert shared["prefix_trace"]["rows"] == 40 and alone["prefix_trace"] is None
    assert shared["warnings"] == without["warnings"] == []


def test_what_file_and_profile_disagree_on_is_told(
    measured: Callable[..., Path], fidelity: Callable[..., dict[str, Any]]
) -> None:
    labels = {"gpu": ["B200"] * 40, "model": ["meta-llama/Llama-3.1-8B"] * 40, "vllm_version": ["0.1.0"] * 40}
    told = "\n".join(fidelity(measured(**labels))["warnings"])
    assert "gpu B200" in told and "vLLM 0.1.0" in told and "with model" not in told


def test_tables_figures_and_exit_code(sage: Sage, measured: Callable[..., Path], tmp_path: Path) -> None:
    pq.write_table(series_table(), tmp_path / "series.parquet")
    arguments = (
        "validate",
        "--measured",
        measured(),
        "--profile",
        PROFILE,
        "--timeseries",
        tmp_path / "series.parquet",
    )
    done = sage(*arguments, "--fail-above", 10_000)
    assert done.code == 0, done.err
    for text in ("TTFT (s)", "TPOT (ms)", "E2E (s)", "p99 *", "fewer than 662 samples", "kv_cache_pct", "makespan"):
        assert text in done.out
    folder = tmp_path / "results" / "validate" / "measured"
    for name in ("latency", "series"):
        for suffix in ("pdf", "png"):
            assert (folder / f"fidelity_{name}.{suffix}").stat().st_size > 1000
    failed = sage(*arguments, "--fail-above", 0.001)
    assert failed.code == 9
    assert "mean E2E error is" in failed.err and "--fail-above" in failed.err
    assert "TTFT (s)" in failed.out


# --- mistakes ---------------------------------------------------------------------------------------------------------


def broken(column: str, row: int, value: Any) -> dict[str, Any]:
    """The column with one value changed."""
    values = table()[column].to_pylist()
    values[row] = value
    return {column: values}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"queued_s": None, "prompt_tokens": None}, "no column queued_s, prompt_tokens"),
        (broken("queued_s", 7, float("nan")), "row 7 (from 0), column queued_s: expected a finite number"),
        (broken("first_token_s", 7, None), "row 7 (from 0), column first_token_s: expected a finite number"),
        (broken("arrival_s", 7, -1.0), "row 7 (from 0), column arrival_s: expected no less than the row before"),
        (broken("queued_s", 3, 0.3), "row 3 (from 0), column queued_s: expected no less than arrival_s"),
        (
            {"arrival_s": [30.0 + i for i in range(40)]},
            "row 0 (from 0), column queued_s: expected no less than arrival_s",
        ),
        (
            {"prompt_tokens": [2**53 + 1] * 40},
            "row 0 (from 0), column prompt_tokens: expected a whole number from 1 to 2147483647, found 9.00719925e+15",
        ),
        ({"priority": [0] * 3 + [2**63 - 1] * 37}, "row 3 (from 0), column priority: expected a whole number from 0"),
        (broken("queued_s", 3, 4.0), "row 3 (from 0), column scheduled_s: expected no less than queued_s"),
        (broken("last_token_s", 3, 0.1), "row 3 (from 0), column last_token_s: expected no less than first_token_s"),
        (
            broken("output_tokens", 5, 0),
            "row 5 (from 0), column output_tokens: expected a whole number from 1 to 2147483647, found 0",
        ),
        (broken("prompt_tokens", 5, -3), "row 5 (from 0), column prompt_tokens"),
        ({"prompt_tokens": ["many"] * 40}, "column prompt_tokens: expected numbers"),
        (
            {"prompt_tokens": [1.5] * 40},
            "row 0 (from 0), column prompt_tokens: expected a whole number from 1 to 2147483647, found 1.5",
        ),
        (broken("max_num_seqs", 9, 17), "row 9 (from 0), column max_num_seqs: expected 16 as in row 0"),
        ({"ttft_ms": [49.9 + i for i in range(40)]}, "row 2 (from 0), column ttft_ms"),
        (broken("last_token_s", 39, 1e9), "expected at most 2,592,000 s"),
    ],
)
def test_broken_files_name_the_row(
    sage: Sage, measured: Callable[..., Path], columns: dict[str, Any], told: str
) -> None:
    file = measured(**columns)
    done = sage("validate", "--measured", file, "--profile", PROFILE)
    assert done.code == 3, done.out
    assert told in done.err and str(file) in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"t": None}, "no column t"),
        ({"t": [1.0, 3.0, 2.0, *range(4, 13)]}, "row 2 (from 0), column t"),
        ({"kv_cache_pct": [101.0] * 12}, "row 0 (from 0), column kv_cache_pct: expected 0 to 100"),
        ({"waiting": [-1] * 12}, "row 0 (from 0), column waiting"),
        ({"t": np.arange(1e6, 1e6 + 12)}, "column t: expected instants of the run, from 0.01 to"),
        ({"t": np.arange(-12.0, 0.0)}, "found -12 to -1; give both files the same clock"),
    ],
)
def test_broken_series_name_the_row(
    sage: Sage, measured: Callable[..., Path], tmp_path: Path, columns: dict[str, Any], told: str
) -> None:
    pq.write_table(series_table(**columns), tmp_path / "series.parquet")
    done = sage("validate", "--measured", measured(), "--profile", PROFILE, "--timeseries", tmp_path / "series.parquet")
    assert done.code == 3 and told in done.err and "series.parquet" in done.err


def test_files_that_are_not_there_or_not_parquet(sage: Sage, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("arrival_s\n0.0\n")
    pq.write_table(table(0), tmp_path / "empty.parquet")
    for name, told in (
        ("nowhere.parquet", "no such file"),
        ("text.parquet", "as Parquet"),
        ("empty.parquet", "no rows"),
    ):
        done = sage("validate", "--measured", tmp_path / name, "--profile", PROFILE)
        assert done.code == 3 and told in done.err and name in done.err


@pytest.mark.parametrize(
    ("columns", "options", "told"),
    [
        ({}, ["--profile", "llama-9000"], "no shipped profile is called 'llama-9000'"),
        ({}, ["--profile", "bge-large-en-v1.5-h100"], "is of kind embedding"),
        ({}, ["--max-num-seqs", 32], "--max-num-seqs: 32 was given, but"),
        ({}, ["--kv-blocks", 2], "--kv-blocks: 2 was given, but"),
        ({"kv_tokens": None}, [], "--kv-blocks: needed"),
        ({"kv_tokens": None}, ["--kv-blocks", 0], "--kv-blocks: expected at least 1"),
        ({"kv_tokens": None}, ["--kv-blocks", 1], "the 0 blocks of 16"),
        ({"kv_tokens": None}, ["--kv-blocks", 8], "40 of 40 rows do not fit"),
        ({"kv_tokens": None}, ["--kv-blocks", 10], "row 18 (from 0)"),
        ({"max_num_seqs": None}, [], "--max-num-seqs: needed"),
        ({"tensor_parallel": np.full(40, 4)}, [], "tensor_parallel 4"),
        ({}, ["--scheduling", "priority"], "needs a column priority"),
        (
            {},
            ["--prefix-trace", "t.parquet", "--engine", "prefix_caching=false"],
            "--prefix-trace: needs the prefix cache",
        ),
        ({}, ["--engine", "ingress_s"], "expected KEY=VALUE"),
        ({}, ["--engine", "kv_tokens=5"], "kv_tokens has an option of its own"),
        ({}, ["--engine", "ingres_s=5"], "did you mean 'ingress_s'"),
        ({}, ["--block-size", 0], "--block-size: expected at least 1"),
        ({}, ["--data-parallel", -1], "--data-parallel: expected at least 1"),
        ({}, ["--fail-above", -1], "--fail-above: expected per cent from 0"),
    ],
)
def test_wrong_settings_name_the_option(
    sage: Sage, measured: Callable[..., Path], columns: dict[str, Any], options: list[Any], told: str
) -> None:
    profile = [] if "--profile" in options else ["--profile", PROFILE]
    done = sage("validate", "--measured", measured(**columns), *profile, *options)
    assert done.code == 2, done.out
    assert told in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("queued_s", None, "cannot be read as Parquet (Multiple matches for FieldRef.Name(queued_s)"),
        ("gpu", [["a"]] * 40, "column gpu: expected one label a row, found list<"),
    ],
)
def test_columns_that_no_row_can_answer_for(
    sage: Sage, measured: Callable[..., Path], column: str, values: list[Any] | None, says: str
) -> None:
    path = measured()
    table = pq.read_table(path)
    pq.write_table(table.append_column(column, table[column] if values is None else pa.array(values)), path)
    done = sage("validate", "--measured", path, "--profile", "llama-3.1-8b-rtx4090-tp1", "--no-figures")
    assert done.code == 3
    assert says in done.err


# --- the measured run of the shared data ------------------------------------------------------------------------------


@pytest.mark.skipif(
    not DATA.is_dir(), reason="needs the measured data of ../shared/data, which is not part of the project"
)
def test_the_measured_rtx4090_run(sage: Sage, tmp_path: Path) -> None:
    done = sage(
        "validate", "--measured", DATA / "e2e_vllm_requests_rtx4090.parquet", "--profile", "llama-3.1-8b-rtx4090-tp1",
        "--max-num-seqs", 256, "--kv-blocks", 2588, "--timeseries", DATA / "e2e_vllm_timeseries_rtx4090.parquet",
        "--prefix-trace", DATA / "trace_sharegpt_llama31_8b.parquet", "--out", tmp_path / "out", "--no-figures",
        "--fail-above", 2,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / FIDELITY).read_bytes())
    assert found["latencies"]["ttft"]["mean"]["measured"] == pytest.approx(65.4566, abs=1e-4)
    assert found["latencies"]["e2e"]["mean"]["measured"] == pytest.approx(86.5783, abs=1e-4)
    errors = {
        (name, s): found["latencies"][name][s]["error_pct"] for name in ("ttft", "tpot", "e2e") for s in ("mean", "p95")
    }
    assert abs(errors["tpot", "mean"]) <= 2 and abs(errors["ttft", "mean"]) <= 5
    assert abs(errors["ttft", "p95"]) <= 8 and abs(errors["e2e", "p95"]) <= 8
