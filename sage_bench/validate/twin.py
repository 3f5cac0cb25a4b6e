"""The simulated twin of a recorded run: its own configuration under the simulator, its own requests as the load.

Engines and policy are those of ``config.yaml``, and so is the network of a simulated run; that of a live run is half of the
round trip to its engines, which was measured before the load began. Overrides change some of them, in the words of ``sage run``. The
load, the objectives (due times were recorded with the requests) and the counted window are part of what was recorded and
cannot be changed.
"""

from __future__ import annotations

import importlib.resources
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sage_bench.config import composed
from sage_bench.loads.recorded import RecordedLoad
from sage_bench.results.manifest import read_manifest
from sage_core.errors import ConfigError

CHANGEABLE: Final = ("policy", "cluster", "attempts_max", "mechanism")
"""Keys of the configuration that an override may begin with."""


def twin(run: Path, overrides: Sequence[str], name: str, results: Path) -> dict[str, Any]:
    """The configuration that simulates the run in folder ``run``, into ``results/name``.

    Raises :class:`DataError` for a folder that is not a run's, :class:`ConfigError` for an override.
    """
    manifest = read_manifest(run)
    config = OmegaConf.create(manifest.config)
    ways = [engine.round_trip_ns for engine in manifest.engines if engine.round_trip_ns is not None]
    if ways:
        OmegaConf.update(config, "cluster.network", {"delay_s": statistics.median(ways) / 2e9, "jitter_s": 0.0})
    _override(config, [_parsed(text) for text in overrides])
    plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]  # it was made of one
    return plain | {
        "name": name,
        "results": str(results),
        "driver": {"kind": "sim", "until_s": plain["driver"].get("until_s")},
        "record": {"tasks": True, "steps": True},
        "load": {"_target_": f"{RecordedLoad.__module__}.{RecordedLoad.__qualname__}", "run": str(run)},
    }


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
    try:
        chosen = composed([str(each.input_line) for each in groups])
    except HydraException as error:
        raise ConfigError(f"config: {_told(error)}") from error
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
