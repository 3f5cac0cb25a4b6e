"""Figures of a trace: known cases by hand, and the published table of the measured traces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sage_bench.traces.reader import Trace
from sage_bench.traces.statistics import fano, statistics
from sage_bench.traces.synth import synth_load, write_load
from sage_core.errors import ConfigError, OutputError

WriteTrace = Callable[..., Path]

# rows, duration s, mean rate, prompt p50, p95, output p50, p95, CV of gaps, Fano 10 s with the partial window at the end
# (None: three windows, where it depends on the origin of time)
MEASURED = {
    "trace_azure2023_conv": (19_366, 3501.7, 5.53, 1020, 4083, 129, 451, 1.094, 4.0),
    "trace_mooncake_synthetic": (3993, 1022.0, 3.907, 11587, 48904, 69, 519, 1.011, 1.37),
    "trace_ragpulse_embedding_derived": (5641, 604_603.0, 0.0093, 6, 16, 0, 0, 3.055, 1.05),
    "trace_ragpulse_week": (7106, 604_603.0, 0.0118, 3139, 4425, 234, 670, 3.061, 1.07),
    "trace_servegen_r1_resampled_2h": (221_465, 7200.0, 30.76, 278, 1989, 519, 1668, 1.272, 23.21),
    "trace_sharegpt_llama31_8b": (300, 29.1, 10.3, 731, 1748, 632, 773, 0.942, None),
    "trace_sharegpt_qwen3": (300, 29.1, 10.3, 728, 1813, 638, 814, 0.942, None),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_published_table_is_reproduced(name: str, measured: Path) -> None:
    rows, duration_s, rate, prompt_p50, prompt_p95, output_p50, output_p95, cv, fano_10s = MEASURED[name]
    found = statistics(measured / f"{name}.parquet")
    assert found.rows == rows
    assert found.duration_s == pytest.approx(duration_s, abs=0.06)
    assert found.rate_mean == pytest.approx(rate, rel=0.005)
    lengths = [found.lengths.prompt_tokens["p50"], found.lengths.prompt_tokens["p95"]]
    lengths += [found.lengths.output_tokens["p50"], found.lengths.output_tokens["p95"]]
    assert lengths == pytest.approx([prompt_p50, prompt_p95, output_p50, output_p95], abs=1)
    assert found.gap_cv == pytest.approx(cv, abs=0.0006)
    if fano_10s is not None:
        arrival_s = np.concatenate([part.arrival_s for part in Trace(measured / f"{name}.parquet").rows()])
        assert fano(arrival_s, 10.0, partial=True) == pytest.approx(fano_10s, rel=0.001, abs=0.006)
        assert found.fano_10s == fano(arrival_s, 10.0)


def test_figures_by_hand(write_trace: WriteTrace) -> None:
    kinds = ["chat", "chat", "embedding", "chat"]
    path = write_trace(arrival_s=[1.0, 2.0, 4.0, 31.0], kind=kinds, output_tokens=pa.array([10, 20, 0, 30], pa.int32()))
    found = statistics(path)
    assert (found.rows, found.duration_s) == (4, 30.0)
    assert found.rate_mean == pytest.approx(4 / 30)
    assert found.gap_cv == pytest.approx(np.std([1, 2, 27]) / 10)
    assert found.fano_10s == pytest.approx(np.var([3, 0, 0]) / 1.0)  # the window from 31 s is not complete
    assert fano(np.array([1.0, 2.0, 4.0, 30.0]), 10.0, partial=True) == pytest.approx(np.var([3, 0, 1]) / (4 / 3))
    assert found.rows_of == {"chat": 3, "embedding": 1}
    assert found.lengths_of["chat"].output_tokens["p50"] == 20
    assert found.lengths_of["embedding"].output_tokens["p99"] == 0
    assert found.with_prefix == 0


def test_undefined_figures_are_nan(write_trace: WriteTrace) -> None:
    found = statistics(write_trace(arrival_s=[1.0]))
    assert np.isnan([found.rate_mean, found.gap_cv, found.fano_10s]).all()
    assert np.isnan(fano(np.array([0.0, 5.0]), 10.0))


def test_synthetic_traces_look_like_the_measured_one(tmp_path: Path) -> None:
    path = tmp_path / "synth.parquet"
    assert write_load(path, synth_load(1, requests=100_000), {"seed": "1"}) == 100_000
    found = statistics(path)
    _, _, rate, prompt_p50, prompt_p95, output_p50, output_p95, cv, fano_10s = MEASURED["trace_azure2023_conv"]
    assert found.rate_mean == pytest.approx(rate, rel=0.03)
    assert found.lengths.prompt_tokens["p50"] == pytest.approx(prompt_p50, rel=0.01)
    assert found.lengths.prompt_tokens["p95"] == pytest.approx(prompt_p95, rel=0.01)
    assert found.lengths.output_tokens["p50"] == pytest.approx(output_p50, rel=0.02)
    assert found.lengths.output_tokens["p95"] == pytest.approx(output_p95, rel=0.02)
    assert found.gap_cv == pytest.approx(cv, rel=0.05)
    assert fano_10s is not None
    assert found.fano_10s == pytest.approx(fano_10s, rel=0.2)
    assert found.metadata == {"seed": "1"}


def test_synthetic_traces_are_reproducible_and_mixed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two", "other")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        write_load(path, synth_load(seed, duration_s=600, embedding_share=0.3), {})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != paths[2].read_bytes()
    found = statistics(paths[0])
    assert found.rows_of["embedding"] / found.rows == pytest.approx(0.3, abs=0.03)
    poisson = synth_load(1, rate=50.0, requests=50_000, poisson=True)
    write_load(tmp_path / "poisson", poisson, {})
    assert statistics(tmp_path / "poisson").fano_10s == pytest.approx(1.0, abs=0.3)
    with pytest.raises(OutputError, match="exists already"):
        write_load(paths[0], synth_load(1, requests=10), {})


def test_a_rate_is_needed_where_the_fit_has_none() -> None:
    with pytest.raises(ConfigError, match="rate: fit 'ragpulse_query' gives none"):
        synth_load(1, requests=1, fit="ragpulse_query")
    with pytest.raises(ConfigError, match="embedding_share"):
        synth_load(1, requests=1, embedding_share=1.0)
