"""The points of a sweep as tasks of a Ray cluster: ``sage run ... --multirun hydra/launcher=ray``.

Our own, because Hydra's (hydra-ray-launcher 1.2.2) wants cloudpickle below 3 and joblib from 1.6 on wants 3, so it cannot be
installed beside the joblib launcher; it also brings the SDK of a cloud. Ours does what the joblib launcher does, with Ray in
the place of joblib: each point is Hydra's ``run_job`` in a worker of the cluster.
Results go where they would on this machine, so machines of one cluster need a file system in common.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from sage_core.errors import ConfigError, EngineError
from sage_live.jobs.ray_connection import connect, ray_module

PLUGIN: Final = "hydra_plugins.sage_ray_launcher"
"""Hydra takes launchers from this namespace only, and finds them by walking folders, which does not see an editable install.
So this module is known by this name too, and :func:`register` makes it so."""


class RayLauncher(Launcher):
    """address: of the cluster, null as for Ray; num_cpus: that a point takes; max_retries: of one whose node was lost."""

    __module__ = PLUGIN

    def __init__(self, address: str | None, num_cpus: float, max_retries: int) -> None:
        if not num_cpus > 0:
            raise ConfigError(f"hydra.launcher.num_cpus: expected CPUs above 0, got {num_cpus}")
        self._address = address
        self._num_cpus = num_cpus
        self._max_retries = max_retries

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context = hydra_context
        self._task = task_function
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every point; returns in their order. EngineError where Ray cannot be reached, or loses a point for good."""
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        ray = connect(self._address)
        point = ray.remote(num_cpus=self._num_cpus, max_retries=self._max_retries)(run_point)
        given = self._context, self._config, self._task, Singleton.get_state()
        shared = ray.put(ray.cloudpickle.dumps(given))  # as bytes: who reads it has to `register` first
        points = [
            point.remote(os.getcwd(), shared, initial_job_idx + i, list(each)) for i, each in enumerate(job_overrides)
        ]
        try:
            returns: list[JobReturn] = ray.get(points)
        except ray.exceptions.RayError as error:
            raise EngineError(f"a point of the sweep was lost on Ray: {' '.join(str(error).split())[:300]}") from error
        except KeyboardInterrupt:
            for each in points:
                ray.cancel(each)
            raise
        return returns


def run_point(folder: str, shared: bytes, number: int, given: list[str]) -> JobReturn:
    """One point, in a worker of the cluster, as if it were the process and the folder of the sweep."""
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # a user's own policy
    register()
    setup_globals()
    context, config, task, singletons = ray_module().cloudpickle.loads(shared)
    Singleton.set_state(singletons)
    composed = context.config_loader.load_sweep_config(config, given)
    with open_dict(composed):
        composed.hydra.job.id = f"{composed.hydra.job.name}_{number}"
        composed.hydra.job.num = number
    HydraConfig.instance().set_config(composed)
    return run_job(
        hydra_context=context,
        config=composed,
        task_function=task,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def register() -> None:
    """Make it known to Hydra. Costs nothing where it is not used: Ray is imported when a sweep is launched."""
    sys.modules[PLUGIN] = sys.modules[__name__]
    Plugins.instance().register(RayLauncher)
