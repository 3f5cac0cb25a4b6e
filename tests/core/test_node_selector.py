"""Where replicas go: each strategy on clusters small enough to check by hand, and what holds on any cluster."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core.capacity import Capacity, Placement
from sage_core.cluster import Cluster, Gpu, Job, Needs, Node, Strategy
from sage_core.errors import ConfigError, InvariantViolation
from sage_core.node_selector import STRATEGIES, NodeSelector
from sage_core.plan import Plan, fits_nowhere, plan
from sage_core.unplaceable import Unplaceable, told


def node(name: str, cpus: float = 8, memory_gib: float = 32, gpus: tuple[Gpu, ...] = (), **fields: Any) -> Node:
    return Node(name, cpus, memory_gib, gpus, **fields)


def job(name: str, *needs: Needs, **fields: Any) -> Job:
    return Job(name, fields.pop("service", "llm"), "m", needs if len(needs) > 1 else needs[0], **fields)


CPU = Needs(4, 8)
WHOLE = Needs(1, 4, gpus=1)
SHARE = Needs(1, 4, gpus=1, gpu_memory_gib=10)
A100 = Gpu("a100_sxm", 80, 2)
L4 = Gpu("l4", 24)


def nodes_of(found: Plan, name: str = "") -> list[str]:
    return [each.place.node for each in found.placed if name in ("", each.job)]


def place(nodes: list[Node], strategy: Strategy, *jobs: Job) -> Plan:
    return plan(Cluster(tuple(nodes), jobs), strategy)


# --- strategies -----------------------------------------------------------------------------------------------------------


def test_pack_fills_one_node_before_it_uses_the_next() -> None:
    found = place([node("a"), node("b")], "pack", job("j", CPU, replicas=4))
    assert nodes_of(found) == ["a", "a", "b", "b"]


def test_pack_takes_the_node_that_it_leaves_least_of() -> None:
    found = place([node("a", cpus=64), node("b", cpus=4, memory_gib=8)], "pack", job("j", CPU))
    assert nodes_of(found) == ["b"]


def test_spread_takes_the_node_with_fewest_replicas_of_the_job_then_the_least_used() -> None:
    found = place([node("a"), node("b"), node("c", cpus=64, memory_gib=256)], "spread", job("j", CPU, replicas=3))
    assert nodes_of(found) == ["c", "a", "b"]


def test_cost_uses_what_is_paid_for_and_then_the_cheapest() -> None:
    nodes = [node("dear", price_per_h=3.0), node("cheap", price_per_h=1.0), node("unknown")]
    assert nodes_of(place(nodes, "cost", job("j", CPU, replicas=6))) == [
        "cheap",
        "cheap",
        "dear",
        "dear",
        "unknown",
        "unknown",
    ]


def test_cost_stays_on_a_dear_node_that_is_paid_for() -> None:
    nodes = [node("dear", price_per_h=3.0, labels={"disk": "fast"}), node("cheap", price_per_h=1.0)]
    first = job("first", Needs(1, 1, labels={"disk": "fast"}), priority=-1)
    assert nodes_of(place(nodes, "cost", first, job("then", CPU))) == ["dear", "dear"]


def test_cost_chooses_among_alternatives_too() -> None:
    nodes = [node("gpu", gpus=(L4,), price_per_h=0.8), node("cpu", price_per_h=0.7)]
    assert nodes_of(place(nodes, "cost", job("j", SHARE, CPU))) == ["cpu"]
    assert nodes_of(place(nodes, "pack", job("j", SHARE, CPU))) == ["gpu"]


def test_cpu_offload_keeps_gpus_for_llms_and_falls_back_to_them() -> None:
    nodes = [node("gpu", cpus=4, gpus=(L4,)), node("cpu", cpus=4)]
    embed = job("embed", SHARE, CPU, service="embedding", replicas=2)
    found = place(nodes, "cpu_offload", embed)
    assert nodes_of(found) == ["cpu", "gpu"]
    assert [each.place.gpus for each in found.placed] == [(), ()]  # the GPU node's CPUs before its GPU
    full = place([node("gpu", cpus=2, gpus=(L4,)), node("cpu", cpus=4)], "cpu_offload", embed)
    assert [each.place.gpus for each in full.placed] == [(), (0,)]


def test_cpu_offload_takes_cpus_of_an_idle_node_before_those_beside_gpus_in_use() -> None:
    nodes = [node("gpu", gpus=(L4,)), node("cpu")]
    found = place(nodes, "cpu_offload", job("chat", WHOLE, priority=-1), job("embed", CPU, service="embedding"))
    assert nodes_of(found) == ["gpu", "cpu"]


def test_cpu_offload_leaves_an_llm_where_it_wants_to_be() -> None:
    found = place([node("gpu", gpus=(L4,)), node("cpu")], "cpu_offload", job("chat", SHARE, CPU))
    assert found.placed[0].place.gpus == (0,)


def test_an_unknown_strategy_is_an_error() -> None:
    with pytest.raises(ConfigError, match="strategy: expected one of pack, spread, cost, cpu_offload, got 'best'"):
        NodeSelector("best")  # type: ignore[arg-type]


# --- what a node has ------------------------------------------------------------------------------------------------------


def test_engines_share_a_gpu_by_memory_until_it_is_full() -> None:
    found = place([node("a", gpus=(L4,))], "pack", job("j", SHARE, replicas=3))
    assert [each.place.gpus for each in found.placed] == [(0,), (0,)]
    assert "1 l4 with 4 of 24 GiB free" in str(found.unplaced[0].why)


def test_a_gpu_to_itself_is_shared_with_nobody() -> None:
    both = [node("a", gpus=(A100,))]
    assert [each.place.gpus for each in place(both, "pack", job("j", WHOLE, replicas=3)).placed] == [(0,), (1,)]
    mixed = place(both, "pack", job("first", SHARE, priority=-1), job("then", WHOLE, replicas=2))
    assert [(each.job, each.place.gpus) for each in mixed.placed] == [("first", (0,)), ("then", (1,))]


@pytest.mark.parametrize("first", ["whole", "crumb"])
def test_a_crumb_of_gpu_memory_is_room_too(first: str) -> None:
    crumb = Needs(1, 1, gpus=1, gpu_memory_gib=0.0001)
    jobs = job("whole", WHOLE, priority=int(first != "whole")), job("crumb", crumb, priority=int(first != "crumb"))
    assert len(place([node("a", gpus=(L4,))], "pack", *jobs).placed) == 1


def test_gpus_that_work_together_are_of_one_kind() -> None:
    two = Needs(1, 4, gpus=2, gpu_memory_gib=10)
    mixed = [node("a", gpus=(L4, Gpu("t4", 16)))]
    assert place(mixed, "pack", job("j", two)).placed == ()
    assert place([node("a", gpus=(L4, A100))], "pack", job("j", two)).placed[0].place.gpus == (1, 2)


def test_of_several_kinds_the_first_with_enough_is_taken_and_of_it_the_fullest_that_do() -> None:
    mixed = [node("a", gpus=(Gpu("l4", 24, 2), Gpu("t4", 16)))]
    jobs = (
        job("first", Needs(1, 1, 1, 4, "l4"), priority=-1),
        job("then", Needs(1, 1, 1, 4)),
        job("whole", WHOLE, priority=1),
    )
    assert [each.place.gpus for each in place(mixed, "pack", *jobs).placed] == [(0,), (0,), (1,)]


def test_type_labels_and_anti_affinity_are_obeyed() -> None:
    nodes = [node("a", gpus=(L4,), labels={"zone": "x"}), node("b", gpus=(A100,), labels={"zone": "y"})]
    assert nodes_of(place(nodes, "pack", job("j", Needs(1, 1, gpus=1, gpu_type="a100_sxm")))) == ["b"]
    assert nodes_of(place(nodes, "pack", job("j", Needs(1, 1, labels={"zone": "x"})))) == ["a"]
    apart = place(nodes, "pack", job("j", Needs(1, 1), replicas=3, anti_affinity=True))
    assert sorted(nodes_of(apart)) == ["a", "b"]
    assert str(apart.unplaced[0].why) == "a, b: holds a replica of it"


@pytest.mark.parametrize("first", ["j", "k"])
def test_apart_from_holds_whoever_comes_first(first: str) -> None:
    priority = {first: -1}
    one = job("j", Needs(1, 1), apart_from=("k",), priority=priority.get("j", 0))
    other = job("k", Needs(1, 1), priority=priority.get("k", 0))
    found = place([node("a"), node("b")], "pack", one, other)
    assert sorted(nodes_of(found)) == ["a", "b"]


def test_what_fits_nowhere_says_what_each_node_lacks() -> None:
    nodes = [node("a", gpus=(L4,)), node("b"), node("c")]
    why = fits_nowhere(nodes, job("j", Needs(2, 64, gpus=2, gpu_memory_gib=40, gpu_type="l4"), Needs(16, 8)))
    assert isinstance(why, Unplaceable)
    assert str(why) == (
        "a: 32 of 64 GiB free and GPUs: 1 l4 with 24 of 24 GiB free, or 8 of 16 CPUs free; "
        "b, c: 32 of 64 GiB free and GPUs: none, or 8 of 16 CPUs free"
    )
    assert told(Needs(2, 64, gpus=2, gpu_memory_gib=40, gpu_type="l4")) == "2 l4 GPUs with 40 GiB free, 2 CPUs, 64 GiB"


def test_more_than_is_free_cannot_be_booked() -> None:
    capacity = Capacity([node("a", cpus=4)])
    place_ = Placement("a", (), CPU)
    capacity.take(job("j", CPU), place_)
    with pytest.raises(InvariantViolation, match="more than is free"):
        capacity.take(job("j", CPU), place_)
    capacity.release(job("j", CPU), place_)
    assert capacity.cpus_free[0] == 4000 and capacity.replicas[0] == 0


def test_two_nodes_of_one_name_are_an_error() -> None:
    with pytest.raises(ConfigError, match="node 'a': two nodes have that name"):
        Capacity([node("a"), node("a")])


def test_a_plan_goes_by_priority_then_size_and_goes_on_after_a_failure() -> None:
    small, large, urgent = job("small", Needs(1, 1)), job("large", Needs(8, 8)), job("urgent", Needs(2, 2), priority=-1)
    huge = job("huge", Needs(99, 1), replicas=2)
    found = place([node("a", cpus=8)], "pack", small, large, huge, urgent)
    assert [each.job for each in found.placed] == ["urgent", "small"]
    assert [(each.job, each.replica) for each in found.unplaced] == [("large", 0), ("huge", 0)]


# --- any cluster ----------------------------------------------------------------------------------------------------------

TYPES = ("l4", "a100_sxm", "t4")
LABELS = st.dictionaries(st.sampled_from(("zone", "disk")), st.sampled_from(("x", "y")), max_size=2)
GPUS = st.builds(Gpu, st.sampled_from(TYPES), st.sampled_from((16.0, 24.0, 80.0)), st.integers(1, 4))


@st.composite
def needs_strategy(draw: st.DrawFn) -> Needs:
    gpus = draw(st.integers(0, 3))
    extra: dict[str, Any] = {}
    if gpus:
        extra = {
            "gpus": gpus,
            "gpu_memory_gib": draw(st.sampled_from((0.0, 0.3, 10.0, 20.0))),
            "gpu_type": draw(st.sampled_from((None, *TYPES))),
        }
    cpus, memory = draw(st.sampled_from((0.1, 0.3, 1.0, 4.0))), draw(st.sampled_from((0.5, 4.0, 20.0)))
    return Needs(cpus, memory, labels=draw(st.one_of(st.just({}), LABELS)), **extra)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    nodes = tuple(
        Node(
            f"n{i}",
            draw(st.sampled_from((0.9, 4.0, 16.0))),
            draw(st.sampled_from((8.0, 64.0))),
            tuple(draw(st.lists(GPUS, max_size=2))),
            draw(st.sampled_from((None, 0.5, 1.0, 3.0))),
            draw(LABELS),
        )
        for i in range(draw(st.integers(1, 5)))
    )
    names = [f"j{i}" for i in range(draw(st.integers(1, 6)))]
    jobs = tuple(
        Job(
            name,
            draw(st.sampled_from(("llm", "embedding", "operator"))),
            "m",
            tuple(draw(st.lists(needs_strategy(), min_size=1, max_size=2))),
            draw(st.integers(1, 5)),
            draw(st.booleans()),
            tuple(draw(st.lists(st.sampled_from(names), max_size=2, unique=True))) if draw(st.booleans()) else (),
            priority=draw(st.integers(-1, 1)),
        )
        for name in names
    )
    return Cluster(nodes, jobs)


def check_places(nodes: dict[str, Node], places: list[tuple[Job, Placement]]) -> None:
    """By sums of its own: nobody is where it cannot be, and no node has more than it has."""
    for name, here in nodes.items():
        on = [(job, place) for job, place in places if place.node == name]
        gpus = [(gpu.type, gpu.memory_gib, group) for group, gpu in enumerate(here.gpus) for _ in range(gpu.count)]
        assert sum(round(1000 * place.needs.cpus) for _, place in on) <= round(1000 * here.cpus)
        assert sum(round(1024 * place.needs.memory_gib) for _, place in on) <= round(1024 * here.memory_gib)
        taken = [0] * len(gpus)
        for job, place in on:
            needs = place.needs
            assert needs in job.alternatives
            assert here.labels.items() >= needs.labels.items()
            assert len(set(place.gpus)) == len(place.gpus) == needs.gpus
            assert len({gpus[gpu][2] for gpu in place.gpus}) <= 1
            for gpu in place.gpus:
                assert needs.gpu_type in (None, gpus[gpu][0])
                taken[gpu] += round(1024 * (needs.gpu_memory_gib or gpus[gpu][1]))
        assert all(used <= round(1024 * memory) for used, (_, memory, _) in zip(taken, gpus, strict=True))
        names = [job.name for job, _ in on]
        for job, _ in on:
            assert not (job.anti_affinity and names.count(job.name) > 1)
            assert not {each for each in job.apart_from if each != job.name} & set(names)


@settings(max_examples=80, deadline=None)
@given(clusters(), st.sampled_from(STRATEGIES), st.randoms(use_true_random=False))
def test_any_plan_keeps_every_rule_and_does_not_depend_on_the_order_of_the_file(
    cluster: Cluster, strategy: Strategy, random: Any
) -> None:
    found = plan(cluster, strategy)
    jobs = {job.name: job for job in cluster.jobs}
    check_places({node.name: node for node in cluster.nodes}, [(jobs[each.job], each.place) for each in found.placed])
    placed = {name: sum(each.job == name for each in found.placed) for name in jobs}
    missing = {each.job: jobs[each.job].replicas - each.replica for each in found.unplaced}
    assert all(placed[name] + missing.get(name, 0) == jobs[name].replicas for name in jobs)
    shuffled = Cluster(
        tuple(random.sample(cluster.nodes, len(cluster.nodes))), tuple(random.sample(cluster.jobs, len(jobs)))
    )
    assert plan(shuffled, strategy) == found


@settings(max_examples=50, deadline=None)
@given(clusters(), st.sampled_from(STRATEGIES))
def test_nobody_is_refused_who_would_fit(cluster: Cluster, strategy: Strategy) -> None:
    """Each node by itself, without the columns: a replica that got no place has none on any node."""
    found = plan(cluster, strategy)
    jobs = {job.name: job for job in cluster.jobs}
    places = [(jobs[each.job], each.place) for each in found.placed]
    for each in found.unplaced:
        refused = jobs[each.job]
        if each.job in refused.apart_from:
            continue
        for here in cluster.nodes:
            on = [(job, place) for job, place in places if place.node == here.name]
            alone = Capacity([here])
            for job_, place_ in on:
                alone.take(job_, place_)
            # The last state of the plan has less room than when it was refused, so only this direction can be asked.
            if isinstance(NodeSelector(strategy).place(alone, refused), Placement):
                pytest.fail(f"{refused.name} fits on {here.name}")


# --- the meaning, one node at a time --------------------------------------------------------------------------------------


class Slow:
    """What NodeSelector means, written without columns: each node asked by itself, the least key wins."""

    def __init__(self, cluster: Cluster, strategy: Strategy) -> None:
        self.nodes = sorted(cluster.nodes, key=lambda node: node.name)
        self.strategy = strategy
        self.held: list[tuple[Job, Placement]] = []

    def place(self, job: Job) -> tuple[str, tuple[int, ...], Needs] | None:
        alternatives = list(job.alternatives)
        if self.strategy == "cpu_offload" and job.service == "embedding":
            alternatives = [each for each in alternatives if not each.gpus] + [
                each for each in alternatives if each.gpus
            ]
        found = []
        for number, needs in enumerate(alternatives):
            keys = [(self._key(node, job, needs), node.name) for node in self.nodes if self._fits(node, job, needs)]
            if keys:
                key, name = min(keys)
                node = next(each for each in self.nodes if each.name == name)
                added = key[0] if self.strategy == "cost" else number
                found.append((added, number, (name, self._gpus(node, needs) or (), needs)))
        return min(found, key=lambda each: each[:2])[2] if found else None

    def _on(self, node: Node) -> list[tuple[Job, Placement]]:
        return [each for each in self.held if each[1].node == node.name]

    def _free(self, node: Node) -> tuple[int, int, list[int]]:
        """Thousandths of CPUs, MiB, MiB of each GPU."""
        gpus = [round(1024 * gpu.memory_gib) for gpu in node.gpus for _ in range(gpu.count)]
        whole = list(gpus)
        for _, place in self._on(node):
            for gpu in place.gpus:
                gpus[gpu] -= round(1024 * place.needs.gpu_memory_gib) or whole[gpu]
        cpus = round(1000 * node.cpus) - sum(round(1000 * place.needs.cpus) for _, place in self._on(node))
        memory = sum(round(1024 * place.needs.memory_gib) for _, place in self._on(node))
        return cpus, round(1024 * node.memory_gib) - memory, gpus

    def _fits(self, node: Node, job: Job, needs: Needs) -> bool:
        cpus, memory, _ = self._free(node)
        others = [other for other, _ in self._on(node)]
        apart = any(other.name in job.apart_from or job.name in other.apart_from for other in others)
        return (
            cpus >= round(1000 * needs.cpus)
            and memory >= round(1024 * needs.memory_gib)
            and all(node.labels.get(key) == value for key, value in needs.labels.items())
            and not apart
            and not (job.anti_affinity and any(other.name == job.name for other in others))
            and self._gpus(node, needs) is not None
        )

    def _gpus(self, node: Node, needs: Needs) -> tuple[int, ...] | None:
        free, first = self._free(node)[2], 0
        for gpu in node.gpus:
            wanted = round(1024 * (needs.gpu_memory_gib or gpu.memory_gib))
            usable = [at for at in range(first, first + gpu.count) if free[at] >= wanted]
            if needs.gpu_type in (None, gpu.type) and len(usable) >= needs.gpus:
                return tuple(sorted(sorted(usable, key=lambda at: (free[at], at))[: needs.gpus]))
            first += gpu.count
        return None if needs.gpus else ()

    def _key(self, node: Node, job: Job, needs: Needs) -> tuple[float, ...]:
        cpus, memory, gpus = self._free(node)
        totals = [round(1024 * gpu.memory_gib) for gpu in node.gpus for _ in range(gpu.count)]
        each = 1024 * needs.gpu_memory_gib if needs.gpu_memory_gib else sum(totals) / max(len(totals), 1)
        left = [
            (cpus - round(1000 * needs.cpus)) / max(round(1000 * node.cpus), 1),
            (memory - round(1024 * needs.memory_gib)) / max(round(1024 * node.memory_gib), 1),
            (sum(gpus) - needs.gpus * each) / max(sum(totals), 1),
        ]
        idle = not self._on(node)
        match self.strategy:
            case "pack":
                return idle, sum(left)
            case "spread":
                here = sum(other.name == job.name for other, _ in self._on(node))
                return here, -min(left if needs.gpus else left[:2])
            case "cost":
                price = float("inf") if node.price_per_h is None else node.price_per_h
                return price if idle else 0.0, sum(left)
            case "cpu_offload":
                return bool(node.gpus) and not needs.gpus, idle, sum(left)


@settings(max_examples=80, deadline=None)
@given(clusters(), st.sampled_from(STRATEGIES))
def test_each_choice_is_that_of_the_slow_selector(cluster: Cluster, strategy: Strategy) -> None:
    slow, capacity, selector = Slow(cluster, strategy), Capacity(cluster.nodes), NodeSelector(strategy)
    for each in cluster.jobs:
        for _ in range(each.replicas):
            place_ = selector.place(capacity, each)
            assert (None if place_ is None else (place_.node, place_.gpus, place_.needs)) == slow.place(each)
            if place_ is not None:
                capacity.take(each, place_)
                slow.held.append((each, place_))
