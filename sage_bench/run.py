"""One run from configuration to a folder of results."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from omegaconf import DictConfig

from sage_bench.compose import Parts, make_driver, make_parts, price_per_h
from sage_bench.config import RunConfig, checked
from sage_bench.results.devices import device_facts, usage_fact
from sage_bench.results.manifest import LoadFact, PolicyFact, ReplicaFact, Status, Timing, write_manifest
from sage_bench.results.native_recorder import NativeRecorder
from sage_bench.results.recorder import RunRecorder
from sage_bench.results.writer import StepWriter, output_error
from sage_bench.sweep import sources
from sage_core.commands import AnyCommand
from sage_core.errors import ConfigError
from sage_core.events import AnyEvent
from sage_core.native_plane import Plane
from sage_core.ops import native_build
from sage_core.pipeline import pipeline_of
from sage_core.plane import Counts
from sage_core.stepper import ColumnRecorder, Recorder
from sage_core.units import NEVER, PoolKind, seconds
from sage_sim.driver import Finish, SimDriver
from sage_sim.engine import ReplicaUsage
from sage_sim.engine_reference import Seen
from sage_sim.profile import PROFILES

CONFIG_NAME = "config.yaml"
REASONS_TOLD = 3
_DUMPER: Final = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # where PyYAML was built with libyaml: ten times as fast

Tick = Callable[[int, Plane], None]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left behind."""

    folder: Path
    config: RunConfig
    counts: Counts
    finish: Finish
    warnings: list[str]
    wall_s: float

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it early."""
        return self.finish.interrupted


@dataclass(frozen=True, slots=True)
class Planned:
    """A run whose configuration makes sense; nothing has been written. plain: the configuration as plain data."""

    config: RunConfig
    plain: dict[str, Any]
    parts: Parts
    folder: Path


def planned(config: RunConfig, plain: dict[str, Any]) -> Planned:
    """What a configuration, as :func:`sage_bench.config.checked` gives it, says to run. Raises SageError."""
    parts = make_parts(config)
    return Planned(config, plain, parts, Path(config.results) / config.name / run_id(parts, plain))


def run(composed: DictConfig | dict[str, Any], overrides: Sequence[str] = (), tick: Tick | None = None) -> RunResult:
    """Run once and write ``results/<name>/<run id>/``. Raises SageError.

    On Ctrl-C the partial result is complete in itself: every request has an outcome and the log replays. On an error
    what was written is readable and the manifest says ``failed``.
    """
    return run_planned(planned(*checked(composed)), overrides, tick)


def run_planned(plan: Planned, overrides: Sequence[str] = (), tick: Tick | None = None) -> RunResult:
    """:func:`run` of what has been planned, once: a load and a policy have a state."""
    config, plain, parts, folder = plan.config, plan.plain, plan.parts, plan.folder
    started_at = datetime.now(UTC)
    wall = time.perf_counter()
    load_average = os.getloadavg()
    prepare(folder, plain)
    cooldown_at = cooldown_begins(parts)
    driver: SimDriver | None = None
    status: Status = "failed"
    try:
        with contextlib.ExitStack() as files:
            rows, record = _recorder(files, folder, parts, cooldown_at)
            driver = make_driver(parts, record)
            finish = driver.run(tick)
        status = "interrupted" if finish.interrupted else "complete"
    finally:
        if driver is not None:
            reached = driver.finish()
            counts = driver.counts
            usage = driver.usage()
            write_manifest(
                folder,
                experiment=config.name,
                run_id=folder.name,
                source="simulation",
                status=status,
                policy=PolicyFact(parts.policy.name, {k: v for k, v in config.policy.items() if not k.startswith("_")}),
                seed=config.seed,
                load=LoadFact(getattr(parts.load, "rate", None), type(parts.load).__name__, config.load),
                overrides=tuple(overrides),
                config=plain,
                duration_ns=reached.now,
                digest=reached.digest.hex(),
                steps=reached.steps,
                control_s=reached.control_s,
                timing=Timing(started_at.isoformat(), time.perf_counter() - wall, reached.total_s, load_average),
                native_build=native_build() if config.mechanism == "native" else "reference",
                warmup_ns=_warmup_ends(parts),
                cooldown_at_ns=None if cooldown_at == NEVER else cooldown_at,
                traces=traces_of(parts.load),
                profiles={name: profile_path(name) for name in parts.profiles},
                replicas=tuple(
                    ReplicaFact(**row, usage=usage_fact(usage.get(row["replica"]))) for row in rows.replicas()
                ),
                devices=device_facts(config, parts.profiles),
                price_per_h=price_per_h(config, parts.profiles),
                # Outcomes as in the rows: a step that could not be taken is in the plane's figures and nowhere else.
                counts={**{name: getattr(counts, name) for name in counts.__dataclass_fields__}, **rows.counts()},
            )
    warnings = [*parts.warnings, *_all_warmup(config, finish), *_left_profiles(parts, usage, rows.replicas())] + (
        _why_failed(folder, parts) if counts.failed and not finish.interrupted else []
    )
    return RunResult(folder, config, counts, finish, warnings, time.perf_counter() - wall)


def _recorder(
    files: contextlib.ExitStack, folder: Path, parts: Parts, cooldown_at: int
) -> tuple[RunRecorder | NativeRecorder, Recorder | ColumnRecorder]:
    """Who makes the rows, and what the driver is to tell of each step."""
    config = parts.config
    pipelines = {name: [(stage.op.name, stage.op.pool) for stage in p.stages] for name, p in parts.pipelines.items()}
    about: dict[str, Any] = {
        "warmup_ns": _warmup_ends(parts),
        "cooldown_at": cooldown_at,
        "tasks": config.record.tasks,
    }
    if config.mechanism == "native":
        columns = files.enter_context(NativeRecorder(folder, pipelines, parts.slo, steps=config.record.steps, **about))
        return columns, columns
    rows = files.enter_context(RunRecorder(folder, pipelines, parts.slo, **about))
    log = files.enter_context(StepWriter(folder / "steps.parquet")) if config.record.steps else None

    def record(
        now: int, events: Sequence[AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
    ) -> None:
        rows(now, events, commands)
        if log is not None:
            log(now, encoded, digest)

    return rows, record


def _all_warmup(config: RunConfig, finish: Finish) -> list[str]:
    if 0 < finish.now <= seconds(config.warmup_s):
        return [f"warmup_s={config.warmup_s:g} is longer than the run ({finish.now / 1e9:.1f} s): no request counts"]
    return []


def _left_profiles(parts: Parts, usage: Mapping[int, ReplicaUsage], replicas: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the run went beyond what a profile was fitted on: nothing is extrapolated silently."""
    groups = [group for group in parts.config.cluster.devices for _ in range(group.count)]
    largest: dict[str, Seen] = {}
    for row in replicas:
        group = groups[row["device"]]
        engines = group.llms if row["pool_kind"] == PoolKind.LLM else [group.embed]
        for engine in engines if row["replica"] in usage else []:
            if engine is not None:
                pairs = zip(largest.get(engine.profile, Seen()), usage[row["replica"]].seen, strict=True)
                largest[engine.profile] = Seen(*(max(pair) for pair in pairs))
    found: list[str] = []
    for name, seen in sorted(largest.items()):
        found += parts.profiles[name].warn_outside(
            seqs=seen.decode_seqs or None,
            kv_tokens=seen.decode_kv_tokens or None,
            prefill_tokens=seen.prefill_tokens or None,
            prompt_tokens=seen.prompt_tokens or None,
        )
    return [message for message in found if message not in parts.warnings]


def run_id(parts: Parts, plain: dict[str, Any]) -> str:
    """``<arm, else policy>-s<seed>-<hash>``: the same configuration has the same folder, wherever results go."""
    return f"{parts.config.arm.name or parts.policy.name}-s{parts.config.seed}-{config_digest(plain)}"


def config_digest(plain: Mapping[str, Any]) -> str:
    """Eight hex digits of the configuration, wherever results go."""
    kept = {key: value for key, value in plain.items() if key != "results"}
    return hashlib.sha256(msgspec.json.encode(kept, order="deterministic")).hexdigest()[:8]


OUTPUTS: Final = ("requests.parquet", "tasks.parquet", "replicas.parquet", "steps.parquet", "manifest.json")


def unused(folder: Path) -> None:
    """ConfigError if there is a run in ``folder`` already."""
    there = [name for name in OUTPUTS if (folder / name).exists()]
    if there:
        raise ConfigError(f"{folder}: has a run in it ({', '.join(there)}), which would be lost; choose another folder")


def discard(folder: Path) -> None:
    """Take away what :func:`prepare` and a run that came to nothing left in ``folder``; other files stay."""
    for name in (*OUTPUTS, CONFIG_NAME, sources.NAME):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def prepare(folder: Path, plain: dict[str, Any]) -> None:
    """Make the folder, drop what an earlier run of the same configuration left in it, and write down what is run by what."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in OUTPUTS:
            (folder / name).unlink(missing_ok=True)
        (folder / CONFIG_NAME).write_text(yaml.dump(plain, Dumper=_DUMPER, sort_keys=False), encoding="utf-8")
        (folder / sources.NAME).write_text(f"{sources.sources_digest(plain)}\n", encoding="ascii")
    except OSError as error:
        raise output_error(folder, error) from error


def _warmup_ends(parts: Parts) -> int:
    """``warmup_s`` after the begin of the load, which is that of the run but for what a gateway recorded."""
    return int(getattr(parts.load, "began", 0)) + seconds(parts.config.warmup_s)


def cooldown_begins(parts: Parts) -> int:
    """When the cool-down begins: ``cooldown_s`` before the end of a load of known duration."""
    until: int | None = getattr(getattr(parts.load, "limits", None), "until", None)
    if not parts.config.cooldown_s or until is None:
        return NEVER
    return max(until - seconds(parts.config.cooldown_s), 0)


def _why_failed(folder: Path, parts: Parts) -> list[str]:
    """The reasons requests failed for, most frequent first, and pools that nothing serves."""
    rows = pq.read_table(folder / "requests.parquet", columns=["outcome", "reason", "pipeline"])
    failed = rows.filter(pc.equal(rows["outcome"].cast(pa.string()), "failed"))
    found = collections.Counter(failed["reason"].cast(pa.string()).to_pylist())
    served = {
        engine.pool
        for group in parts.config.cluster.devices
        for engine in (*group.engines, group.operator)
        if engine is not None
    }
    asked = set(failed["pipeline"].cast(pa.string()).to_pylist())
    pipelines = (pipeline_of(parts.pipelines, name) for name in asked)  # a recorded load asks for chat@MODEL
    needed = {stage.op.pool for pipeline in pipelines if pipeline is not None for stage in pipeline.stages}
    told = [f"{count:,} requests failed: {reason}" for reason, count in found.most_common(REASONS_TOLD)]
    if (more := failed.num_rows - sum(count for _, count in found.most_common(REASONS_TOLD))) > 0:
        told.append(
            f"{more:,} more requests failed, for {len(found) - REASONS_TOLD:,} other reasons (requests.parquet)"
        )
    return told + [f"no device serves pool {pool!r} (cluster.devices)" for pool in sorted(needed - served)]


def traces_of(load: object) -> list[Path]:
    """Files that a load reads; none where it draws all of it."""
    files: list[str] = getattr(load, "files", list)()
    return [Path(file) for file in files]


def profile_path(name: str) -> Path:
    """The file of a profile that is named, or is a path itself."""
    return Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
