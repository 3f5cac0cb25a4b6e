"""MPS shares: what a share does to a law, and two engines that run side by side."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core.commands import Cancel, Dispatch, Respond, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent
from sage_core.units import NEVER, Nanos, task_id
from sage_sim.engine import EmbedReplica, LlmReplica, SimulatedDevice
from sage_sim.iteration import IterationTime, IterationWork
from sage_sim.sharing import MpsDevice, shared

# Reading the weights takes 10 us; from 1,000 tokens on computation is longer.
LAW = IterationTime(
    token_knots=(1, 1_000, 10_000),
    token_ps=(10_000_000, 12_000_000, 120_000_000),
    head_knots=(1,),
    head_ps=(500_000,),
    attention_seqs=(0, 1),
    attention_context=(0, 1),
    decode_ps=(0, 0, 0, 1_000),
    mixed_ps=(0, 0, 0, 2_000),
    prefill_pair=30,
    overhead=70_000,
)


def test_all_of_the_device_is_the_law_itself() -> None:
    assert shared(LAW, 1.0, 0.5) == LAW


def test_computation_takes_the_inverse_of_the_share() -> None:
    half = shared(LAW, 0.5, 0.5)
    assert half.token_ps[-1] == 240_000_000
    assert half.prefill_pair == 60
    assert half.overhead == LAW.overhead


@pytest.mark.parametrize(
    ("share", "saturation", "factor"), [(0.5, 0.5, 1), (0.25, 0.5, 2), (0.5, 1.0, 2), (0.8, 0.4, 1)]
)
def test_reading_needs_only_the_saturating_share(share: float, saturation: float, factor: int) -> None:
    law = shared(LAW, share, saturation)
    assert law.token_ps[0] == 10_000_000 * factor
    decode = IterationWork(4, 4_000)
    attention = law.iteration_ps(decode) - law.iteration_ps(IterationWork(4, 0))
    assert attention == 4_000 * 1_000 * factor


def test_tokens_that_are_computed_while_weights_are_read() -> None:
    # 1,000 tokens compute for 12 us at the rate of 10,000, which a quarter of the device makes 48.
    assert shared(LAW, 0.25, 0.25).token_ps == (10_000_000, 48_000_000, 480_000_000)


@given(st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 64), st.integers(0, 50_000), st.integers(0, 3_000))
def test_a_share_makes_slower_and_at_most_by_its_inverse(
    share: float, saturation: float, seqs: int, kv_tokens: int, prefill_tokens: int
) -> None:
    work = IterationWork(seqs, kv_tokens, bool(prefill_tokens), prefill_tokens, 0, prefill_tokens**2)
    alone, now = LAW.iteration_ps(work), shared(LAW, share, saturation).iteration_ps(work)
    assert alone <= now <= alone / share * 1.02 + 10_000  # times are whole


@pytest.mark.parametrize(("share", "saturation"), [(0.0, 0.5), (1.1, 0.5), (0.5, 0.0), (float("nan"), 0.5)])
def test_shares_are_checked(share: float, saturation: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        shared(LAW, share, saturation)


LLM = LlmReplica(4, "llm", LAW, max_num_seqs=8, max_num_batched_tokens=512, block_size=16, kv_blocks=100)
EMBED = EmbedReplica(5, "embed", LAW, max_batch_tasks=4, max_batch_tokens=1_024)


def task(request: int) -> Task:
    return Task(task_id(request, 0), 0, 1, 0, 0, 32, 100)


def drained(device: MpsDevice | SimulatedDevice) -> list[tuple[int, AnyEvent]]:
    told = []
    while (at := device.wakeup_at) != NEVER:
        told += [(int(at), event) for event in device.step(at, ())]
    return told


def simulated(llm: LlmReplica | None, embed: EmbedReplica | None) -> SimulatedDevice:
    return SimulatedDevice(2, "node0", llm, embed, lambda request, stage: 5)


def test_engines_run_side_by_side() -> None:
    llm_alone, embed_alone = simulated(LLM, None), simulated(None, EMBED)
    both = MpsDevice([simulated(LLM, None), simulated(None, EMBED)])
    to_llm, to_embed = Dispatch(4, (task(1), task(2))), Dispatch(5, (task(3), task(4)))
    llm_alone.step(Nanos(0), [to_llm])
    embed_alone.step(Nanos(0), [to_embed])
    both.step(Nanos(0), [to_llm, to_embed])
    expected = sorted(drained(llm_alone) + drained(embed_alone), key=lambda told: told[0])
    assert drained(both) == expected
    assert len(expected) == 6
    assert [joined.device for joined in both.joined()] == [2, 2]
    assert [report.replica for report in both.report(Nanos(10**9))] == [4, 5]
    assert [usage.replica for usage in both.usage(Nanos(10**9))] == [4, 5]
    assert sum(both.itl_samples().values()) == 8
    assert both.startup_ns() == 0


def test_cancel_and_crash_reach_the_right_engine() -> None:
    both = MpsDevice([simulated(LLM, None), simulated(None, EMBED)])
    both.step(Nanos(0), [Dispatch(4, (task(1),)), Dispatch(5, (task(2), task(3)))])
    both.step(Nanos(10), [Cancel(5, task_id(3, 0))])
    assert {event.task for _, event in drained(both)} == {task_id(1, 0), task_id(2, 0)}  # type: ignore[union-attr]
    both.step(Nanos(10**9), [Dispatch(4, (task(5),)), Dispatch(5, (task(6),))])
    both.crash(Nanos(10**9 + 5))
    assert both.wakeup_at == NEVER


def test_misuse_is_refused() -> None:
    both = MpsDevice([simulated(LLM, None), simulated(None, EMBED)])
    for command in (Dispatch(6, (task(1),)), Respond(1)):
        with pytest.raises(IllegalEvent, match="is not for a replica of this device"):
            both.step(Nanos(0), [command])
    with pytest.raises(ConfigError, match="two replicas of one device have the id 4"):
        MpsDevice([simulated(LLM, None), simulated(LLM, None)])
