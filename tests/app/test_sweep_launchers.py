"""Launchers of sweeps that need what a test machine has not: composed as Hydra would, and held against their plugin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from sage_bench import launcher_ray
from sage_bench.results.reader import load_runs
from sage_core.errors import ConfigError


def launcher(*overrides: str) -> Any:
    with initialize_config_module("sage_bench.conf", version_base="1.3"):
        return compose("config", ["hydra.job.name=sweep", *overrides], return_hydra_config=True).hydra.launcher


def made(config: Any) -> Launcher:
    plugin = Plugins.instance()._instantiate(config)
    assert isinstance(plugin, Launcher)
    return plugin


def test_slurm_composes_to_what_submitit_takes() -> None:
    given = launcher("hydra/launcher=slurm", "hydra.launcher.partition=long")
    assert given.partition == "long"
    plain: Any = OmegaConf.to_container(given, resolve=True)
    assert plain["submitit_folder"] == "results/run/.submitit/%j"
    plugin = pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher.config", reason="pip install hydra-submitit-launcher"
    )
    assert set(plain) == set(plugin.SlurmQueueConf.__dataclass_fields__)
    assert type(made(given)).__name__ == "SlurmLauncher"


def test_a_sweep_through_submitit_gives_the_results_of_one_process(tmp_path: Path) -> None:
    """Its executor of this machine, which differs from that for Slurm in who starts the processes."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install hydra-submitit-launcher")

    def sweep(name: str, *more: str) -> dict[int, str]:
        words = ["seed=1,2", "load.duration_s=2", f"results={tmp_path}", f"name={name}", *more]
        command = [sys.executable, "-m", "sage_bench", "run", *words, "--multirun"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        return {run.manifest.seed: run.manifest.digest for run in load_runs(tmp_path / name)}

    in_jobs = sweep("jobs", "hydra/launcher=submitit_local")
    assert len(in_jobs) == 2
    assert in_jobs == sweep("here")


def test_ray_is_known_to_hydra() -> None:
    launcher_ray.register()
    launcher_ray.register()  # again: nothing
    assert isinstance(made(launcher("hydra/launcher=ray", "hydra.launcher.num_cpus=2")), launcher_ray.RayLauncher)
    with pytest.raises(Exception, match="num_cpus: expected CPUs above 0") as caught:
        made(launcher("hydra/launcher=ray", "hydra.launcher.num_cpus=0"))
    assert isinstance(caught.value.__cause__, ConfigError)
