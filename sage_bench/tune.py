"""Searching a policy's parameters, and what the search is worth on requests it has not seen.

Every trial runs the same seeds (common random numbers), so trials differ by their parameters and not by their luck. The best of
many trials flatters itself all the same: it is the best *on those seeds*. So it is run again on others, beside the defaults, and
the verdict is of the paired differences there. Optuna's own interface is used; its plugin for Hydra needs a version before 3.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import pandas as pd

from sage_bench.config import FolderName, RunConfig, checked, composed
from sage_bench.metrics.compare import COMPARED
from sage_bench.metrics.definitions import METRICS
from sage_bench.metrics.measure import ALL, measure
from sage_bench.metrics.statistics import Interval, Verdict, holm, paired, verdict
from sage_bench.results.manifest import file_fact
from sage_bench.results.reader import Run
from sage_bench.results.writer import output_error
from sage_bench.run import config_digest, planned, run_planned
from sage_bench.sweep.resume import found, held
from sage_bench.sweep.sources import sources_digest
from sage_bench.sweep.workers import begin_worker
from sage_core.errors import ConfigError

if TYPE_CHECKING:
    import optuna

SEED_TUNED: Final = 1001
SEED_TESTED: Final = 2001
"""First seeds of the two sets; experiments have small ones, so that neither is theirs."""

STORAGE: Final = "study.db"
LIBRARY: Final = "sage_bench.conf"

Value = bool | int | float | str


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a parameter may lie: between low and high, evenly or (log) by orders of magnitude; or one of choices."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise ValueError("Expected low and high, or choices")
        if self.low is not None and self.high is not None and (self.low >= self.high or (self.log and self.low <= 0)):
            raise ValueError(f"Expected {'0 < ' if self.log else ''}low < high, got {self.low:g} and {self.high:g}")

    def holds(self, value: Any) -> bool:
        """Whether the search may come upon ``value``."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high  # type: ignore[operator]

    def distribution(self, default: Value) -> optuna.distributions.BaseDistribution:
        """As Optuna has it. default: of the parameter; whole bounds do not make a parameter whole that is not."""
        of = _optuna().distributions
        if self.choices:
            return of.CategoricalDistribution(self.choices)  # type: ignore[no-any-return]
        if all(isinstance(each, int) for each in (self.low, self.high, default)):
            return of.IntDistribution(self.low, self.high, log=self.log)  # type: ignore[no-any-return]
        return of.FloatDistribution(self.low, self.high, log=self.log)  # type: ignore[no-any-return]


class Space(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is searched: the ranges of parameters of a policy (a choice below ``conf/policy``)."""

    policy: str
    space: Annotated[dict[str, Range], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class Task:
    """A search. overrides: of the configuration that is run, as for ``sage run``. metric, kind: of ``metrics.measure``, what
    is to get better. trials: in all, the defaults being the first."""

    space: Space
    overrides: tuple[str, ...]
    metric: str = "goodput_rps"
    kind: str = ALL
    trials: int = 40
    seeds: int = 3
    test_seeds: int = 5
    jobs: int = 1


@dataclass(frozen=True, slots=True)
class Compared:
    """A metric of the best parameters beside the defaults, on seeds that the search has not seen."""

    metric: str
    kind: str
    default: float
    tuned: float
    difference: Interval
    p: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Tuned:
    """history: a row for each trial. best: parameters of the best, to three digits; ``default`` if those are the defaults. values: what the
    defaults and the best gave on the seeds they were tuned on. compared: the metric that was tuned first; empty where nothing
    was better than the defaults."""

    folder: Path
    history: pd.DataFrame
    best: dict[str, Value]
    default: bool
    values: tuple[float, float]
    compared: list[Compared]

    def overrides(self, space: Space) -> list[str]:
        """What ``sage run`` takes to use the best."""
        return [f"policy={space.policy}", *_parameters(self.best)]


def read_space(name: str) -> Space:
    """A search space of SAGE by name, or a YAML file. Raises ConfigError, which names the file and the key."""
    file: Any = Path(name)
    if not file.suffix:
        shipped = importlib.resources.files(LIBRARY).joinpath("tune")
        file = shipped.joinpath(f"{name}.yaml")
        if not file.is_file():
            known = sorted(each.name.removesuffix(".yaml") for each in shipped.iterdir())
            raise ConfigError(f"tune: no search space {name!r}; expected one of {', '.join(known)}, or a YAML file")
    try:
        return msgspec.yaml.decode(file.read_bytes(), type=Space)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read: {error.strerror}; expected a search space (see conf/tune)"
        ) from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{file}: {str(error)[0].lower()}{str(error)[1:]}; see conf/tune/hybrid.yaml") from error


def tune(task: Task, results: Path, name: str, tell: Callable[[str], None]) -> Tuned:
    """Search, then compare; files go to ``results/name``. What an interrupted search has done is not done again, as long as
    task, configuration, data and code are the same. A second search in the same folder waits for the first. tell: of each trial. Raises SageError."""
    if task.metric not in METRICS or METRICS[task.metric].better is None:
        known = ", ".join(each.name for each in METRICS.values() if each.better)
        raise ConfigError(f"--metric: expected a metric that has a better side ({known}), got {task.metric!r}")
    base = [*task.overrides, f"policy={task.space.policy}"]
    config, plain = checked(composed(base))
    defaults = _defaults(task.space, config.policy)
    folder = results / msgspec.convert(name, FolderName)
    try:
        with (
            held(folder),
            tempfile.TemporaryDirectory(prefix=".trials-", dir=folder) as scratch,
            _pool(task.jobs) as pool,
        ):
            study = _study(task, folder, _inputs(config, plain), tell)
            _search(task, study, defaults, [*base, f"results={scratch}"], pool, tell)
            history = _history(study, task)
            history.to_parquet(folder / "trials.parquet", index=False)
            history.to_csv(folder / "trials.csv", index=False)
            first, best = _default_trial(study, defaults), study.best_trial
            changed = best.params != defaults
            parameters = _rounded(best.params) if changed else defaults
            overrides = [*base, f"results={results}", f"name={folder.name}"]
            compared = _compared(task, overrides, parameters, pool, tell) if changed else []
    except OSError as error:
        raise output_error(folder, error) from error
    assert first is not None and first.value is not None and best.value is not None
    return Tuned(folder, history, parameters, not changed, (first.value, best.value), compared)


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("sage tune needs Optuna: pip install 'optuna>=4'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _defaults(space: Space, policy: Mapping[str, Any]) -> dict[str, Value]:
    """What the policy's parameters are if nobody tunes them. ConfigError where the search could not come upon them."""
    for key, allowed in space.space.items():
        if key not in policy:
            known = ", ".join(each for each in policy if not each.startswith("_") and each not in ("name", "predict"))
            raise ConfigError(f"tune: policy {space.policy} has no parameter {key!r}; it has {known}")
        if not allowed.holds(policy[key]):
            raise ConfigError(f"tune: space.{key} leaves out the default, {policy[key]!r}; the search starts there")
    return {key: policy[key] for key in space.space}


def _inputs(config: RunConfig, plain: dict[str, Any]) -> tuple[str, ...]:
    """Digests of what a trial is made of: configuration, code, and the files it reads. Profiles by name are part of the code."""
    parts = planned(config, plain).parts
    profiles = [name for name in parts.profiles if name.endswith((".yaml", ".yml"))]
    files = [*profiles, *getattr(parts.load, "files", list)()]
    return (config_digest(plain), sources_digest(plain), *(file_fact(Path(file)).sha256 for file in files))


def _study(task: Task, folder: Path, inputs: tuple[str, ...], tell: Callable[[str], None]) -> optuna.Study:
    """The search so far. Its name has everything that trials depend on, so none is taken for what it is not."""
    told = msgspec.json.encode((task.space, task.overrides, task.metric, task.kind, task.seeds, inputs), order="sorted")
    better = METRICS[task.metric].better
    storage = f"sqlite:///{(folder / STORAGE).absolute()}"
    study: optuna.Study = _optuna().create_study(
        study_name=hashlib.sha256(told).hexdigest()[:16],
        storage=storage,
        direction="maximize" if better == "higher" else "minimize",
        load_if_exists=True,
    )
    state = _optuna().trial.TrialState
    for each in study.get_trials(deepcopy=False, states=(state.RUNNING,)):  # of a search that was killed
        study.tell(each.number, state=state.FAIL)
    if done := len(_complete(study)):
        tell(f"{done} trials are there already")
    elif len(_optuna().get_all_study_names(storage)) > 1:
        tell(f"{folder / STORAGE} has trials of another task, configuration, data or code, which do not count")
    return study


def _search(
    task: Task,
    study: optuna.Study,
    defaults: dict[str, Value],
    overrides: Sequence[str],
    pool: ProcessPoolExecutor,
    tell: Callable[[str], None],
) -> None:
    distributions = {key: each.distribution(defaults[key]) for key, each in task.space.space.items()}
    started, before = time.monotonic(), len(_complete(study))
    metric = METRICS[task.metric]
    while (done := len(_complete(study))) < task.trials:
        if _default_trial(study, defaults) is None:
            study.enqueue_trial(defaults, skip_if_exists=False)
        # By the number of trials, so that an interrupted search comes to what an uninterrupted one does.
        study.sampler = _optuna().samplers.TPESampler(seed=done)
        trial = study.ask(distributions)
        words = [*overrides, *_parameters(trial.params), "record.tasks=false", "record.steps=false"]
        seeds = range(SEED_TUNED, SEED_TUNED + task.seeds)
        jobs = [pool.submit(_measured, [*words, f"seed={seed}"], task.metric, task.kind) for seed in seeds]
        try:
            values = [job.result() for job in jobs]
        except BaseException:
            study.tell(trial, state=_optuna().trial.TrialState.FAIL)
            raise
        trial.set_user_attr("values", values)
        study.tell(trial, sum(values) / len(values))
        left = (task.trials - done - 1) * (time.monotonic() - started) / (done + 1 - before)
        value, best = trial.study.trials[trial.number].value, study.best_trial
        assert value is not None and best.value is not None
        tell(
            f"trial {done + 1} of {task.trials}: {metric.label} {value / metric.scale:.4g} {metric.unit}; best "
            f"{best.value / metric.scale:.4g}; about {left:.0f} s left"
        )


def _compared(
    task: Task,
    overrides: Sequence[str],
    best: Mapping[str, Value],
    pool: ProcessPoolExecutor,
    tell: Callable[[str], None],
) -> list[Compared]:
    """Defaults and best on seeds of their own. The metric that was tuned is one question; the others are held against
    chance together."""
    tell(f"comparing the best with the defaults on {task.test_seeds} other seeds")
    seeds = range(SEED_TESTED, SEED_TESTED + task.test_seeds)
    arms = [[*overrides, *parameters, f"seed={seed}"] for parameters in ([], _parameters(best)) for seed in seeds]
    frames = [measure(Run(Path(folder))) for folder in pool.map(_run_kept, arms)]
    asked = [(task.metric, task.kind), *(each for each in COMPARED if each != (task.metric, task.kind))]
    rows = []
    for metric, kind in asked:
        values = [_value(frame, metric, kind) for frame in frames]
        default, tuned = values[: task.test_seeds], values[task.test_seeds :]
        if any(value == value for value in default):  # a kind of request that the load has
            rows.append((metric, kind, default, tuned, paired(default, tuned)))
    adjusted = [rows[0][4].p, *holm([row[4].p for row in rows[1:]])]
    found = []
    for (metric, kind, default, tuned, result), p in zip(rows, adjusted, strict=True):
        better = METRICS[metric].better
        assert better is not None
        means = float(pd.Series(default).mean()), float(pd.Series(tuned).mean())
        found.append(Compared(metric, kind, *means, result.difference, p, verdict(result.difference.mean, p, better)))
    return found


def _measured(overrides: list[str], metric: str, kind: str) -> float:
    """One run of a trial, in a worker: its rows are not kept, because its overrides and the code give them again."""
    result = run_planned(planned(*checked(composed(overrides))), overrides)
    if result.interrupted:
        raise KeyboardInterrupt
    value = _value(measure(Run(result.folder)), metric, kind)
    if value != value:
        raise ConfigError(f"--metric: runs have no {metric} of {kind} requests; choose another, or another load")
    return value


def _run_kept(overrides: list[str]) -> str:
    """The folder of a run, which is made if it is not there."""
    config, plain = checked(composed(overrides))
    there = found(Path(config.results) / config.name, plain, "code").folder
    if there is not None:
        return str(there)
    plan = planned(config, plain)
    with held(plan.folder):
        if run_planned(plan, overrides).interrupted:
            raise KeyboardInterrupt
    return str(plan.folder)


def _value(frame: pd.DataFrame, metric: str, kind: str) -> float:
    rows = frame[(frame["kind"] == kind) & (frame["tenant"] == ALL) & (frame["priority"] == ALL)]
    return float(rows[metric].iloc[0]) if len(rows) else float("nan")


def _parameters(values: Mapping[str, Value]) -> list[str]:
    return [f"policy.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def _rounded(values: Mapping[str, Value]) -> dict[str, Value]:
    """To three digits, which is more than a search of this size can tell: what is compared is then what is printed."""
    return {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in values.items()}


def _complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.COMPLETE,))


def _default_trial(study: optuna.Study, defaults: Mapping[str, Value]) -> optuna.trial.FrozenTrial | None:
    return next((each for each in _complete(study) if each.params == defaults), None)


def _history(study: optuna.Study, task: Task) -> pd.DataFrame:
    """A row for each complete trial: its parameters, the metric of each seed, their mean, and when it began (UTC)."""
    rows = []
    for number, trial in enumerate(_complete(study)):
        values = {f"seed_{SEED_TUNED + i}": value for i, value in enumerate(trial.user_attrs["values"])}
        rows.append(
            {"trial": number, **trial.params, **values, task.metric: trial.value, "started_at": trial.datetime_start}
        )
    return pd.DataFrame(rows)


@contextlib.contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
