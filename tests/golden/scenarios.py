"""Small overloaded workloads without a random number, and the dispatches that a policy makes of them.

Arrivals follow arithmetic patterns and the engines have fixed coefficients, so a trace depends on the policy and the
core alone: no profile, no generator and no library version moves it. Regenerate with ``python tests/golden/scenarios.py``
and read the difference before committing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sage_core.commands import AnyCommand, Dispatch
from sage_core.events import AnyEvent, RequestArrived
from sage_core.load import Arrival
from sage_core.native_plane import make_plane
from sage_core.pipeline import single_request_pipelines
from sage_core.policy import Policy
from sage_core.rng import Streams
from sage_core.units import MILLISECOND, NEVER, SECOND, Nanos, RequestKind
from sage_policies.presets import PRESETS, hybrid, separate
from sage_sim.driver import SimDriver
from sage_sim.engine import EmbedReplica, LlmReplica, SimulatedDevice
from sage_sim.iteration import IterationTime
from sage_sim.network import NetworkConfig

TRACES = Path(__file__).parent / "traces"

LLM_TIME = IterationTime(
    token_knots=(1, 150, 300),
    token_ps=(8_000_000_000, 8_000_000_000, 14_000_000_000),
    attention_seqs=(0, 1),
    attention_context=(0, 1),
    decode_ps=(0, 0, 200_000_000, 200_050_000),
    mixed_ps=(0, 0, 200_000_000, 200_050_000),
    prefill_pair=2_000,
)
EMBED_TIME = IterationTime(token_knots=(1, 67, 134), token_ps=(2_005_000_000, 2_005_000_000, 3_010_000_000))

INGREDIENTS = (
    "laxity",
    "shortest",
    "classes",
    "demotion",
    "starvation",
    "fairness",
    "in_flight_limits",
    "tpot_limit",
    "embedding_batches",
    "predicted_routing",
)


class Listed:
    """Arrivals as they are listed."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self._arrivals = arrivals

    def arrivals(self) -> Iterator[Arrival]:
        return iter(self._arrivals)

    def ended(self, now: Nanos, request: int) -> Arrival | None:
        return None


def crowd() -> list[Arrival]:
    """Three tenants, two priorities, all kinds, with and without objectives, 160 requests faster than can be served."""
    arrivals = []
    for i in range(160):
        at = i * 9 * MILLISECOND + (i % 5 == 0) * MILLISECOND
        kind = RequestKind.EMBEDDING if i % 3 == 2 else RequestKind.LLM_GENERATE if i % 4 == 1 else RequestKind.LLM_CHAT
        generates = kind is not RequestKind.EMBEDDING
        urgent = i % 4 != 1
        arrivals.append(
            _arrival(
                i,
                at,
                kind,
                tenant=("a", "a", "b", "a", "c")[i % 5],
                priority=0 if urgent else 1,
                input_tokens=40 + 97 * i % 900 if generates else 20 + 53 * i % 400,
                output_tokens=10 + 31 * i % 90 if generates else 0,
                ttft_s=(0.4, 0.9)[i % 2] if generates and urgent else None,
                due_s=None if i % 7 == 3 else (4.0 if generates else 0.15),
                prefix=i % 6,
            )
        )
    return arrivals


def patience() -> list[Arrival]:
    """Batch work without objectives that arrives first and is passed over for longer than starvation allows."""
    arrivals = [
        _arrival(i, i * MILLISECOND, RequestKind.LLM_GENERATE, "slow", 3, 600, 60, None, None) for i in range(12)
    ]
    for i in range(12, 2700):
        at = 50 * MILLISECOND + (i - 12) * 12 * MILLISECOND
        arrivals.append(_arrival(i, at, RequestKind.LLM_CHAT, "fast", 0, 500, 40, 20.0, 30.0))
    return arrivals


def tiers() -> list[Arrival]:
    """Work of three priorities and no objective, at once."""
    kind = RequestKind.LLM_GENERATE
    return [_arrival(i, i * MILLISECOND, kind, "a", 2 - i % 3, 300, 30, None, None) for i in range(60)]


def texts() -> list[Arrival]:
    """Herds of embeddings, more than an idle engine takes, some due soon."""
    arrivals = []
    for i in range(120):
        at = i // 40 * 200 * MILLISECOND + i % 40 // 8 * 3 * MILLISECOND
        arrivals.append(
            _arrival(i, at, RequestKind.EMBEDDING, "a", i % 2, 30 + 41 * i % 300, 0, None, (0.02, 0.2, None)[i % 3])
        )
    return arrivals


SCENARIOS: dict[str, Callable[[], list[Arrival]]] = {
    "crowd": crowd,
    "patience": patience,
    "tiers": tiers,
    "texts": texts,
}


def trace(policy: Callable[[], Policy], arrivals: Sequence[Arrival], mechanism: str = "native") -> list[str]:
    """One line a Dispatch: microseconds, replica, tasks as request.attempt."""
    lines: list[str] = []

    def record(
        now: int, events: Sequence[AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
    ) -> None:
        for command in commands:
            if isinstance(command, Dispatch):
                tasks = " ".join(f"{task.task >> 16}.{task.attempt}" for task in command.tasks)
                lines.append(f"{now // 1000} {command.replica} {tasks}")

    plane = make_plane(mechanism, single_request_pipelines(), {"golden": policy}, "golden")
    driver = SimDriver(
        plane,
        Listed(arrivals),
        [lambda replica, device=device: _device(device, replica, driver) for device in range(3)],  # type: ignore[misc]
        Streams(0),
        network=NetworkConfig(0.0002, 0.0),
        report_interval_s=0.5,
        record=record,
    )
    driver.run()
    assert plane.counts.responded == len(arrivals)
    return lines


def presets() -> dict[str, Callable[[], Policy]]:
    """Every preset that serves all; ``separate`` with all three devices to split."""
    made = dict(PRESETS)
    del made["shedding"]
    made["separate"] = lambda: separate(shared_devices=[0, 1, 2], llm_share=0.67)
    return made


def tight() -> Policy:
    """Hybrid with an objective for tokens that these engines (8 ms, and 0.2 ms a task) can miss."""
    return hybrid(tpot_s=0.012)


def without(ingredient: str) -> Callable[[], Policy]:
    """``tight`` less one ingredient."""
    return lambda: hybrid(tpot_s=0.012, **{ingredient: False})


def _device(device: int, replica: int, driver: SimDriver) -> SimulatedDevice:
    llm = LlmReplica(
        replica,
        "llm",
        LLM_TIME,
        # Unlike devices, or routing by predicted finish would have nothing to predict.
        max_num_seqs=(4, 6, 8)[device],
        max_num_batched_tokens=512,
        block_size=16,
        kv_blocks=(300, 400, 500)[device],
    )
    embed = EmbedReplica(replica + 1, "embed", EMBED_TIME, max_batch_tasks=4, max_batch_tokens=1024, padding=True)
    return SimulatedDevice(device, f"node{device}", llm, embed, driver.output_tokens)


def _arrival(
    request: int,
    at: int,
    kind: RequestKind,
    tenant: str,
    priority: int,
    input_tokens: int,
    output_tokens: int,
    ttft_s: float | None,
    due_s: float | None,
    prefix: int = 0,
) -> Arrival:
    pipeline = ("chat", "generate", "embed")[kind]
    due = [NEVER if span is None else at + round(span * SECOND) for span in (ttft_s, due_s)]
    cap = 128 if output_tokens else 0
    arrived = RequestArrived(request, pipeline, int(kind), tenant, priority, input_tokens, cap, at, *due, prefix)
    return Arrival(Nanos(at), arrived, output_tokens)


if __name__ == "__main__":
    TRACES.mkdir(exist_ok=True)
    for name, make in presets().items():
        (TRACES / f"{name}.txt").write_text("\n".join(trace(make, crowd())) + "\n")
