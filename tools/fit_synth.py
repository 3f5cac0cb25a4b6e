"""Fit the built-in trace generators to measured traces and write their parameters with source and goodness of fit.

    python tools/fit_synth.py [--data ../shared/data] [--out sage_bench/traces] [--check]

Lengths: a mixture of lognormals by expectation-maximisation from quantile starts (deterministic), with the number of
components that has the least Bayesian information criterion. Arrivals: gamma gaps under a wandering rate, by matching
the Fano factor (variance / mean of counts) over windows from 1 s to 5 min; the finite length of the trace is part of
the matched formula. Goodness is measured on what the generator then draws, not on the fitted density. ``--check``
compares with the files that exist instead of writing.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import ks_2samp, spearmanr

from sage_bench.loads.arrivals import Modulated
from sage_bench.loads.lengths import Component, LognormalMixture
from sage_bench.traces.reader import Trace
from sage_bench.traces.statistics import fano
from sage_core.rng import Streams
from sage_core.units import SECOND

WINDOWS_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16)
SIGMA_MIN = 0.005  # fixed system prompts make spikes; below this a component would be a single length
DRAWS = 200_000
REPETITIONS = 40

AZURE = {
    "name": "azure2023_conv",
    "source": "Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_conv.csv",
    "commit": "b469a113cedca53ddc3bdea71a143dc4b7d8700c",
    "license": "CC-BY-4.0",
    "attribution": "Azure LLM inference trace 2023 (conversation), Microsoft; Patel et al., Splitwise, ISCA 2024. "
    "Parameters fitted to it; no row of it is included.",
}
RAGPULSE = {
    "name": "ragpulse_query",
    "source": "flashserve/RAGPulse, data/0_trace.jsonl: length of the user's question, one per request that retrieved a passage",
    "commit": "3672232d45d749fdcf45dbc38cc77e5264af4a32",
    "license": "MIT",
    "attribution": "RAGPulse, flashserve. That each request embeds its question once is our assumption. "
    "Parameters fitted to it; no row of it is included.",
}


def main() -> int:
    """Fit both generators; exit status 1 when ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("sage_bench/traces"))
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    fits = {
        "synth_azure2023_conv.yaml": fitted(args.data / "trace_azure2023_conv.parquet", AZURE, arrivals=True),
        "synth_ragpulse_query.yaml": fitted(
            args.data / "trace_ragpulse_embedding_derived.parquet", RAGPULSE, arrivals=False
        ),
    }
    stale = []
    for name, fit in fits.items():
        text = "# Written by tools/fit_synth.py; do not edit.\n" + yaml.safe_dump(
            fit, sort_keys=False, width=110, default_flow_style=None
        )
        path = args.out / name
        if not args.check:
            path.write_text(text)
        elif path.read_text() != text:
            stale.append(name)
    for name in stale:
        print(f"{name}: differs from what the data gives; run tools/fit_synth.py")
    return 1 if stale else 0


def fitted(path: Path, about: dict[str, str], *, arrivals: bool) -> dict[str, Any]:
    """Everything a parameter file says about one trace."""
    trace = Trace(path)
    rows = list(trace.rows())
    arrival_s = np.concatenate([part.arrival_s for part in rows])
    prompt = np.concatenate([part.prompt_tokens for part in rows])
    output = np.concatenate([part.output_tokens for part in rows])
    rate = (len(arrival_s) - 1) / float(arrival_s[-1] - arrival_s[0])
    fit: dict[str, Any] = {**about, "trace_sha256": trace.sha256(), "rows": len(arrival_s)}
    goodness: dict[str, Any] = {}
    if arrivals:
        fit["rate"] = _round(rate)
        fit["arrivals"] = fit_arrivals(arrival_s, rate)
        goodness["arrivals"] = arrival_goodness(arrival_s, rate, fit["arrivals"])
    for column, lengths in (("prompt_tokens", prompt), ("output_tokens", output)):
        if lengths.any():
            fit[column] = fit_lengths(lengths)
            goodness[column] = length_goodness(lengths, fit[column])
    if output.any():
        goodness["prompt_output_rank_correlation"] = {
            "trace": _round(float(spearmanr(prompt, output).statistic)),
            "synth": 0.0,
        }
    return {**fit, "goodness": goodness}


def fit_lengths(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Parameters of :class:`LognormalMixture`."""
    log = np.log(lengths.astype(np.float64))
    best: tuple[float, list[Component]] | None = None
    for k in COMPONENTS:
        likelihood, components = _expectation_maximisation(log, k)
        criterion = (3 * k - 1) * math.log(len(log)) - 2.0 * likelihood
        if best is None or criterion < best[0]:
            best = criterion, components
    assert best is not None
    return {"low": int(lengths.min()), "high": int(lengths.max()), "components": best[1]}


def _expectation_maximisation(log: NDArray[np.float64], k: int, rounds: int = 400) -> tuple[float, list[Component]]:
    # Whole tokens are spread evenly over their rounding interval, else short lengths are spikes to a density.
    values, counts = np.unique(np.rint(np.exp(log)), return_counts=True)
    x = np.log(values)
    width = np.log(values + 0.5) - np.log(np.maximum(values - 0.5, 0.5))
    mu = np.quantile(log, (np.arange(k) + 0.5) / k)
    sigma = np.full(k, max(float(log.std()) / k, 0.1))
    weight = np.full(k, 1.0 / k)
    likelihood = -math.inf
    for _ in range(rounds):
        z = (x[:, None] - mu) / sigma
        density = weight * np.exp(-0.5 * z**2) / (sigma * math.sqrt(2.0 * math.pi)) + 1e-300
        total = density.sum(axis=1)
        share = density / total[:, None] * counts[:, None]
        mass = np.maximum(share.sum(axis=0), 1e-9)
        mu = (share * x[:, None]).sum(axis=0) / mass
        spread = (share * ((x[:, None] - mu) ** 2 + (width[:, None] ** 2) / 12.0)).sum(axis=0) / mass
        sigma = np.maximum(np.sqrt(spread), SIGMA_MIN)
        weight = mass / mass.sum()
        now = float((counts * np.log(total)).sum())
        if abs(now - likelihood) < 1e-6 * abs(now):
            likelihood = now
            break
        likelihood = now
    order = np.argsort(mu)
    parts = [Component(weight=_round(weight[i]), median=_round(math.exp(mu[i])), sigma=_round(sigma[i])) for i in order]
    return likelihood, parts


def length_goodness(lengths: NDArray[np.int64], fit: dict[str, Any]) -> dict[str, Any]:
    """Kolmogorov-Smirnov distance and quantiles of a large sample from the generator against the trace."""
    drawn = LognormalMixture(**fit).tokens(Streams(1).stream("fit/lengths").random(DRAWS))
    at = (50, 95, 99)
    return {
        "ks_distance": _round(float(ks_2samp(lengths, drawn).statistic)),
        "mean": {"trace": _round(float(lengths.mean())), "synth": _round(float(drawn.mean()))},
        **{f"p{q}": {"trace": _round(np.percentile(lengths, q)), "synth": _round(np.percentile(drawn, q))} for q in at},
    }


def fit_arrivals(arrival_s: NDArray[np.float64], rate: float) -> dict[str, float]:
    """Parameters of :class:`Modulated`, from the Fano factors of the trace over ``WINDOWS_S``."""
    span_s = float(arrival_s[-1])
    seen = np.array([fano(arrival_s, window) for window in WINDOWS_S])

    def variance(window_s: Any, fast: float, rate_cv: float, correlation_s: float) -> Any:
        # Counts of a gamma process whose rate is an Ornstein-Uhlenbeck process; Cox and Isham, Point Processes, ch. 3.
        x = window_s / correlation_s
        return rate * window_s * fast + (rate * window_s * rate_cv) ** 2 * 2.0 * (x - 1.0 + np.exp(-x)) / x**2

    def residual(log_parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        fast, rate_cv, correlation_s = np.exp(log_parameters)
        windows = np.array(WINDOWS_S)
        whole = variance(span_s, fast, rate_cv, correlation_s)
        expected = variance(windows, fast, rate_cv, correlation_s) - whole * (windows / span_s) ** 2
        return np.asarray(np.log(expected / (rate * windows)) - np.log(seen))

    fast, rate_cv, correlation_s = np.exp(least_squares(residual, np.log([1.0, 0.2, 300.0])).x).tolist()
    return {
        "cv": _round(math.sqrt(fast)),
        "rate_cv": _round(rate_cv),
        "correlation_s": _round(correlation_s),
        "step_s": 10.0,
    }


def arrival_goodness(arrival_s: NDArray[np.float64], rate: float, fit: dict[str, float]) -> dict[str, Any]:
    """Gap CV and Fano factors of the trace against the mean and the 5-95 % range over generated traces as long."""
    span_s = float(arrival_s[-1])
    drawn: dict[str, list[float]] = {"gap_cv": [], **{f"fano_{window:g}s": [] for window in WINDOWS_S}}
    for seed in range(REPETITIONS):
        streams = Streams(seed)
        at: list[NDArray[np.float64]] = []
        for chunk in Modulated(**fit).instants(rate, streams.stream):
            at.append(chunk[chunk < span_s * SECOND] / SECOND)
            if len(at[-1]) < len(chunk):
                break
        times = np.concatenate(at)
        drawn["gap_cv"].append(_cv(times))
        for window in WINDOWS_S:
            drawn[f"fano_{window:g}s"].append(fano(times, window))
    seen = {"gap_cv": _cv(arrival_s), **{f"fano_{window:g}s": fano(arrival_s, window) for window in WINDOWS_S}}
    return {
        name: {
            "trace": _round(seen[name]),
            "synth": _round(float(np.mean(values))),
            "synth_p5_p95": [_round(np.percentile(values, 5)), _round(np.percentile(values, 95))],
        }
        for name, values in drawn.items()
    }


def _cv(times: NDArray[np.float64]) -> float:
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean())


def _round(value: Any) -> float:
    return float(f"{float(value):.5g}")


if __name__ == "__main__":
    sys.exit(main())
