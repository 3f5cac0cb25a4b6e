"""Composing the points of a sweep, most of which differ from one before only in numbers.

Hydra composes each point from its files anew: 150 ms of CPU, more than a short simulation. Values (``seed=3``,
``load.rate=40``) do not decide which files are read, and Hydra applies them last. So what the files give is composed once for
each choice of files and kept; the values are then set in a copy. Anything but a plain ``key=value`` goes through Hydra as before.
"""

from __future__ import annotations

import copy
import os
from typing import Any, Final

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sage_bench.config import told_by_hydra

KEPT: Final = 64
"""Compositions that a process keeps, at about 0.15 MB each."""

_kept: dict[tuple[str, tuple[str, ...]], DictConfig] = {}
"""By sweep and overrides. Of the process and not of a loader, because workers are sent a new loader with every point."""

BROKEN: Final = "broken_point"
"""Key of a configuration that could not be composed; its value says why."""


class PointLoader(ConfigLoader):
    """Stands before the loader of Hydra, wherever a launcher composes a point. A point that does not compose is told by the
    point itself, so that it is one failure among results and not the end of the sweep."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._sweep = os.urandom(8).hex()

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The configuration of one point."""
        try:
            return self.composed(master_config, sweep_overrides)
        except (HydraException, OmegaConfBaseException) as error:
            broken: DictConfig = self._loader.load_sweep_config(master_config, [])
            with open_dict(broken):
                broken[BROKEN] = told_by_hydra(error)
                broken.hydra.overrides.task = list(sweep_overrides)
            return broken

    def composed(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        """The configuration of one point. Raises what Hydra raises."""
        parsed = OverridesParser.create().parse_overrides(overrides)
        late = self._late(parsed)
        early = tuple(str(each.input_line) for each in parsed if each not in late)
        of = self._sweep, early
        if of not in _kept:
            while len(_kept) >= KEPT:
                del _kept[next(iter(_kept))]
            _kept[of] = self._loader.load_sweep_config(master, list(early))
        found = copy.deepcopy(_kept[of])
        for each in late:
            try:
                OmegaConf.update(found, each.key_or_group, each.value(), merge=True)
            except OmegaConfBaseException:
                whole: DictConfig = self._loader.load_sweep_config(master, overrides)  # its own words for what is wrong
                return whole
        found.hydra.overrides.task = [each.input_line for each in parsed if not each.is_hydra_override()]
        return found

    def _late(self, parsed: list[Override]) -> list[Override]:
        """The overrides that may be set in what the others compose to: plain values that no other kind comes after."""
        late: list[Override] = []
        for each in parsed:
            if self._is_group(each):
                continue
            plain = not (each.is_add() or each.is_force_add() or each.is_delete() or each.is_hydra_override())
            late = [*late, each] if plain and not isinstance(each.value(), dict) else []
        return late

    def _is_group(self, override: Override) -> bool:
        return not isinstance(override.value(), dict) and bool(
            self._loader.repository.group_exists(override.key_or_group)
        )

    # What launchers do not ask for is Hydra's.

    def load_configuration(self, *args: Any, **kwargs: Any) -> Any:
        return self._loader.load_configuration(*args, **kwargs)

    def get_search_path(self) -> Any:
        return self._loader.get_search_path()

    def get_sources(self) -> Any:
        return self._loader.get_sources()

    def list_groups(self, parent_name: str) -> list[str]:
        return list(self._loader.list_groups(parent_name))

    def get_group_options(self, *args: Any, **kwargs: Any) -> list[str]:
        return list(self._loader.get_group_options(*args, **kwargs))

    def compute_defaults_list(self, *args: Any, **kwargs: Any) -> Any:
        return self._loader.compute_defaults_list(*args, **kwargs)
