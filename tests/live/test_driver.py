"""The asyncio driver with emulated engines: real time, the same plane, a log that replays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from sage_core import events as e
from sage_core.commands import AnyCommand, Cancel, Dispatch, Fail, Reject, Respond
from sage_core.errors import PolicyError
from sage_core.log import Step
from sage_core.native_plane import Plane, make_plane
from sage_core.pipeline import single_request_pipelines
from sage_core.policy import Policy
from sage_core.replay import replay
from sage_core.units import MILLISECOND, NEVER, RequestKind
from sage_live.driver import LiveDriver, Outcome
from sage_live.emulated import EmulatedBackend
from sage_policies.presets import PRESETS, preset
from sage_sim.engine import EmbedReplica, LlmReplica, SimulatedDevice
from sage_sim.iteration import IterationTime

# 2 ms an iteration, and 1 ms a batch of texts.
LLM = IterationTime(token_knots=(1,), token_ps=(2_000_000_000,), head_knots=(1,), head_ps=(0,))
EMBED = IterationTime(token_knots=(1,), token_ps=(1_000_000_000,), head_knots=(1,), head_ps=(0,))


def planes(policy: str = "hybrid", mechanism: str = "native", **more: Callable[[], Policy]) -> Plane:
    policies: dict[str, Callable[[], Policy]] = {name: lambda name=name: preset(name) for name in PRESETS}  # type: ignore[misc]
    return make_plane(mechanism, single_request_pipelines(), {**policies, **more}, policy)


def emulated(number: int, output_tokens: int = 5) -> EmulatedBackend:
    llm = LlmReplica(2 * number, "llm", LLM, max_num_seqs=8, max_num_batched_tokens=512, block_size=16, kv_blocks=500)
    embed = EmbedReplica(2 * number + 1, "embed", EMBED, max_batch_tasks=8, max_batch_tokens=4096)
    return EmulatedBackend(SimulatedDevice(number, "here", llm, embed, lambda request, stage: output_tokens))


def asked(request: int, now: int, pipeline: str = "chat", **fields: Any) -> e.RequestArrived:
    kind = RequestKind.EMBEDDING if pipeline == "embed" else RequestKind.LLM_CHAT
    cap = 0 if pipeline == "embed" else 64
    return e.RequestArrived(request, pipeline, int(kind), "tenant", 0, 20, cap, now, **fields)


def ask(driver: LiveDriver, request: e.RequestArrived) -> asyncio.Future[Outcome]:
    end: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    driver.submit(request, end.set_result)
    return end


class Told:
    """Every step, as the driver recorded it."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[e.AnyEvent], list[AnyCommand], Step]] = []

    def __call__(
        self, now: int, events: Sequence[e.AnyEvent], commands: Sequence[AnyCommand], encoded: bytes, digest: bytes
    ) -> None:
        self.steps.append((now, list(events), list(commands), Step(now, encoded, digest)))


async def crowd(plane: Plane, told: Told, n: int, backends: int = 2) -> tuple[LiveDriver, list[Outcome]]:
    driver = LiveDriver(plane, told)
    for number in range(backends):
        driver.add(emulated(number))
    ends = []
    for request in range(n):
        ends.append(ask(driver, asked(request, driver.now, ("chat", "embed", "generate")[request % 3])))
        if request % 4 == 3:
            await asyncio.sleep(0.001)
    outcomes = await asyncio.wait_for(asyncio.gather(*ends), 30)
    await driver.close()
    return driver, outcomes


@pytest.mark.parametrize("policy", ["hybrid", "fifo", "round_robin"])
def test_everything_is_answered_and_the_log_replays(policy: str) -> None:
    told = Told()
    driver, outcomes = asyncio.run(crowd(planes(policy), told, 120))
    assert outcomes == [Respond(request) for request in range(120)]
    assert driver.steps == len(told.steps)
    for mechanism in ("native", "reference"):
        replayed = replay([step for *_, step in told.steps], planes(policy, mechanism))
        assert replayed.divergence is None
        assert replayed.digest == driver.digest


def test_an_arriving_request_leaves_for_an_idle_engine_in_the_step_it_arrives_in() -> None:
    told = Told()
    asyncio.run(crowd(planes(), told, 1))
    (step,) = (step for step in told.steps if any(isinstance(event, e.RequestArrived) for event in step[1]))
    assert any(isinstance(command, Dispatch) for command in step[2])


def test_a_burst_within_one_turn_is_one_step() -> None:
    async def burst() -> Told:
        told = Told()
        driver = LiveDriver(planes(), told)
        driver.add(emulated(0))
        now = driver.now
        ends = [ask(driver, asked(request, now)) for request in range(20)]
        await asyncio.gather(*ends)
        await driver.close()
        return told

    counts = [
        sum(isinstance(event, e.RequestArrived) for event in events) for _, events, _, _ in asyncio.run(burst()).steps
    ]
    assert max(counts) == 20


def test_a_client_that_leaves_frees_its_engine() -> None:
    async def leaving() -> tuple[Outcome, Told, int]:
        told = Told()
        driver = LiveDriver(planes(), told)
        backend = emulated(0, output_tokens=60)
        driver.add(backend)
        end = ask(driver, asked(0, driver.now))
        await asyncio.sleep(0.01)
        driver.cancel(0)
        outcome = await end
        (report,) = backend._model.report(driver.now)[:1]
        driver.cancel(0)  # again: nothing
        await driver.close()
        return outcome, told, report.running

    outcome, told, running = asyncio.run(leaving())
    assert outcome == e.RequestCancelled(0)
    assert any(isinstance(command, Cancel) for *_, commands, _ in told.steps for command in commands)
    assert running == 0


def test_what_is_live_when_the_driver_closes_fails() -> None:
    async def closing() -> list[Outcome]:
        driver = LiveDriver(planes())
        driver.add(emulated(0, output_tokens=60))
        ends = [ask(driver, asked(0, driver.now)), ask(driver, asked(1, driver.now, "summon"))]
        await asyncio.sleep(0.01)
        await driver.close("shut")
        return [await end for end in ends]

    failed, rejected = asyncio.run(closing())
    assert failed == Fail(0, "shut")
    assert isinstance(rejected, Reject)


def test_a_policy_that_breaks_its_contract_fails_every_client() -> None:
    fifo = preset("fifo")

    class Broken:
        static = False

        def score(self, now: int, queued: Any) -> Any:
            return np.full(len(queued), np.nan)

    async def broken() -> None:
        make = {"broken": lambda: Policy("broken", None, Broken(), fifo.route, fifo.limit, fifo.predict)}
        driver = LiveDriver(planes("broken", **make))
        driver.add(emulated(0))
        end = ask(driver, asked(0, driver.now))
        failed = await end
        assert isinstance(failed, Fail)
        assert "order Broken: score of task 0 is NaN" in failed.reason
        with pytest.raises(PolicyError):
            await ask(driver, asked(1, driver.now))
        await driver.close()

    asyncio.run(broken())


def test_the_plane_is_woken_when_it_wants_to_be() -> None:
    """A limit that holds everything back for 20 ms: nothing else would call the plane again."""
    fifo = preset("fifo")

    class Holding:
        until: int | None = None

        def limit(self, now: int, replicas: Any, queue: Any) -> Any:
            limits = fifo.limit.limit(now, replicas, queue)  # type: ignore[arg-type]
            if self.until is None:
                self.until = now + 20 * MILLISECOND
            return type(limits)(
                **{
                    **{name: getattr(limits, name) for name in limits.__dataclass_fields__},
                    "hold_until": np.full(len(replicas), self.until if now < self.until else 0, np.int64),
                }
            )

    async def held() -> int:
        make = {"held": lambda: Policy("held", None, fifo.order, fifo.route, Holding(), fifo.predict)}
        driver = LiveDriver(planes("held", **make))
        driver.add(emulated(0))
        begun = driver.now
        await asyncio.wait_for(ask(driver, asked(0, begun)), 5)
        took = driver.now - begun
        await driver.close()
        return took

    took = asyncio.run(held())
    assert 20 * MILLISECOND < took < NEVER
