"""Each preset's defining property, through the mechanism; and that every YAML builds the preset it is named after."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sage_bench.config import composed
from sage_core.errors import ConfigError
from sage_core.reference import Mechanism
from sage_core.units import MILLISECOND, NEVER, SECOND, PoolKind
from sage_policies import presets
from sage_policies.limit import EngineLimit, Partition
from sage_policies.predict import NoPrediction, TenantQuantile
from sage_policies.presets import PRESETS, preset
from sage_policies.route import LeastInFlight

CONF = Path(__file__).parents[2] / "conf" / "policy"
LLM, EMBEDDING = 0, 1
COSTS = (1e6, 1e5, 2e7, 1e5)


class Plane:
    """A mechanism with an LLM and an embedding pool, and defaults for everything a case does not mention."""

    def __init__(self, policy, llm=1, embedding=0, tasks_max=2, devices=None):
        self.mechanism = Mechanism()
        self.mechanism.add_pool("llm", PoolKind.LLM)
        self.mechanism.add_pool("embedding", PoolKind.EMBEDDING)
        for replica in range(llm + embedding):
            pool = LLM if replica < llm else EMBEDDING
            device = replica if devices is None else devices[replica]
            self.mechanism.join(pool, replica, device, tasks_max, 2048, 0, *COSTS)
        self.mechanism.bind(0, policy.order, policy.route, policy.limit)

    def queue(self, task, pool=LLM, *, priority=0, at=0, ttft_due=NEVER, due=NEVER, tokens=100, tenant=0):
        kind = 2 if pool == EMBEDDING else 0
        output = 0 if pool == EMBEDDING else 100
        row = (task, task, kind, tenant, priority, 0, at, at, ttft_due, due, tokens, output, output, 0)
        self.mechanism.enqueue(at, pool, *row)

    def decide(self, now=0):
        return self.mechanism.decide(now)

    def started(self, now=0):
        return [task for _, task in self.decide(now)]


def test_fifo_starts_in_order_of_arrival_and_keeps_the_rest_queued():
    plane = Plane(preset("fifo"), tasks_max=2)
    for task, (priority, due) in enumerate([(3, NEVER), (0, 10), (0, 5)]):
        plane.queue(task, priority=priority, due=due, at=task)
    assert plane.started(3) == [0, 1]
    assert plane.mechanism.queued() == 1


def test_priority_starts_no_lower_class_while_a_higher_one_fits():
    plane = Plane(preset("priority"), tasks_max=1)
    for task, priority in enumerate([2, 1, 0, 1, 0]):
        plane.queue(task, priority=priority, at=task)
    started = []
    while plane.mechanism.queued():
        for task in plane.started(10):
            started.append(task)
            plane.mechanism.finished(11, task, 1)
    assert started == [2, 4, 1, 3, 0]


def test_slo_aware_is_earliest_deadline_first():
    plane = Plane(preset("slo_aware"), tasks_max=1)
    for task, due in enumerate([NEVER, 9 * SECOND, 7 * SECOND, 8 * SECOND]):
        plane.queue(task, due=due)
    plane.queue(4, ttft_due=6 * SECOND, due=60 * SECOND)
    started = []
    while plane.mechanism.queued():
        for task in plane.started():
            started.append(task)
            plane.mechanism.finished(1, task, 1)
    assert started == [4, 2, 3, 1, 0]


def test_round_robin_takes_turns_and_queues_nothing():
    plane = Plane(preset("round_robin"), llm=3, tasks_max=1)
    for task in range(7):
        plane.queue(task)
    assert [replica for replica, _ in plane.decide()] == [0, 1, 2, 0, 1, 2, 0]
    assert plane.mechanism.queued() == 0


def test_least_in_flight_joins_the_shortest_queue_and_queues_nothing():
    plane = Plane(preset("least_in_flight"), llm=2, tasks_max=1)
    for task in range(4):
        plane.queue(task)
    assert [replica for replica, _ in plane.decide()] == [0, 1, 0, 1]
    plane.mechanism.finished(1, 1, 1)
    plane.mechanism.finished(1, 3, 1)
    plane.queue(9, at=1)
    plane.queue(10, at=1)
    assert [replica for replica, _ in plane.decide(1)] == [1, 1]


def test_separate_never_mixes_kinds_on_a_shared_device():
    # Four devices, each with an LLM replica (0-3) and an embedding replica (4-7).
    policy = presets.separate(shared_devices=[0, 1, 2, 3], llm_share=0.75)
    plane = Plane(policy, llm=4, embedding=4, devices=[0, 1, 2, 3, 0, 1, 2, 3])
    for task in range(20):
        plane.queue(task, LLM)
        plane.queue(task + 100, EMBEDDING)
    used = {replica for replica, _ in plane.decide()}
    assert used == {0, 1, 2, 7}


@pytest.mark.parametrize(
    ("devices", "share", "llm", "embedding"),
    [
        ([], 0.75, (), ()),
        ([5], 0.75, (), ()),
        ([1, 0], 0.0, (0,), (1,)),
        ([0, 1], 1.0, (0,), (1,)),
        ([3, 4, 5, 6], 0.5, (3, 4), (5, 6)),
        (range(8), 0.75, (0, 1, 2, 3, 4, 5), (6, 7)),
    ],
)
def test_separate_gives_each_part_its_share_and_at_least_one(devices, share, llm, embedding):
    limit = presets.separate(shared_devices=devices, llm_share=share).limit
    assert isinstance(limit, Partition)
    assert (tuple(limit.llm_devices), tuple(limit.embedding_devices)) == (llm, embedding)


def test_hybrid_keeps_slots_for_interactive_work():
    plane = Plane(presets.hybrid(reserve=0.5), tasks_max=4)
    for task in range(4):
        plane.queue(task, priority=1)
    assert plane.started() == [0, 1], "batch work leaves half of the slots"
    plane.queue(10, priority=0)
    assert plane.started() == [10]


def test_hybrid_keeps_urgent_work_out_of_the_engine_queue():
    plane = Plane(presets.hybrid(prefill_depth=1.0), tasks_max=64)
    for task in range(5):
        plane.queue(task, tokens=1000)
    assert plane.started() == [0, 1, 2], "3,000 tokens of prompts are more than one budget of 2,048"
    plane.queue(10, ttft_due=SECOND)
    plane.mechanism.started(0)
    assert plane.started() == [10], "it is next, although it came last"


def test_hybrid_holds_a_batch_behind_a_busy_embedding_engine_and_says_until_when():
    plane = Plane(presets.hybrid(window_s=0.005), llm=0, embedding=1, tasks_max=8)
    plane.queue(0, EMBEDDING)
    assert plane.started() == [0], "idle: at once"
    plane.queue(1, EMBEDDING, at=MILLISECOND)
    assert plane.started(MILLISECOND) == []
    assert plane.mechanism.wakeup_at == 6 * MILLISECOND
    assert plane.started(6 * MILLISECOND) == [1]


def test_hybrid_routes_to_the_faster_replica_until_it_is_the_later_one():
    policy = presets.hybrid()
    plane = Plane(policy, llm=0)
    plane.mechanism.join(LLM, 0, 0, 1000, 10**6, 0, 1e6, 2e5, 4e7, 1e5)
    plane.mechanism.join(LLM, 1, 1, 1000, 10**6, 0, 1e6, 1e5, 2e7, 1e5)
    for task in range(300):
        plane.queue(task)
    first = [replica for replica, _ in plane.decide()]
    assert first[0] == 1
    assert 0 < first.count(0) < first.count(1)


def test_hybrid_switches_reach_the_parts():
    off = presets.hybrid(predicted_routing=False, laxity=False, budget_s={"chat": 1, "generate": 2, "embedding": 3})
    assert isinstance(off.route, LeastInFlight)
    assert off.order.laxity is False and off.order.budget_ns == (SECOND, 2 * SECOND, 3 * SECOND)
    for name, parameter in inspect.signature(presets.hybrid).parameters.items():
        if parameter.annotation == "bool":
            on, turned = presets.hybrid(), presets.hybrid(**{name: not parameter.default})
            parts = [part for part in ("order", "route", "limit") if getattr(on, part) != getattr(turned, part)]
            assert len(parts) == (2 if name == "starvation" else 1), f"{name} changes {parts}"


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(ConfigError, match=r"hybird.*fifo, priority, slo_aware, hybrid"):
        preset("hybird")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"budget_s": {"chat": 1}}, "budget_s"),
        ({"budget_s": -1}, "budget_s"),
        ({"window_s": "soon"}, "window_s"),
        ({"starvation_s": 1e9}, "starvation_s"),
        ({"tpot_s": "abc"}, "tpot_s"),
        ({"batch_s": 0}, "batch_s"),
        ({"tpot_s": -1}, "tpot_s"),
        ({"fairness_weight": float("inf")}, "fairness_weight"),
        ({"share_penalty": float("inf")}, "route.share_penalty"),
        ({"prefix_load_factor": float("nan")}, ".*load_factor"),
    ],
)
def test_hybrid_names_the_wrong_parameter(arguments, named):
    with pytest.raises(ConfigError, match=f"policy.{named}"):
        presets.hybrid(**arguments)


def test_every_preset_has_a_yaml_of_its_name_and_no_yaml_a_preset_without_one():
    targets = {path.stem: str(OmegaConf.load(path).get("_target_", "")) for path in CONF.glob("*.yaml")}
    by_preset = {stem: target for stem, target in targets.items() if target.startswith("sage_policies.presets.")}
    assert by_preset == {name: f"sage_policies.presets.{name}" for name in PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_the_yaml_states_every_parameter_at_its_default(name):
    config = composed([f"policy={name}"]).policy
    policy = instantiate(config)
    default = preset(name)
    assert policy.name == default.name == name
    assert (policy.order, policy.limit, policy.admit) == (default.order, default.limit, default.admit)
    assert vars_of(policy.route) == vars_of(default.route)
    assert vars_of(policy.predict) == vars_of(default.predict)
    build: Callable[..., object] = PRESETS[name]
    assert config.keys() - {"_target_", "_convert_"} == inspect.signature(build).parameters.keys() - {"admit"}


def test_a_yaml_override_reaches_the_policy():
    policy = instantiate(composed(["policy=hybrid", "policy.demotion=false", "policy/predict=none"]).policy)
    assert policy.order == replace(preset("hybrid").order, demotion=False)
    assert isinstance(policy.predict, NoPrediction)


def test_parts_compose_from_yaml():
    config = OmegaConf.create(
        {
            "_target_": "sage_core.policy.Policy",
            "name": "mine",
            "admit": {"_target_": "sage_policies.admit.Feasible", "retry_after_ns": 5},
            "order": {
                "_target_": "sage_policies.order.WeightedSum",
                "_convert_": "all",
                "orders": [{"_target_": "sage_policies.order.Fifo"}, {"_target_": "sage_policies.order.ShortestFirst"}],
                "weights": [1.0, 2.0],
            },
            "route": {"_target_": "sage_policies.route.RoundRobin"},
            "limit": {"_target_": "sage_policies.limit.EngineLimit", "factor": None},
            "predict": {"_target_": "sage_policies.predict.TenantQuantile", "q": 0.9},
        }
    )
    policy = instantiate(config)
    assert policy.limit == EngineLimit(None) and policy.admit.retry_after_ns == 5
    assert isinstance(policy.predict, TenantQuantile) and policy.predict.q == 0.9
    plane = Plane(policy, tasks_max=1)
    plane.queue(0, tokens=9000)
    plane.queue(1, tokens=10)
    assert plane.started() == [1, 0]


def vars_of(part):
    return (type(part), getattr(part, "__dict__", None) and str(vars(part)))
