"""The manifest of a live run."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sage_bench.config import RunConfig
from sage_bench.results.devices import device_facts
from sage_bench.results.manifest import (
    EngineFact,
    HostFact,
    LoadFact,
    Manifest,
    PolicyFact,
    ReplicaFact,
    Source,
    StateFact,
    Status,
    Timing,
    write_manifest,
)
from sage_bench.run import profile_path
from sage_bench.serving import Served
from sage_core.ops import native_build
from sage_core.units import seconds
from sage_sim.profile import Profile


def version() -> str:
    """Of this distribution."""
    return importlib.metadata.version("sage-serving")


@dataclass(frozen=True, slots=True)
class Started:
    """The machine when a run began."""

    at: datetime
    wall: float
    cpu: float
    load_average: tuple[float, ...]

    @classmethod
    def now(cls) -> Started:
        return cls(datetime.now(UTC), time.perf_counter(), time.process_time(), os.getloadavg())


def write_live_manifest(
    folder: Path,
    config: RunConfig,
    plain: dict[str, Any],
    served: Served,
    started: Started,
    *,
    source: Source,
    status: Status = "complete",
    versions: Mapping[str, str] | None = None,
    round_trips: Mapping[str, int] | None = None,
    rate: float | None = None,
    overrides: Sequence[str] = (),
    window: tuple[int, int | None] | None = None,
    traces: Sequence[Path] = (),
    profiles: Mapping[str, Profile] | None = None,
    price_per_h: float | None = None,
    generator: Mapping[str, Any] | None = None,
    invalid: Sequence[str] = (),
    host: HostFact | None = None,
) -> Manifest:
    """What a simulated run's says, from a gateway's life; "failed" whatever ``status`` says if its control plane broke.
    versions, round_trips (ns): of the engines, by URL. window: what counts, on the gateway's clock (ns; None: to the end), by default all
    but the first ``warmup_s`` of its life. profiles: of emulated engines. generator: what the load generator measured of itself. host: what was
    sampled of the machine. OutputError."""
    return write_manifest(
        folder,
        experiment=config.name,
        run_id=folder.name,
        source=source,
        status=status if served.broken is None else "failed",
        policy=PolicyFact(
            served.policy,
            {k: v for k, v in config.policy.items() if not k.startswith("_")},
            tuple(served.switches),
        ),
        seed=config.seed,
        load=LoadFact(rate, str(config.load.get("_target_", "")).rpartition(".")[2], config.load),
        overrides=tuple(overrides),
        config=plain,
        duration_ns=served.duration_ns,
        digest=served.digest.hex(),
        steps=served.steps,
        control_s=served.control_s,
        timing=Timing(
            started.at.isoformat(),
            time.perf_counter() - started.wall,
            time.process_time() - started.cpu,
            started.load_average,
        ),
        native_build=native_build() if config.mechanism == "native" else "reference",
        warmup_ns=seconds(config.warmup_s) if window is None else window[0],
        cooldown_at_ns=None if window is None else window[1],
        traces=traces,
        profiles={name: profile_path(name) for name in profiles or ()},
        replicas=tuple(ReplicaFact(**row) for row in served.replicas),
        devices=() if profiles is None else device_facts(config, profiles),
        price_per_h=price_per_h,
        counts=served.counts,
        engines=tuple(
            EngineFact(
                spec.called,
                spec.url,
                spec.model,
                spec.adapter,
                (versions or {}).get(spec.url, "unknown"),
                (round_trips or {}).get(spec.url),
                tuple(StateFact(*each) for each in served.states if each[1] == spec.called),
            )
            for spec in served.engines
        ),
        generator=generator,
        invalid=tuple(invalid),
        host=host,
    )
