"""Golden traces: what each preset dispatches, when and where, on a small overloaded workload.

A change here is a change of behaviour. If it is meant, regenerate (see scenarios.py), read the difference, commit both.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("golden_scenarios", Path(__file__).parent / "scenarios.py")
assert _spec is not None and _spec.loader is not None
scenarios = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = scenarios
_spec.loader.exec_module(scenarios)

PRESETS = sorted(scenarios.presets())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_dispatches_as_recorded(name):
    recorded = (scenarios.TRACES / f"{name}.txt").read_text().splitlines()
    assert scenarios.trace(scenarios.presets()[name], scenarios.crowd()) == recorded


@pytest.mark.parametrize("name", PRESETS)
def test_the_reference_mechanism_gives_the_same_trace(name):
    recorded = (scenarios.TRACES / f"{name}.txt").read_text().splitlines()
    assert scenarios.trace(scenarios.presets()[name], scenarios.crowd(), "reference") == recorded


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(PRESETS, 2)))
def test_no_two_presets_have_the_same_trace(one, other):
    assert (scenarios.TRACES / f"{one}.txt").read_text() != (scenarios.TRACES / f"{other}.txt").read_text()


def test_every_request_is_dispatched_once_in_every_trace():
    for name in PRESETS:
        tasks = [
            task for line in (scenarios.TRACES / f"{name}.txt").read_text().splitlines() for task in line.split()[2:]
        ]
        assert sorted(tasks, key=lambda task: int(task.split(".")[0])) == [f"{i}.0" for i in range(160)], name


@pytest.mark.parametrize("ingredient", scenarios.INGREDIENTS)
def test_each_ingredient_of_hybrid_changes_a_trace(ingredient):
    assert any(
        scenarios.trace(scenarios.without(ingredient), arrivals()) != scenarios.trace(scenarios.tight, arrivals())
        for arrivals in scenarios.SCENARIOS.values()
    )


def test_hybrid_differs_from_each_of_its_parts_alone():
    """Requirement 89: priority, deadlines and batching together are none of the three."""
    hybrid = scenarios.trace(scenarios.PRESETS["hybrid"], scenarios.crowd())
    parts = {
        "priority": scenarios.PRESETS["priority"],
        "slo_aware": scenarios.PRESETS["slo_aware"],
        "batching": lambda: scenarios.hybrid(
            laxity=False, classes=False, demotion=False, starvation=False, fairness=False, predicted_routing=False
        ),
    }
    for name, part in parts.items():
        assert scenarios.trace(part, scenarios.crowd()) != hybrid, name


def test_ingredients_are_all_of_hybrids_switches():
    import inspect

    switches = [p.name for p in inspect.signature(scenarios.hybrid).parameters.values() if p.default is True]
    assert sorted(switches) == sorted(scenarios.INGREDIENTS)
