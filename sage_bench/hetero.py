"""Where embeddings are cheapest: the same requests on clusters that embed on different hardware, over the rate of documents.

Chat comes at one rate throughout, and in a seed it is the same request by request (``conf/load/pipeline/hetero.yaml``). What
is compared is the price, and the energy, of a thousand *good* requests: an arm that answers late, or only after a long queue,
does not become cheap by it. Where the cheaper of two arms changes between two rates of the sweep, rates between them are
simulated too, and the crossover is interpolated, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sage_bench.config import composed
from sage_bench.metrics.measure import ALL, measure
from sage_bench.metrics.statistics import t_interval
from sage_bench.results.reader import Run
from sage_bench.run import run
from sage_core.errors import ConfigError

ARMS: Final = ("shared", "gpu", "mixed", "cpu")
"""The choices ``cluster=hetero_ARM``."""

RATES: Final = (5.0, 10.0, 20.0, 30.0, 40.0, 80.0, 120.0, 160.0, 240.0)
"""Documents a second."""

CHAT_RPS: Final = 12.0
SEEDS: Final = 5
REFINEMENTS: Final = 3
"""How often the stretch with a crossover in it is halved (its logarithm is)."""

SERVED_MIN: Final = 0.5
"""SLO attainment of documents below which an arm is no choice: that it is the cheaper of two such arms says nothing."""

EXPENSES: Final = ("cost", "energy")
"""Columns by which arms are compared, per 1,000 good requests: USD and joules."""

COLUMNS: Final = {
    "slo_chat": ("slo_attainment", "chat"),
    "slo_embedding": ("slo_attainment", "embedding"),
    "ttft_ns_p95": ("ttft_ns_p95", "chat"),
    "tpot_ns_p95": ("tpot_ns_p95", "chat"),
    "embedding_ns_p50": ("e2e_ns_p50", "embedding"),
    "embedding_ns_p95": ("e2e_ns_p95", "embedding"),
    "throughput_rps": ("throughput_rps", ALL),
    "goodput_rps": ("goodput_rps", ALL),
    "cost_per_1k": ("cost_per_1k", ALL),
    "energy_j_per_1k": ("energy_j_per_1k", ALL),
}
"""Columns of a point: (metric, kind) of ``metrics.measure``."""


class Asked(NamedTuple):
    """One simulation."""

    arm: str
    rate: float
    seed: int
    chat_rps: float
    results: str
    overrides: tuple[str, ...] = ()


class Crossing(msgspec.Struct, frozen=True):
    """Above ``rate`` (documents a second) ``above`` is the cheaper arm, below it ``below`` is.

    low, high: 95 % interval of the crossovers of single seeds, null below two. between: the rates that were simulated on either
    side. seeds: in how many the order changes so, out of how many.
    """

    expense: str
    below: str
    above: str
    rate: float
    low: float | None
    high: float | None
    between: tuple[float, float]
    seeds: tuple[int, int]


class Hetero(NamedTuple):
    """points: a row for each simulation: arm, rate, seed, the :data:`COLUMNS` and the :data:`EXPENSES`. notes: warnings of runs."""

    points: pd.DataFrame
    crossings: list[Crossing]
    notes: list[str]

    def means(self) -> pd.DataFrame:
        """Over seeds, by arm and rate, in the order of the arms."""
        frame: pd.DataFrame = self.points.drop(columns="seed").groupby(["rate", "arm"], as_index=False).mean()
        return frame.sort_values(["rate", "arm"], key=lambda of: of.map(ARMS.index) if of.name == "arm" else of)


def hetero(
    results: Path,
    *,
    arms: Sequence[str] = ARMS,
    rates: Sequence[float] = RATES,
    seeds: int = SEEDS,
    chat_rps: float = CHAT_RPS,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    told: Callable[[str], None] = lambda _: None,
) -> Hetero:
    """Simulate every arm at every rate; runs go to ``results/hetero`` like any other. told: of what is being done.

    Raises SageError.
    """
    arms, rates = _checked(arms, rates, seeds, chat_rps)
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}

    def simulate(wanted: Iterable[tuple[str, float]], why: str) -> None:
        have = {(row["arm"], row["rate"]) for row in rows}
        new = [
            Asked(arm, rate, seed, chat_rps, str(results), tuple(overrides))
            for arm, rate in dict.fromkeys(wanted)
            if (arm, rate) not in have
            for seed in range(1, seeds + 1)
        ]
        if new:
            told(f"{why}: {len(new)} simulations")
        for row, warnings in _simulated(new, jobs):
            rows.append(row)
            for warning in warnings:  # one of each kind: how far beyond a profile differs from run to run
                notes.setdefault(warning.partition(" = ")[0], warning)

    simulate([(arm, rate) for rate in rates for arm in arms], "sweep")
    for step in range(REFINEMENTS):
        points = pd.DataFrame(rows)
        wanted = [
            (arm, float(f"{math.sqrt(math.prod(each.between)):.3g}"))
            for each in crossings(points)
            for arm in (arms[0], each.below, each.above)  # the first too: figures hold the others against it
        ]
        simulate(wanted, f"between rates where the cheaper arm changes, {step + 1} of {REFINEMENTS}")
    points = pd.DataFrame(rows).sort_values(["rate", "arm", "seed"], ignore_index=True)
    return Hetero(points, crossings(points), list(notes.values()))


def crossings(points: pd.DataFrame) -> list[Crossing]:
    """Every change of the cheaper of two arms to one that serves :data:`SERVED_MIN` of the documents well, for both expenses."""
    found = []
    served = points.pivot_table(index="rate", columns="arm", values="slo_embedding")
    for expense in EXPENSES:
        # (rate x seed) by arm; an arm that was not simulated at a rate is NaN there
        table = points.pivot_table(index="rate", columns=["arm", "seed"], values=expense)
        for one, other in combinations([arm for arm in ARMS if arm in set(points["arm"])], 2):
            ratio = (pd.DataFrame(table[one]) / pd.DataFrame(table[other])).dropna().map(math.log)
            found += [
                each
                for each in _changes(expense, one, other, ratio)
                if served.loc[list(each.between), each.above].max() >= SERVED_MIN
            ]
    return sorted(found, key=lambda each: (each.expense, each.rate))


def _changes(expense: str, one: str, other: str, ratio: pd.DataFrame) -> list[Crossing]:
    """ratio: log of the expense of ``one`` over that of ``other``, (rates, seeds). A crossover is where the mean over seeds changes
    its sign; a seed's own is its nearest change of that direction."""
    rates, values = ratio.index.to_numpy(np.float64), ratio.to_numpy(np.float64)
    found = []
    for at, rising, i in _signs(rates, values.mean(axis=1)):
        below, above = (one, other) if rising else (other, one)
        own = [[rate for rate, up, _ in _signs(rates, column) if up == rising] for column in values.T]
        nearest = [min(each, key=lambda rate: abs(math.log(rate / at))) for each in own if each]
        interval = t_interval([math.log(rate) for rate in nearest])  # of rates' logarithms: no rate is below zero
        low, high = (math.exp(end) if interval.n > 1 else None for end in (interval.low, interval.high))
        found.append(
            Crossing(
                expense, below, above, at, low, high,
                (float(rates[i]), float(rates[i + 1])), (len(nearest), len(own)),
            )
        )  # fmt: skip
    return found


def _signs(rates: NDArray[np.float64], values: NDArray[np.float64]) -> list[tuple[float, bool, int]]:
    """Where ``values`` change their sign: (rate, linearly between the two beside it; whether they rise; the index below)."""
    found = []
    for i in range(len(rates) - 1):
        if values[i] * values[i + 1] < 0:
            share = values[i] / (values[i] - values[i + 1])
            found.append((float(rates[i] + share * (rates[i + 1] - rates[i])), bool(values[i] < 0), i))
    return found


def facts(found: Hetero, chat_rps: float, seeds: int) -> dict[str, Any]:
    """What ``hetero.json`` holds."""
    means = found.means().to_dict("records")
    return {"chat_rps": chat_rps, "seeds": seeds, "crossings": found.crossings, "means": means}


def simulated(asked: Asked) -> tuple[dict[str, Any], list[str]]:
    """One point, and what the run warned of."""
    rate = asked.chat_rps + asked.rate
    result = run(
        composed(
            [
                "experiment=hetero",
                f"cluster=hetero_{asked.arm}",
                f"seed={asked.seed}",
                f"results={asked.results}",
                f"load.rate={rate!r}",
                f"load.classes.document.share={asked.rate / rate!r}",
                "record.steps=false",
                *asked.overrides,
            ]
        )
    )
    if result.interrupted:
        raise KeyboardInterrupt
    return point(Run(result.folder), asked.arm, asked.rate, asked.seed), result.warnings


def point(run: Run, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """What :class:`Hetero` has of a run. rate: of documents, a second."""
    table = measure(run)
    whole = table[(table["tenant"] == ALL) & (table["priority"] == ALL)].set_index("kind")
    row: dict[str, Any] = {"arm": arm, "rate": rate, "seed": seed}
    for column, (metric, kind) in COLUMNS.items():
        row[column] = float(whole[metric].get(kind, math.nan))
    offered, responded, attainment = (float(whole[name][ALL]) for name in ("offered", "responded", "slo_attainment"))
    good = offered * attainment
    for expense, metric in zip(EXPENSES, ("cost_per_1k", "energy_j_per_1k"), strict=True):
        row[expense] = row[metric] * responded / good if good else math.inf
    return row


def _simulated(asked: Sequence[Asked], jobs: int) -> list[tuple[dict[str, Any], list[str]]]:
    if jobs == 1 or len(asked) < 2:
        return [simulated(each) for each in asked]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(simulated, asked))


def _checked(
    arms: Sequence[str], rates: Sequence[float], seeds: int, chat_rps: float
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or len(set(arms)) < 2:
        raise ConfigError(f"arms: expected two or more of {', '.join(ARMS)}, got {', '.join(arms) or 'none'}")
    for name, value in (*(("rates", rate) for rate in rates), ("chat", chat_rps)):
        if not (math.isfinite(value) and 0 < value <= 1e6):
            raise ConfigError(f"{name}: expected requests a second above 0, got {value:g}")
    if not rates:
        raise ConfigError("rates: expected at least one")
    if seeds < 1:
        raise ConfigError(f"seeds: expected 1 or more, got {seeds}")
    return tuple(dict.fromkeys(arms)), tuple(sorted(set(rates)))
