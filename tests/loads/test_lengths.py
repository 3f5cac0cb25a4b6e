"""Length distributions: the law, the bounds, one uniform a length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import kstest, lognorm

from sage_bench.loads import Empirical, Fixed, Lognormal, LognormalMixture, Uniform, fitted_arrivals, fitted_lengths
from sage_bench.loads.fits import fit_names, load_fit
from sage_core.errors import ConfigError, DataError
from sage_core.rng import Streams

U = Streams(3).stream("lengths").random(100_000)
EDGES = np.array([0.0, 1.0 - 2.0**-53])


def test_fixed() -> None:
    assert np.unique(Fixed(512).tokens(U)).tolist() == [512]


def test_uniform_reaches_both_ends_equally() -> None:
    values, counts = np.unique(Uniform(3, 7).tokens(U), return_counts=True)
    assert values.tolist() == [3, 4, 5, 6, 7]
    assert counts / len(U) == pytest.approx([0.2] * 5, abs=0.01)
    assert Uniform(3, 7).tokens(EDGES).tolist() == [3, 7]


def test_lognormal_has_its_median_and_spread() -> None:
    drawn = Lognormal(5000, 0.5, high=1_000_000).tokens(U)
    # Rounding to whole tokens is a distance of 1e-4 at these lengths; the test's own resolution is 4e-3.
    assert kstest(drawn, lognorm(0.5, scale=5000).cdf).statistic < 0.005


def test_lognormal_is_conditioned_on_its_bounds_not_clipped() -> None:
    drawn = Lognormal(100, 1.0, low=50, high=200).tokens(U)
    assert drawn.min() == 50
    assert drawn.max() == 200
    assert np.mean(drawn == 200) < 0.01  # clipping would put a quarter of all lengths there
    assert Lognormal(100, 1.0, low=50, high=200).tokens(EDGES).tolist() == [50, 200]


def test_mixture_has_its_weights() -> None:
    mixture = LognormalMixture(
        [{"weight": 3.0, "median": 100, "sigma": 0.01}, {"weight": 1.0, "median": 10_000, "sigma": 0.01}]
    )
    drawn = mixture.tokens(U)
    assert np.mean(drawn < 1000) == pytest.approx(0.75, abs=0.005)
    assert np.median(drawn[drawn > 1000]) == pytest.approx(10_000, rel=0.01)


def test_empirical_repeats_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    columns = {
        "arrival_s": [0.0, 1.0, 2.0, 3.0],
        "prompt_tokens": pa.array([10, 20, 20, 7], pa.int32()),
        "output_tokens": pa.array([1, 2, 3, 0], pa.int32()),
        "kind": ["chat", "chat", "chat", "embedding"],
    }
    pq.write_table(pa.table(columns), path)
    values, counts = np.unique(Empirical(path, kind="chat").tokens(U), return_counts=True)
    assert values.tolist() == [10, 20]
    assert counts / len(U) == pytest.approx([1 / 3, 2 / 3], abs=0.01)
    assert Empirical(path).tokens(EDGES).tolist() == [7, 20]
    assert set(Empirical(path, "output_tokens", "chat").tokens(U).tolist()) == {1, 2, 3}
    with pytest.raises(DataError, match="output_tokens has no lengths of at least 1 token for kind embedding"):
        Empirical(path, "output_tokens", "embedding")
    with pytest.raises(ConfigError, match=r"lengths\.column"):
        Empirical(path, "arrival_s")
    with pytest.raises(ConfigError, match="kind: expected one of"):
        Empirical(path, kind="chats")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Fixed(0), "lengths.value"),
        (lambda: Fixed(1.5), "lengths.value"),  # type: ignore[arg-type]
        (lambda: Uniform(5, 4), "lengths.high"),
        (lambda: Lognormal(0, 1.0), "lengths.components.0..median"),
        (lambda: Lognormal(10, 0.0), "lengths.components.0..sigma"),
        (lambda: Lognormal(10, 0.1, low=1000, high=2000), "no mass"),
        (lambda: LognormalMixture([]), "at least one"),
    ],
)
def test_bad_arguments_name_the_key(make: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()  # type: ignore[operator]


def test_shipped_fits_say_where_they_come_from_and_how_good_they_are() -> None:
    assert fit_names() == ["azure2023_conv", "ragpulse_query"]
    for name in fit_names():
        fit = load_fit(name)
        assert fit.name == name
        assert fit.source
        assert fit.license
        assert fit.attribution
        assert len(fit.trace_sha256) == 64
        for column in ("prompt_tokens", "output_tokens"):
            if getattr(fit, column) is not None:
                assert fit.goodness[column]["ks_distance"] < 0.02
                drawn = fitted_lengths(name, column).tokens(U)
                assert drawn.mean() == pytest.approx(fit.goodness[column]["mean"]["trace"], rel=0.02)
    lively = load_fit("azure2023_conv").goodness["arrivals"]
    for figure, values in lively.items():
        low, high = values["synth_p5_p95"]
        assert low <= values["trace"] <= high, figure


def test_unknown_fits_and_columns_are_named() -> None:
    with pytest.raises(ConfigError, match="expected one of azure2023_conv, ragpulse_query"):
        fitted_lengths("azure")
    with pytest.raises(ConfigError, match="no column 'output_tokens'"):
        fitted_lengths("ragpulse_query", "output_tokens")
    with pytest.raises(ConfigError, match="lengths only"):
        fitted_arrivals("ragpulse_query")
