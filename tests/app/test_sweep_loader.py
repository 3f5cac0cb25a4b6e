"""Points composed the short way are what Hydra composes, to the last key; what it refuses is refused in its words."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sage_bench.sweep import loader
from sage_bench.sweep.loader import BROKEN, PointLoader
from sage_bench.sweep.sweeper import _each_value_once

GROUPS = st.sampled_from(
    [
        "policy=fifo",
        "policy=hybrid",
        "load=tenants",
        "load=comparison/steady",
        "cluster=shared",
        "slo=none",
        "experiment=mixed",
    ]
)
VALUES = st.one_of(
    st.integers(0, 3).map(lambda n: f"seed={n}"),
    st.sampled_from(
        ["load.rate=5", "load.rate=7.5", "load.duration_s=null", "name=other", "warmup_s=2", "record.steps=false"]
    ),
    st.sampled_from(
        ["policy.name=x", "+cluster.faults=[{at_s: 1.0, device: 0}]", "~warmup_s", "++seed=9", "load={rate: 3}"]
    ),
    st.just("slo.classes.chat.ttft_s=0.5"),
)
OVERRIDES = st.lists(st.one_of(GROUPS, VALUES), max_size=6, unique_by=lambda each: each.lstrip("+~").partition("=")[0])


@pytest.fixture(scope="module")
def loaders() -> Iterator[tuple[Any, Any, PointLoader]]:
    """Hydra's loader, the configuration of a sweep, and ours, which keeps what it composed from example to example."""
    with initialize_config_module("sage_bench.conf", version_base="1.3"):
        hydra = GlobalHydra.instance().config_loader()
        master = hydra.load_configuration("config", ["warmup_s=1"], RunMode.MULTIRUN)
        yield hydra, master, PointLoader(hydra)


@settings(max_examples=15, deadline=None)
@given(overrides=OVERRIDES)
def test_the_short_way_and_the_long_way_meet(loaders: tuple[Any, Any, PointLoader], overrides: list[str]) -> None:
    hydra, master, ours = loaders
    error = refused(hydra.load_sweep_config, master, overrides)
    assert refused(ours.composed, master, overrides) == error
    if error is not None:
        assert ours.load_sweep_config(master, overrides)[BROKEN]
        return
    assert plain(ours.composed(master, overrides)) == plain(hydra.load_sweep_config(master, overrides))


def refused(load: Callable[..., Any], *arguments: Any) -> str | None:
    """What Hydra says against it."""
    try:
        load(*arguments)
    except HydraException as error:
        return str(error)
    return None


def plain(config: Any) -> Any:
    whole: Any = OmegaConf.to_container(config, resolve=False)
    whole["hydra"]["job"].pop("override_dirname")  # of the folder that Hydra would make for a point, which is not made
    return whole


def test_values_do_not_compose_anew(loaders: tuple[Any, Any, PointLoader], monkeypatch: pytest.MonkeyPatch) -> None:
    hydra, master, _ = loaders
    composed: list[list[str]] = []
    real = hydra.load_sweep_config

    def counted(master: Any, overrides: list[str]) -> Any:
        composed.append(overrides)
        return real(master, overrides)

    monkeypatch.setattr(hydra, "load_sweep_config", counted)
    ours = PointLoader(hydra)
    for seed in range(5):
        for policy in ("fifo", "hybrid"):
            found = ours.load_sweep_config(master, [f"policy={policy}", "load.rate=3", f"seed={seed}"])
            assert (found.seed, found.policy._target_) == (seed, f"sage_policies.presets.{policy}")
            found.seed = 77  # a point may do what it likes with its own
    assert composed == [["policy=fifo"], ["policy=hybrid"]]
    copy.copy(ours).composed(master, ["policy=fifo", "seed=9"])  # as a worker gets it with every point
    assert len(composed) == 2
    PointLoader(hydra).composed(master, ["policy=fifo", "seed=9"])  # another sweep may have another master
    assert composed[2:] == [["policy=fifo"]]
    monkeypatch.setattr(loader, "KEPT", 2)
    ours.composed(master, ["policy=slo_aware"])
    assert len(loader._kept) == 2


def test_every_value_is_checked_and_not_every_combination() -> None:
    points = [[f"a={a}", f"b={b}", f"c={c}"] for a in range(4) for b in range(5) for c in range(6)]
    chosen = _each_value_once(points)
    assert {value for point in chosen for value in point} == {value for point in points for value in point}
    assert len(chosen) == 1 + 3 + 4 + 5
