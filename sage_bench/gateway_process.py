"""The gateway of a live run, a process of its own: ``python -m sage_bench.gateway_process FOLDER``.

It finds the run's configuration and its job in the folder, serves until SIGTERM, and leaves there log, rows, and how its
life went.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from sage_bench.cli.leave import leave
from sage_bench.config import checked
from sage_bench.run import CONFIG_NAME
from sage_bench.serving import Served, Serving, serve
from sage_core import errors
from sage_core.errors import SageError
from sage_live.gateway.app import GatewayConfig
from sage_live.health import HealthConfig
from sage_live.http_engine import EngineSpec
from sage_live.service import ServiceConfig

JOB: Final = "gateway-job.json"
SERVED: Final = "gateway-served.json"


class Job(msgspec.Struct, frozen=True):
    """What the gateway of a run is told."""

    port: int
    engines: list[EngineSpec]
    indexes: dict[str, str] = {}
    health: HealthConfig = HealthConfig()
    live_max: int = 1_000_000  # an open loop is not to be turned away by us: its queue is what is measured
    request_s: float = 3600.0
    grace_s: float = 60.0


class Told(msgspec.Struct, frozen=True):
    """How its life went, on disk."""

    steps: int
    digest: str
    duration_ns: int
    control_s: float
    origin_ns: int
    counts: dict[str, int]
    replicas: list[dict[str, Any]]
    policy: str
    switches: list[tuple[int, str]]
    states: list[tuple[int, str, str, str]]  # instant (ns), engine, state, why: in order
    broken: tuple[str, str] | None  # class of the error and what it says

    def served(self, engines: Sequence[EngineSpec]) -> Served:
        """As in memory."""
        return Served(
            self.steps,
            bytes.fromhex(self.digest),
            self.duration_ns,
            self.control_s,
            self.counts,
            self.replicas,
            self.policy,
            self.origin_ns,
            self.switches,
            engines,
            self.states,
            self.error(),
        )

    def error(self) -> Exception | None:
        """What broke the control plane, of the class it had if that was one of ours."""
        if self.broken is None:
            return None
        name, text = self.broken
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, SageError):
            return kind(text)
        return RuntimeError(f"the control plane broke: {name}: {text}")


def main(folder: Path) -> None:
    """Serve; SageError as from the command line."""
    job = msgspec.json.decode((folder / JOB).read_bytes(), type=Job)
    config, _ = checked(yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8")))
    served = serve(
        config,
        Serving(
            GatewayConfig(port=job.port, grace_s=job.grace_s),
            ServiceConfig(job.live_max, job.request_s, trust_schedule=True),
            job.health,
            job.engines,
            record=folder,
            indexes={name: Path(index) for name, index in job.indexes.items()},
        ),
        lambda gateway, port: None,
    )
    told = Told(
        served.steps,
        served.digest.hex(),
        served.duration_ns,
        served.control_s,
        served.origin_ns,
        dict(served.counts),
        [dict(row) for row in served.replicas],
        served.policy,
        list(served.switches),
        list(served.states),
        None if served.broken is None else (type(served.broken).__name__, str(served.broken)),
    )
    (folder / SERVED).write_bytes(msgspec.json.encode(told))
    if served.broken is not None:
        raise served.broken


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except SageError as error:
        leave(error)
