"""The simulated twin of a recorded run: its own configuration under the simulator, its own requests as the load.

Engines and policy are those of ``config.yaml``, and so is the network of a simulated run; that of a live run is half of the
round trip to its engines, which was measured before the load began. Overrides change some of them, in the words of ``sage run``. The
load, the objectives (due times were recorded with the requests) and the counted window are part of what was recorded and
cannot be changed.

A gateway's record holds no cluster, for what its engines are nobody told it: an override has to.
"""

from __future__ import annotations

import importlib.resources
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sage_bench.config import EmbedConfig, checked, composed
from sage_bench.loads.clients import Clients
from sage_bench.loads.recorded import RecordedLoad
from sage_bench.results.manifest import read_manifest
from sage_bench.results.reader import Run
from sage_core.errors import ConfigError
from sage_core.pipeline import pipeline_of, single_request_pipelines

CHANGEABLE: Final = ("policy", "cluster", "attempts_max", "mechanism")
"""Keys of the configuration that an override may begin with."""


def twin(run: Path, overrides: Sequence[str], name: str, results: Path) -> dict[str, Any]:
    """The configuration that simulates the run in folder ``run``, into ``results/name``.

    Raises :class:`DataError` for a folder that is not a run's, :class:`ConfigError` for an override.
    """
    manifest = read_manifest(run)
    parsed = [_parsed(text) for text in overrides]
    if of_gateway(run) and not any(map(_describes, parsed)):
        raise ConfigError(
            f"{run}: a gateway recorded this, and what its engines are stands in no configuration; say what simulates "
            f"them with cluster=NAME or cluster.devices=[...]. It needs {_pools(asked(run))}"
        )
    config = OmegaConf.create(manifest.config)
    ways = [engine.round_trip_ns for engine in manifest.engines if engine.round_trip_ns is not None]
    if ways:
        OmegaConf.update(config, "cluster.network", {"delay_s": statistics.median(ways) / 2e9, "jitter_s": 0.0})
    _override(config, parsed)
    plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]  # it was made of one
    made = plain | {
        "name": name,
        "results": str(results),
        "driver": {"kind": "sim", "until_s": plain["driver"].get("until_s")},
        "record": {"tasks": True, "steps": True},
        "load": {"_target_": f"{RecordedLoad.__module__}.{RecordedLoad.__qualname__}", "run": str(run)},
    }
    _check_pools(run, made)
    return made


def of_gateway(run: Path) -> bool:
    """Whether the run in that folder was recorded by a gateway before engines that its configuration does not describe."""
    manifest = read_manifest(run)
    return manifest.source == "live" and manifest.load.name == Clients.__name__


def describing(overrides: Sequence[str]) -> list[str]:
    """Those of the overrides that say what the cluster is, as a gateway's record wants it said."""
    return [text for text in overrides if _describes(_parsed(text))]


def asked(run: Path) -> dict[str, str]:
    """The pools that the requests of a recorded run were for, and the kind of each. DataError for a broken file."""
    rows = Run(run).frame("requests", ("pipeline",))
    known = single_request_pipelines()
    found = (pipeline_of(known, str(name)) for name in rows["pipeline"].unique())
    return {
        stage.op.pool: "embedding" if pipeline.single is False else "llm"
        for pipeline in found
        if pipeline is not None
        for stage in pipeline.stages
    }


def _check_pools(run: Path, made: dict[str, Any]) -> None:
    config, _ = checked(made)
    there: dict[str, str] = {}
    for group in config.cluster.devices:
        there |= {each.pool: "embedding" if isinstance(each, EmbedConfig) else "llm" for each in group.engines}
    missing = {pool: kind for pool, kind in asked(run).items() if there.get(pool) != kind}
    if missing:
        raise ConfigError(
            f"cluster.devices: requests of {run} are for {_pools(missing)}, and no device has that; the cluster has "
            f"{_pools(there)} (the key is pool, below llm or embed)"
        )


def _pools(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"pool {pool!r} ({kind})" for pool, kind in kinds.items()) or "no pool of engines"


def _describes(override: Override) -> bool:
    return override.key_or_group in ("cluster", "cluster.devices") and not override.is_sweep_override()


def swept(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the choices in ``overrides``: ``policy=fifo,hybrid`` are two. Raises :class:`ConfigError`."""
    choices = []
    for text in overrides:
        override = _parsed(text)
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return [list(each) for each in itertools.product(*choices)]


def _parsed(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"{text!r}: expected KEY=VALUE, as in policy=fifo ({_told(error)})") from error
    key = override.key_or_group
    top = key.replace("/", ".").partition(".")[0]
    if top not in CHANGEABLE or override.is_delete():
        raise ConfigError(
            f"{text}: the load, objectives and window of a recorded run stand; what can be changed is "
            f"{', '.join(CHANGEABLE)} (GROUP=CHOICE, or KEY=VALUE below it)"
        )
    return override


def _override(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Groups first, then values, as Hydra has it."""
    groups = [each for each in overrides if _is_group(each.key_or_group)]
    chosen = composed([str(each.input_line) for each in groups])
    for group in groups:
        path = group.key_or_group.replace("/", ".")
        node = OmegaConf.to_container(OmegaConf.select(chosen, path), resolve=True)
        OmegaConf.update(config, path, node, merge=False)
    for value in overrides:
        if value not in groups:
            try:
                OmegaConf.update(config, value.key_or_group, value.value(), merge=True)
            except (OmegaConfBaseException, ValueError, IndexError) as error:
                raise ConfigError(
                    f"{value.input_line}: no such key in the run's configuration ({_told(error)})"
                ) from error


def _is_group(key: str) -> bool:
    return "/" in key or importlib.resources.files("sage_bench.conf").joinpath(key).is_dir()


def _told(error: Exception) -> str:
    """What went wrong, on one line, and what could be chosen; not where Hydra looked for it."""
    return " ".join(str(error).partition("Config search path")[0].split())
