"""Every YAML file below conf/ is composed, checked and instantiated; every sweep names choices that exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sage_bench.compose import Parts, make_driver, make_parts
from sage_bench.config import SimDriverConfig, checked, composed
from sage_bench.run import RunResult, run

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
# Launchers are Hydra's own objects (tests/app/test_sweep_launchers.py); an arm is one side of an experiment, and means nothing
# without it; what `sage tune` searches is not a run's.
CHOICES = [
    path for path in FILES if path.parts[0] not in ("experiment", "hydra", "arm", "tune") and len(path.parts) > 1
]
EXPERIMENTS = ["/".join(path.parts[1:]) for path in FILES if path.parts[0] == "experiment"]
ARMS = {"/".join(path.parts[1:]) for path in FILES if path.parts[0] == "arm"}

NEEDS = {
    "load/trace": ("load.path={trace}",),
    "load/recorded": ("load.run={recorded_once}",),
    **dict.fromkeys(
        ("load/whatif/record", "load/whatif/record_closed"), ("results={recorded_whatif}", "name=whatif", "seed=1")
    ),
    "pipeline/file": ("pipeline.path=rag",),
    "policy/user": ("policy._target_=sage_policies.presets.fifo",),
}
"""What a choice leaves for the user to say."""


ALIASES = {
    "load": [("mixed", "poisson")],  # names the arrival process that load=mixed has by default
    "cluster": [("robustness/none", "shared")],  # the fault plan without a fault
}
"""Choices that are another by a second name, on purpose."""

PARTS = {("load", "classes"), ("policy", "predict")}
"""Groups within a group."""


def parts_of(*overrides: str) -> Parts:
    config, _ = checked(composed(overrides))
    return make_parts(config)


def sweep_of(experiment: str) -> dict[str, list[str]]:
    """Every value of every key that the experiment sweeps."""
    with initialize_config_module("sage_bench.conf", version_base="1.3"):
        hydra = compose("config", [f"experiment={experiment}"], return_hydra_config=True).hydra
    params: Any = OmegaConf.to_container(hydra.sweeper.params) if hydra.sweeper.params else {}
    parser = OverridesParser.create()
    sweep = {}
    for key, values in params.items():
        override = parser.parse_override(f"{key}={values}")
        sweep[str(key)] = (
            list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.get_value_string()]
        )
    assert not sweep or hydra.mode.name == "MULTIRUN", f"{experiment} lists a sweep and would not run it"
    return sweep


def name_of(experiment: str) -> str:
    """Its folder of results: that of the full size, whatever the size."""
    return experiment.removeprefix("quick/").removeprefix("live/").replace("/", "_")


def is_live(experiment: str) -> bool:
    return experiment.startswith("live/")


@pytest.fixture(scope="session")
def recorded_whatif(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What experiment=whatif_predicted reads: experiment=whatif, cut short."""
    results: Path = tmp_path_factory.mktemp("whatif")
    for load in ("open", "closed"):
        overrides = ["experiment=whatif", f"load=whatif/{load}", "policy=fifo", "seed=1", f"results={results}"]
        run(composed([*overrides, "load.duration_s=2", "warmup_s=0", "cooldown_s=0"]))
    return results


def test_there_is_something_to_test() -> None:
    groups = {path.parts[0] for path in CHOICES}
    assert groups >= {"cluster", "driver", "load", "pipeline", "policy", "slo"}
    assert len(EXPERIMENTS) >= 5


def test_every_arm_is_a_side_of_an_experiment() -> None:
    swept = {value for experiment in EXPERIMENTS for value in sweep_of(experiment).get("arm", ())}
    assert swept == ARMS


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_choice_makes_objects(choice: Path, trace: Path, recorded_once: Path, recorded_whatif: Path) -> None:
    group, name = choice.parts[0], "/".join(choice.parts[1:])
    if choice.parts[:2] in PARTS:
        group, name = "/".join(choice.parts[:2]), "/".join(choice.parts[2:])
    given = {"trace": trace, "recorded_once": recorded_once, "recorded_whatif": recorded_whatif}
    needs = [need.format(**given) for need in NEEDS.get(str(choice), ())]
    parts = parts_of(f"{group}={name}", *needs)
    if isinstance(parts.config.driver, SimDriverConfig):
        driver = make_driver(parts)  # binds the policy to the plane and resolves the cluster
        assert driver.counts.arrived == 0
    if choice != Path("load/clients"):
        assert next(iter(parts.load.arrivals())).request.request == 0


def test_choices_are_told_apart(trace: Path, recorded_once: Path, recorded_whatif: Path) -> None:
    """A file that composes but changes nothing would be a choice in name only."""
    for group, default in (("cluster", "small"), ("load", "mixed"), ("policy", "hybrid"), ("slo", "interactive")):
        found = {}
        for choice in CHOICES:
            name = "/".join(choice.parts[1:])
            if choice.parts[0] != group or choice.parts[:2] in PARTS or name == "user":
                continue
            given = {"trace": trace, "recorded_once": recorded_once, "recorded_whatif": recorded_whatif}
            needs = [need.format(**given) for need in NEEDS.get(str(choice), ())]
            found[name] = OmegaConf.to_yaml(composed([f"{group}={name}", *needs])[group])
        assert default in found
        same = [(a, b) for a in found for b in found if a < b and found[a] == found[b]]
        assert same == ALIASES.get(group, [])


def needs_of(experiment: str, recorded_whatif: Path) -> list[str]:
    """What has to have been run before."""
    if name_of(experiment) != "whatif_predicted":
        return []
    # No run on emulated engines was made for the test: what its prediction would read is simulated.
    return [f"results={recorded_whatif}", *(["load.source=simulation"] if is_live(experiment) else [])]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_composes_with_every_value_of_its_sweep(experiment: str, recorded_whatif: Path) -> None:
    needs = [*needs_of(experiment, recorded_whatif), "seed=1"]
    assert parts_of(f"experiment={experiment}", *needs).config.name == name_of(experiment)
    for key, values in sweep_of(experiment).items():
        assert len(values) == len(set(values)), f"{experiment}: {key} sweeps {values}"
        for value in values if key != "seed" else values[:1]:
            parts = parts_of(f"experiment={experiment}", *needs, f"{key}={value}")
            if not is_live(experiment):
                assert make_driver(parts).counts.arrived == 0


@pytest.mark.parametrize("experiment", [each for each in EXPERIMENTS if not is_live(each)])
def test_an_experiment_runs_its_first_point(
    experiment: str, go: Callable[..., RunResult], recorded_whatif: Path, tmp_path: Path
) -> None:
    first = {key: values[0] for key, values in sweep_of(experiment).items()} | {"seed": "1"}
    short = ["load.duration_s=2", "load.requests=300"]
    if name_of(experiment) == "whatif_predicted":
        short = [f"load.folder={recorded_whatif / 'whatif'}"]
    result = go(f"experiment={experiment}", *(f"{key}={value}" for key, value in first.items()), *short, "warmup_s=0")
    assert result.counts.responded == result.counts.arrived > 0
    assert not [note for note in result.warnings if "fail" in note]
