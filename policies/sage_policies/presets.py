"""The named policies. Each function builds a :class:`sage_core.policy.Policy`; ``conf/policy/<name>.yaml`` calls it.

=================  ======================================  =========================  =========================
preset             order                                   route                      in flight, per replica
=================  ======================================  =========================  =========================
fifo               arrival                                 least in flight            the engine's concurrency
priority           strict priority, then arrival           least in flight            the engine's concurrency
slo_aware          earliest due time                       least outstanding tokens   the engine's concurrency
hybrid             least laxity (docs/hybrid.md)           predicted finish           HybridLimit
round_robin        arrival                                 round robin                unlimited: a plain router
least_in_flight    arrival                                 least in flight            unlimited: a plain router
separate           arrival                                 least in flight            the same, in a part each
upstream_hybrid    priority, arrival; embeddings: arrival  least load last reported   unlimited: a plain router
power_of_two       arrival                                 less expected wait of two  unlimited: a plain router
prefix_affinity    arrival                                 by prefix, load bounded    unlimited: a plain router
predicted_latency  arrival                                 headroom to the objective  unlimited: a plain router
spjf               least predicted work                    least in flight            the engine's concurrency
wspt               least predicted work over weight        least in flight            the engine's concurrency
edf                earliest due time                       least in flight            the engine's concurrency
qlm                deadline groups                         least expected wait        the engine's concurrency
shedding           arrival; refuses at saturation          least in flight            unlimited: a plain router
vtc                least served tenant                     least in flight            the engine's concurrency
=================  ======================================  =========================  =========================

Each with its source, and what is ours in the reading of it: docs/policies.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from sage_core.errors import ConfigError
from sage_core.policy import Admit, Limit, Order, Policy, Predict, Route
from sage_core.slo import SloTable
from sage_core.units import NEVER, seconds
from sage_policies.affinity import PrefixAffinity, PrefixHome
from sage_policies.bounds import require
from sage_policies.headroom import Headroom
from sage_policies.hybrid import HybridLimit, HybridOrder
from sage_policies.limit import EngineLimit, Partition
from sage_policies.order import EarliestDeadline, Fifo, PriorityOrder
from sage_policies.power_of_two import PowerOfTwo
from sage_policies.predict import MaxPrediction, TenantQuantile
from sage_policies.qlm import DeadlineGroups
from sage_policies.route import LeastInFlight, LeastOutstandingTokens, PredictedFinish, RoundRobin
from sage_policies.shedding import ShedAtSaturation
from sage_policies.upstream import UpstreamOrder, UpstreamRoute
from sage_policies.vtc import LeastServed
from sage_policies.wait import LeastExpectedWait
from sage_policies.work import ShortestWork


def fifo(limit_factor: float = 1.0, predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """First come, first served; the plane keeps what the engines cannot run."""
    return _preset("fifo", Fifo(), LeastInFlight(), EngineLimit(limit_factor), predict, admit)


def priority(limit_factor: float = 1.0, predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """No lower class starts while a higher one is queued and fits."""
    return _preset("priority", PriorityOrder(), LeastInFlight(), EngineLimit(limit_factor), predict, admit)


def slo_aware(limit_factor: float = 1.0, predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """Earliest deadline first."""
    limit = EngineLimit(limit_factor)
    return _preset("slo_aware", EarliestDeadline(), LeastOutstandingTokens(), limit, predict, admit)


def round_robin(predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """A plain router that takes turns; all queues are in the engines."""
    return _preset("round_robin", Fifo(), RoundRobin(), EngineLimit(None), predict, admit)


def least_in_flight(predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """A plain router that joins the shortest queue; all queues are in the engines."""
    return _preset("least_in_flight", Fifo(), LeastInFlight(), EngineLimit(None), predict, admit)


def separate(
    shared_devices: Sequence[int] = (),
    llm_share: float = 0.75,
    limit_factor: float = 1.0,
    predict: Predict | None = None,
    admit: Admit | None = None,
) -> Policy:
    """A static split: of the devices that host both kinds, the first ``llm_share`` serve LLM, the rest embeddings.

    Devices not in ``shared_devices`` serve whatever they host. With at least two shared devices each part gets one.
    """
    require("llm_share", llm_share, 0.0, 1.0)
    devices = sorted(shared_devices)
    cut = min(max(int(llm_share * len(devices) + 0.5), 1), len(devices) - 1)
    llm, embedding = (devices[:cut], devices[cut:]) if len(devices) > 1 else ([], [])
    limit = Partition(EngineLimit(limit_factor), llm, embedding)
    return _preset("separate", Fifo(), LeastInFlight(), limit, predict, admit)


def hybrid(
    laxity: bool = True,
    shortest: bool = True,
    work_weight: float = 5.0,
    budget_s: Mapping[str, float] | float = 60.0,
    classes: bool = True,
    priority_spacing_s: float = 5.0,
    demotion: bool = True,
    late_margin: float = 0.2,
    starvation: bool = True,
    starvation_s: float = 30.0,
    starvation_bypass: int = 32,
    fairness: bool = True,
    fairness_weight: float = 1.0,
    fairness_cap_s: float = 0.5,
    in_flight_limits: bool = True,
    tpot_limit: bool = True,
    tpot_s: float | None = 0.05,
    tpot_fill: float = 0.8,
    reserve: float = 0.1,
    prefill_depth: float = 2.0,
    kv_fill: float = 0.95,
    embedding_batches: bool = True,
    batch_s: float | None = 0.02,
    window_s: float = 0.005,
    margin_s: float = 0.002,
    predicted_routing: bool = True,
    share_penalty: float = 0.5,
    prefix_routing: bool = False,
    prefix_load_factor: float = 1.25,
    prefix_wait_s: float = 3.0,
    predict: Predict | None = None,
    admit: Admit | None = None,
    name: str = "hybrid",
) -> Policy:
    """Least laxity, short work first, with demotion, fairness and anti-starvation; see ``HybridOrder`` and ``HybridLimit``.

    The booleans switch ingredients off one by one; name tells such variants apart in results. budget_s: one number, or
    one per kind (chat, generate, embedding). tpot_s: what a token may take, of which ``tpot_fill`` is used; None: no
    limit. batch_s: work of an embedding batch; None: the engine's own size. prefix_routing: prompts that share a prefix go to one replica, see ``PrefixHome``; it pays with many prefixes
    and costs with one that is hot, so it is off.
    """
    require("tpot_fill", tpot_fill, 0.0, 1e3)
    if tpot_s is not None:
        require("tpot_s", tpot_s, 0.0, 1e6)
    order = HybridOrder(
        laxity=laxity,
        shortest=shortest,
        work_weight=work_weight,
        budget_ns=_budgets(budget_s),
        classes=classes,
        priority_spacing_ns=_span("priority_spacing_s", priority_spacing_s),
        demotion=demotion,
        late_margin=late_margin,
        starvation=starvation,
        starvation_ns=_span("starvation_s", starvation_s),
        starvation_bypass=starvation_bypass,
        fairness=fairness,
        fairness_weight=fairness_weight,
        fairness_cap_ns=_span("fairness_cap_s", fairness_cap_s),
    )
    limit = HybridLimit(
        in_flight_limits=in_flight_limits,
        tpot_limit=tpot_limit,
        tpot_ns=0 if tpot_s is None else _span("tpot_s", tpot_s * tpot_fill),
        reserve=reserve,
        prefill_depth=prefill_depth,
        kv_fill=kv_fill,
        embedding_batches=embedding_batches,
        batch_ns=0 if batch_s is None else _span("batch_s", batch_s, 1e-9),
        window_ns=_span("window_s", window_s),
        margin_ns=_span("margin_s", margin_s),
        starvation_ns=_span("starvation_s", starvation_s) if starvation else NEVER,
    )
    route: Route = PredictedFinish(share_penalty) if predicted_routing else LeastInFlight()
    homes = PrefixHome(route, prefix_load_factor, _span("prefix_wait_s", prefix_wait_s))
    route = homes if prefix_routing else route
    return Policy(name, admit, order, route, limit, TenantQuantile() if predict is None else predict)


def upstream_hybrid(
    shared_devices: Sequence[int] = (),
    counted: bool = False,
    predict: Predict | None = None,
    admit: Admit | None = None,
) -> Policy:
    """The published upstream system's hybrid policy, reimplemented; see ``sage_policies.upstream``.

    shared_devices: devices that also host an LLM engine, which embeddings avoid. counted: never stale loads.
    """
    route = UpstreamRoute(shared_devices, counted)
    return _preset("upstream_hybrid", UpstreamOrder(), route, EngineLimit(None), predict, admit)


def power_of_two(predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """A plain router that draws two replicas and takes the one with less expected wait."""
    return _preset("power_of_two", Fifo(), PowerOfTwo(), EngineLimit(None), _learned(predict), admit)


def prefix_affinity(load_factor: float = 1.25, predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """A plain router that keeps a prompt prefix on one replica while its load allows."""
    return _preset("prefix_affinity", Fifo(), PrefixAffinity(load_factor), EngineLimit(None), predict, admit)


def predicted_latency(pack: bool = False, predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """A plain router by predicted latency: among replicas that meet the objective, the most headroom (or the least)."""
    return _preset("predicted_latency", Fifo(), Headroom(pack), EngineLimit(None), _learned(predict), admit)


def spjf(limit_factor: float = 1.0, predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """Shortest predicted job first."""
    limit = EngineLimit(limit_factor)
    return _preset("spjf", ShortestWork(), LeastInFlight(), limit, _learned(predict), admit)


def wspt(
    levels: int = 4, limit_factor: float = 1.0, predict: Predict | None = None, admit: Admit | None = None
) -> Policy:
    """Weighted shortest predicted job first; levels: of priority, the most urgent has that weight."""
    limit = EngineLimit(limit_factor)
    return _preset("wspt", ShortestWork(levels), LeastInFlight(), limit, _learned(predict), admit)


def edf(limit_factor: float = 1.0, predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """Earliest deadline first and nothing else: ``slo_aware`` with the plainest route."""
    return _preset("edf", EarliestDeadline(), LeastInFlight(), EngineLimit(limit_factor), predict, admit)


def qlm(
    group_s: float = 1.0, limit_factor: float = 1.0, predict: Predict | None = None, admit: Admit | None = None
) -> Policy:
    """Deadline groups, each to the replica with the least expected wait."""
    order = DeadlineGroups(_span("group_s", group_s, 1e-9))
    return _preset("qlm", order, LeastExpectedWait(), EngineLimit(limit_factor), _learned(predict), admit)


def shedding(
    power: int = 5,
    scale: float = 300.0,
    waiting_max: int = 5,
    kv_fill: float = 0.8,
    predict: Predict | None = None,
) -> Policy:
    """A plain router that refuses work of priority above 0 by chance as the engines fill."""
    admit = ShedAtSaturation(power, scale, waiting_max, kv_fill)
    return _preset("shedding", Fifo(), LeastInFlight(), EngineLimit(None), _learned(predict), admit)


def vtc(limit_factor: float = 1.0, predict: Predict | None = None, admit: Admit | None = None) -> Policy:
    """The tenant that was served least goes next: virtual token counters."""
    return _preset("vtc", LeastServed(), LeastInFlight(), EngineLimit(limit_factor), _learned(predict), admit)


PRESETS: Final[Mapping[str, Callable[..., Policy]]] = {
    "fifo": fifo,
    "priority": priority,
    "slo_aware": slo_aware,
    "hybrid": hybrid,
    "round_robin": round_robin,
    "least_in_flight": least_in_flight,
    "separate": separate,
    "upstream_hybrid": upstream_hybrid,
    "power_of_two": power_of_two,
    "prefix_affinity": prefix_affinity,
    "predicted_latency": predicted_latency,
    "spjf": spjf,
    "wspt": wspt,
    "edf": edf,
    "qlm": qlm,
    "shedding": shedding,
    "vtc": vtc,
}


def preset(name: str) -> Policy:
    """The preset of that name with its defaults; an unknown name is an error, never a silent default."""
    if name not in PRESETS:
        raise ConfigError(f"policy: unknown name {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def _preset(
    name: str, order: Order, route: Route, limit: Limit, predict: Predict | None, admit: Admit | None
) -> Policy:
    return Policy(name, admit, order, route, limit, MaxPrediction() if predict is None else predict)


def _learned(predict: Predict | None) -> Predict:
    return TenantQuantile() if predict is None else predict


def _span(name: str, value: float, low: float = 0.0) -> int:
    """Seconds to nanoseconds; at most 1e6 s, which keeps scores exact."""
    require(name, value, low, 1e6)
    return seconds(value)


def _budgets(budget_s: Mapping[str, float] | float) -> tuple[int, int, int]:
    if not isinstance(budget_s, Mapping):
        span = _span("budget_s", budget_s)
        return span, span, span
    if sorted(budget_s) != sorted(SloTable.KINDS):
        raise ConfigError(f"policy.budget_s: expected the keys {', '.join(SloTable.KINDS)}, got {', '.join(budget_s)}")
    chat, generate, embedding = (_span(f"budget_s.{kind}", budget_s[kind]) for kind in SloTable.KINDS)
    return chat, generate, embedding
