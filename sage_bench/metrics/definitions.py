"""Every metric by name: what it means, its unit, and which way is better.

The report prints these sentences and ``docs/metrics.md`` explains them; a test keeps the two together. A metric's name is
its column in the tables, with the unit last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from sage_core.units import MILLISECOND, SECOND


@dataclass(frozen=True, slots=True)
class Metric:
    """unit, scale: what is printed is ``value / scale`` in ``unit``. better: None where neither way is."""

    name: str
    label: str
    unit: str
    scale: float
    better: Literal["higher", "lower"] | None
    definition: str


LATENCIES: Final = {
    "ttft_ns": ("TTFT", "scheduled arrival to first token, of the responded requests that generate"),
    "tpot_ns": ("TPOT", "(E2E - TTFT) / (output tokens - 1), of the responded requests with two output tokens or more"),
    "e2e_ns": ("E2E", "scheduled arrival to complete response, of the responded requests"),
    "queue_ns": ("queued", "time a request's tasks spent queued in the plane, of the dispatched requests"),
}
"""Distributions. Each gives ``_mean``, ``_p50``, ``_p95``, ``_p99`` and ``_samples``."""

_SCALES: Final = {
    "ttft_ns": ("s", SECOND),
    "tpot_ns": ("ms", MILLISECOND),
    "e2e_ns": ("s", SECOND),
    "queue_ns": ("s", SECOND),
}


def _latencies() -> list[Metric]:
    metrics = []
    for column, (label, meaning) in LATENCIES.items():
        unit, scale = _SCALES[column]
        for part, name in (("mean", "mean"), ("p50", "p50"), ("p95", "p95"), ("p99", "p99")):
            metrics.append(Metric(f"{column}_{part}", f"{label} {name}", unit, scale, "lower", f"{name} of: {meaning}"))
    return metrics


METRICS: Final = {
    metric.name: metric
    for metric in [
        Metric("offered", "offered", "requests", 1, None, "requests that arrived in the counted window"),
        Metric("responded", "responded", "requests", 1, None, "of the offered, answered completely"),
        Metric("rejected", "rejected", "requests", 1, None, "of the offered, refused by admission"),
        Metric("cancelled", "cancelled", "requests", 1, None, "of the offered, given up by the client"),
        Metric("failed", "failed", "requests", 1, None, "of the offered, not completed for another reason"),
        Metric("slo_attainment", "SLO", "%", 0.01, "higher", "good / offered, where good means responded with no objective missed"),
        Metric("throughput_rps", "throughput", "req/s", 1, "higher", "responded / makespan"),
        Metric("goodput_rps", "goodput", "req/s", 1, "higher", "good / makespan"),
        Metric("output_tokens_per_s", "output", "tok/s", 1, "higher", "output tokens of responded requests / makespan"),
        Metric("tokens_per_s", "tokens", "tok/s", 1, "higher", "input and output tokens of responded requests / makespan"),
        *_latencies(),
        Metric("wait_ns_max", "wait max", "s", SECOND, "lower", "longest time a request was queued, dispatched or not (starvation)"),
        Metric("queue_depth_mean", "queue mean", "tasks", 1, "lower", "time average of queued tasks over the arrival window"),
        Metric("queue_depth_max", "queue max", "tasks", 1, "lower", "most tasks queued at one instant of the arrival window"),
        Metric("hol_blocked", "blocked", "tasks", 1, "lower", "tasks queued while a less urgent task was dispatched from their pool (head-of-line blocking)"),
        Metric("overtaken", "overtaken", "tasks", 1, "lower", "of the blocked, those where the less urgent task had been queued later"),
        Metric("jain_service", "Jain service", "", 1, "higher", "Jain index over tenants of (responded by the end of the arrival window / offered)"),
        Metric("jain_slo", "Jain SLO", "", 1, "higher", "Jain index over tenants of SLO attainment"),
        Metric("utilisation", "busy", "%", 0.01, None, "time a replica had work, of its time in the arrival window, mean over replicas"),
        Metric("utilisation_sd", "busy sd", "%", 0.01, "lower", "standard deviation over nodes of their mean utilisation (its square is the variance)"),
        Metric("idle_ns", "idle", "s", SECOND, None, "time without any task, of its time in the arrival window, summed over devices with an engine"),
        Metric("idle_gaps", "gaps", "", 1, None, "number of such idle stretches"),
        Metric("idle_gap_ns_max", "gap max", "s", SECOND, None, "longest such idle stretch"),
        Metric("control_ns_per_request", "in the plane", "us/req", 1000, None, "CPU time spent inside the control plane, per request of the run"),
        Metric("control_overhead", "overhead", "%", 0.01, None, "time in the plane per request / mean E2E"),
        Metric("machine_cpu_mean", "machine", "%", 0.01, None, "CPU time over that of all cores of the machine that a live run was made on, mean over the arrival window"),
        Metric("machine_cpu_max", "machine max", "%", 0.01, None, "the same, most in a second"),
        Metric("gateway_cpu_mean", "gateway", "%", 0.01, None, "CPU time of the gateway of a live run over that of one core, mean over the arrival window"),
        Metric("gateway_cpu_max", "gateway max", "%", 0.01, None, "the same, most in a second"),
        Metric("generator_cpu_mean", "generator", "%", 0.01, None, "CPU time of all processes of the load generator over that of one core, mean over the arrival window"),
        Metric("generator_cpu_max", "generator max", "%", 0.01, None, "the same, most in a second"),
        Metric("cost_per_1k", "cost", "USD/1k", 1, "lower", "price of the cluster over the makespan, per 1,000 responded requests"),
        Metric("cost_per_1m_tokens", "cost tok", "USD/1M", 1, "lower", "the same price per million input and output tokens of responded requests"),
        Metric("cost_per_1m_output_tokens", "cost out", "USD/1M", 1, "lower", "the same price per million output tokens of responded requests"),
        Metric("power_w", "power", "kW", 1000, "lower", "energy of the devices over the whole run / its duration"),
        Metric("energy_j_per_1k", "energy", "kJ/1k", 1000, "lower", "energy of the devices over the whole run, per 1,000 responded requests of the whole run"),
        Metric("energy_j_per_1m_tokens", "energy tok", "kJ/1M", 1000, "lower", "the same energy per million input and output tokens of responded requests"),
        Metric("energy_j_per_1m_output_tokens", "energy out", "kJ/1M", 1000, "lower", "the same energy per million output tokens of responded requests"),
    ]
}  # fmt: skip
"""By name, in the order of the tables."""

OVERALL: Final = (
    "queue_depth_mean",
    "queue_depth_max",
    "hol_blocked",
    "overtaken",
    "jain_service",
    "jain_slo",
    "utilisation",
    "utilisation_sd",
    "idle_ns",
    "idle_gaps",
    "idle_gap_ns_max",
    "control_ns_per_request",
    "control_overhead",
    "machine_cpu_mean",
    "machine_cpu_max",
    "gateway_cpu_mean",
    "gateway_cpu_max",
    "generator_cpu_mean",
    "generator_cpu_max",
    "cost_per_1k",
    "cost_per_1m_tokens",
    "cost_per_1m_output_tokens",
    "power_w",
    "energy_j_per_1k",
    "energy_j_per_1m_tokens",
    "energy_j_per_1m_output_tokens",
)
"""Metrics of a whole run; a class of requests has none."""
