"""Parameters fitted to measured traces, shipped so that nothing has to be downloaded.

They are the files ``sage_bench/traces/synth_<name>.yaml``, written by ``tools/fit_synth.py`` with source, licence and
goodness of fit. No row of a trace is shipped.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any, Literal

import msgspec

from sage_bench.loads.arrivals import Modulated
from sage_bench.loads.lengths import Component, LognormalMixture
from sage_core.errors import ConfigError


class LengthFit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of a :class:`LognormalMixture`."""

    low: int
    high: int
    components: list[Component]


class ArrivalFit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of :class:`Modulated`."""

    cv: float
    rate_cv: float
    correlation_s: float
    step_s: float


class Fit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A parameter file: where it comes from, what was fitted, and how well."""

    name: str
    source: str
    commit: str
    license: str
    attribution: str
    trace_sha256: str
    rows: int
    goodness: dict[str, Any]
    rate: float | None = None
    arrivals: ArrivalFit | None = None
    prompt_tokens: LengthFit | None = None
    output_tokens: LengthFit | None = None


def fit_names() -> list[str]:
    """Names of the shipped fits."""
    files = resources.files("sage_bench.traces").iterdir()
    return sorted(
        file.name[len("synth_") : -len(".yaml")]
        for file in files
        if file.name.startswith("synth_") and file.name.endswith(".yaml")
    )


@functools.cache  # each run of a sweep asks for the same few
def load_fit(name: str) -> Fit:
    """The shipped fit called ``name``; ConfigError with the known names otherwise."""
    if name not in fit_names():
        raise ConfigError(f"fit: unknown fit {name!r}; expected one of {', '.join(fit_names())}")
    text = resources.files("sage_bench.traces").joinpath(f"synth_{name}.yaml").read_bytes()
    return msgspec.yaml.decode(text, type=Fit)


def fitted_lengths(
    fit: str, column: Literal["prompt_tokens", "output_tokens"] = "prompt_tokens", high: int | None = None
) -> LognormalMixture:
    """Lengths as in a fitted trace; ``high`` replaces the longest observed length as the upper end."""
    lengths = {"prompt_tokens": load_fit(fit).prompt_tokens, "output_tokens": load_fit(fit).output_tokens}.get(column)
    if lengths is None:
        raise ConfigError(f"fitted lengths: fit {fit!r} has no column {column!r}; expected one that it lists")
    return LognormalMixture(lengths.components, lengths.low, lengths.high if high is None else high)


def fitted_arrivals(fit: str) -> Modulated:
    """The arrival process of a fitted trace: its local burstiness and the wandering of its rate."""
    arrivals = load_fit(fit).arrivals
    if arrivals is None:
        raise ConfigError(
            f"fitted arrivals: fit {fit!r} has lengths only; expected one with arrivals, such as azure2023_conv"
        )
    return Modulated(arrivals.rate_cv, arrivals.correlation_s, arrivals.step_s, arrivals.cv)
