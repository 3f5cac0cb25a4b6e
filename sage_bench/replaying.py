"""Replay of a run on disk: the plane is made again from the run's own configuration and given the run's own log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sage_bench.compose import Parts, make_parts, make_plane, make_policy
from sage_bench.config import checked
from sage_bench.results.manifest import Manifest, read_manifest
from sage_bench.results.schema import STEPS
from sage_bench.run import CONFIG_NAME
from sage_core.errors import ConfigError, DataError, ReplayDivergence
from sage_core.log import Step
from sage_core.ops import native_build
from sage_core.replay import Replayed, replay
from sage_policies.predict import Oracle
from sage_policies.presets import PRESETS


def replay_run(
    folder: Path, *, policy: str | None = None, mechanism: str | None = None, any_build: bool = False
) -> Replayed:
    """Replay ``folder``'s log. Raises ReplayDivergence with the first step that differs; DataError, ConfigError."""
    manifest = read_manifest(folder)
    plain = _config(folder)
    if policy is not None:
        if policy not in PRESETS:
            raise ConfigError(f"--policy: unknown policy {policy!r}; known: {', '.join(PRESETS)}")
        plain["policy"] = {"_target_": f"sage_policies.presets.{policy}"}
    if mechanism is not None:
        plain["mechanism"] = mechanism
    config, _ = checked(plain)
    if config.mechanism == "native" and not any_build:
        _same_build(manifest)
    # The log is enough: neither the load's trace nor a profile has to be where it was. Only the oracle needs the load.
    oracle = isinstance(make_policy(config).predict, Oracle)
    plane = make_plane(config, _truth(make_parts(config)) if oracle else None)
    replayed = replay(read_log(folder / "steps.parquet"), plane)
    if replayed.divergence is not None:
        raise ReplayDivergence(f"{folder}: replay diverged at {replayed.divergence}")
    if replayed.steps != manifest.steps or replayed.digest.hex() != manifest.digest:
        raise ReplayDivergence(
            f"{folder}: the log ends at step {replayed.steps} with digest {replayed.digest.hex()}; the manifest says "
            f"{manifest.steps} steps and {manifest.digest}: steps were cut off or the manifest is of another run"
        )
    return replayed


def read_log(path: Path) -> Iterator[Step]:
    """The steps of a log, in order, a batch at a time. DataError naming the file."""
    try:
        file = pq.ParquetFile(path)
        if file.schema_arrow.names != STEPS.names:
            raise DataError(f"{path}: not a log: columns {file.schema_arrow.names}, expected {STEPS.names}")
        for batch in file.iter_batches(batch_size=8192):
            if any(column.null_count for column in batch.columns):
                raise DataError(f"{path}: a step without an instant, events or digest; the file is damaged")
            columns: list[list[Any]] = [batch.column(name).to_pylist() for name in ("now", "events", "digest")]
            yield from map(Step, *columns)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: there is no log: it was deleted, or the run was made with record.steps=false; run it again"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); the file is damaged") from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: the run's configuration cannot be read ({error})") from error
    if not isinstance(plain, dict):
        raise DataError(f"{path}: expected the run's configuration, got {type(plain).__name__}")
    return plain


def _same_build(manifest: Manifest) -> None:
    recorded = manifest.software.native_build
    if recorded not in ("reference", native_build()):
        raise ReplayDivergence(
            f"the run was decided by native build {recorded}, this is {native_build()}: equality is only promised for "
            "the same build; add --any-build to try"
        )


def _truth(parts: Parts) -> Any:
    """The oracle's answers, from the load itself: it is a pure function of configuration and seed."""
    lengths = {arrival.request.request: arrival.output_tokens for arrival in parts.load.arrivals()}

    def lookup(request: int) -> int:
        if request not in lengths:
            raise ConfigError("the oracle cannot be replayed with a closed loop: its requests depend on the run")
        return lengths[request]

    return lookup
