"""The named policies. Each function builds a :class:`sage_core.policy.Policy`; ``conf/policy/<name>.yaml`` calls it.

================  ======================================  ==========================  ===============================
name              order                                   route                       in flight, per replica
================  ======================================  ==========================  ===============================
fifo              arrival                                 least in flight             the engine's concurrency
priority          strict priority, then arrival           least in flight             the engine's concurrency
slo_aware         earliest due time                       least outstanding tokens    the engine's concurrency
hybrid            least laxity (docs/hybrid.md)           predicted finish            HybridLimit
round_robin       arrival                                 round robin                 unlimited: a plain router
least_in_flight   arrival                                 least in flight             unlimited: a plain router
separate          arrival                                 least in flight in a part   the engine's concurrency
================  ======================================  ==========================  ===============================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from sage_core.errors import ConfigError
from sage_core.policy import Admit, Order, Policy, Predict, Route
from sage_core.slo import SloTable
from sage_core.units import NEVER, seconds
from sage_policies.bounds import require
from sage_policies.hybrid import HybridLimit, HybridOrder
from sage_policies.limit import EngineLimit
from sage_policies.order import EarliestDeadline, Fifo, PriorityOrder
from sage_policies.predict import MaxPrediction, TenantQuantile
from sage_policies.route import LeastInFlight, LeastOutstandingTokens, Partition, PredictedFinish, RoundRobin


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
    route = Partition(LeastInFlight(), llm, embedding)
    return _preset("separate", Fifo(), route, EngineLimit(limit_factor), predict, admit)


def hybrid(
    laxity: bool = True,
    budget_s: Mapping[str, float] | float = 60.0,
    classes: bool = True,
    priority_spacing_s: float = 5.0,
    demotion: bool = True,
    late_margin: float = 0.25,
    starvation: bool = True,
    starvation_s: float = 30.0,
    starvation_bypass: int = 8,
    fairness: bool = True,
    fairness_weight: float = 1.0,
    fairness_cap_s: float = 5.0,
    in_flight_limits: bool = True,
    reserve: float = 0.1,
    prefill_depth: float = 0.5,
    kv_fill: float = 0.95,
    embedding_batches: bool = True,
    window_s: float = 0.005,
    margin_s: float = 0.002,
    predicted_routing: bool = True,
    share_penalty: float = 0.5,
    predict: Predict | None = None,
    admit: Admit | None = None,
    name: str = "hybrid",
) -> Policy:
    """Least laxity with demotion, fairness and anti-starvation; see ``HybridOrder`` and ``HybridLimit``.

    The booleans switch ingredients off one by one; name tells such variants apart in results. budget_s: one number, or one per kind (chat, generate, embedding).
    """
    order = HybridOrder(
        laxity=laxity,
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
        reserve=reserve,
        prefill_depth=prefill_depth,
        kv_fill=kv_fill,
        embedding_batches=embedding_batches,
        window_ns=_span("window_s", window_s),
        margin_ns=_span("margin_s", margin_s),
        starvation_ns=_span("starvation_s", starvation_s) if starvation else NEVER,
    )
    route: Route = PredictedFinish(share_penalty) if predicted_routing else LeastInFlight()
    return Policy(name, admit, order, route, limit, TenantQuantile() if predict is None else predict)


PRESETS: Final[Mapping[str, Callable[..., Policy]]] = {
    "fifo": fifo,
    "priority": priority,
    "slo_aware": slo_aware,
    "hybrid": hybrid,
    "round_robin": round_robin,
    "least_in_flight": least_in_flight,
    "separate": separate,
}


def preset(name: str) -> Policy:
    """The preset of that name with its defaults; an unknown name is an error, never a silent default."""
    if name not in PRESETS:
        raise ConfigError(f"policy: unknown name {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def _preset(
    name: str, order: Order, route: Route, limit: EngineLimit, predict: Predict | None, admit: Admit | None
) -> Policy:
    return Policy(name, admit, order, route, limit, MaxPrediction() if predict is None else predict)


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
