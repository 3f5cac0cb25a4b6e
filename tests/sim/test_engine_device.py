"""The simulated device as the driver sees it: commands in, events out, configuration checked."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sage_core.commands import Cancel, Dispatch, Respond, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent, ReplicaReported, TaskFailed, TaskFinished, TokensProduced
from sage_core.units import NEVER, Nanos, PoolKind, task_id
from sage_sim.engine import EmbedReplica, LlmReplica, ReplicaUsage, SimulatedDevice, speed_hints
from sage_sim.engine_reference import Seen
from sage_sim.iteration import IterationTime, IterationWork

# A prefill of up to 200 tokens takes 8 us, a decode iteration 6 us, 20 ns a sequence and 50 ps a token of context.
LLM_TIME = IterationTime(
    token_knots=(1,),
    token_ps=(6_000_000,),
    attention_seqs=(0, 1),
    attention_context=(0, 1),
    decode_ps=(0, 0, 20_000, 20_050),
    mixed_ps=(0, 0, 20_000, 20_050),
    prefill_knots=(1, 200, 400),
    prefill_ps=(2_000_000, 2_000_000, 8_000_000),
    prefill_pair=0,
    overhead=100_000,
)
EMBED_TIME = IterationTime(token_knots=(1, 167, 334), token_ps=(500_000, 500_000, 1_000_000))
LLM = LlmReplica(4, "llm", LLM_TIME, max_num_seqs=8, max_num_batched_tokens=512, block_size=16, kv_blocks=100)
EMBED = EmbedReplica(5, "embed", EMBED_TIME, max_batch_tasks=4, max_batch_tokens=1_024)


def device(
    llm: LlmReplica | None = LLM, embed: EmbedReplica | None = EMBED, output_tokens: int = 5, reference: bool = False
) -> SimulatedDevice:
    return SimulatedDevice(2, "node0", llm, embed, lambda request, stage: output_tokens, reference=reference)


def task(request: int, input_tokens: int = 32, output_tokens_max: int = 100) -> Task:
    return Task(task_id(request, 0), 0, 1, 0, 0, input_tokens, output_tokens_max)


def drained(simulated: SimulatedDevice) -> list[tuple[int, AnyEvent]]:
    told = []
    while (at := simulated.wakeup_at) != NEVER:
        told += [(int(at), event) for event in simulated.step(at, ())]
    return told


@pytest.mark.parametrize("reference", [False, True])
def test_both_kinds_of_task(reference: bool) -> None:
    simulated = device(reference=reference)
    assert simulated.wakeup_at == NEVER
    assert simulated.step(Nanos(0), [Dispatch(4, (task(1),)), Dispatch(5, (task(2), task(3)))]) == []
    # A prefill of 32 tokens with the overhead; an embedding batch of 64; four decodes.
    context = sum(6_000_000 + 100_000 + 20_000 + 50 * tokens for tokens in (32, 33, 34, 35))
    end = -(-(8_100_000 + 500_000 + context) // 1_000)
    assert drained(simulated) == [
        (8_100, TokensProduced(task_id(1, 0), 1)),
        (8_600, TaskFinished(task_id(2, 0), 0)),
        (8_600, TaskFinished(task_id(3, 0), 0)),
        (end, TaskFinished(task_id(1, 0), 5)),
    ]


def test_output_is_cut_to_the_clients_cap() -> None:
    simulated = device(output_tokens=500)
    simulated.step(Nanos(0), [Dispatch(4, (task(1, output_tokens_max=3),))])
    assert drained(simulated)[-1][1] == TaskFinished(task_id(1, 0), 3)


def test_a_task_that_can_never_fit_fails_in_the_same_step() -> None:
    simulated = device(output_tokens=10)
    (event,) = simulated.step(Nanos(50), [Dispatch(4, (task(1, input_tokens=1_592),))])
    assert isinstance(event, TaskFailed)
    assert not event.retryable
    assert event.reason == "KV cache too small: the task needs 101 blocks, the replica has 100"
    assert simulated.wakeup_at == NEVER


def test_cancel() -> None:
    simulated = device()
    simulated.step(Nanos(0), [Dispatch(4, (task(1), task(2)))])
    simulated.step(Nanos(10), [Cancel(4, task_id(1, 0)), Cancel(4, task_id(9, 0))])
    assert {event.task for _, event in drained(simulated)} == {task_id(2, 0)}  # type: ignore[union-attr]


def test_report_and_usage_tell_nothing_away() -> None:
    simulated = device()
    simulated.step(Nanos(0), [Dispatch(4, (task(1), task(2))), Dispatch(5, (task(3),))])
    assert simulated.report(Nanos(4_000)) == [ReplicaReported(4, 2, 0, 96), ReplicaReported(5, 0, 1, 0)]
    at = simulated.wakeup_at
    assert at == 8_100
    simulated.report(at)
    assert simulated.step(at, ()) == [TokensProduced(task_id(1, 0), 1), TokensProduced(task_id(2, 0), 1)]
    assert simulated.usage(Nanos(8_350)) == [
        ReplicaUsage(4, 8_100, 1, 0, 0, 0, prefill_busy_ns=8_100, seen=Seen(0, 0, 64, 32)),
        ReplicaUsage(5, 250, 0, 0, 0, 0, prefill_busy_ns=250, tokens=32, padded_tokens=32),
    ]
    drained(simulated)
    llm, embed = simulated.usage(Nanos(10**6))
    assert (llm.iterations, llm.itl_count, embed.iterations) == (5, 8, 1)
    assert llm.prefill_busy_ns == 8_100 < llm.busy_ns
    assert (llm.seen, embed.seen) == (Seen(2, 2 * 35, 64, 32), Seen(0, 0, 32, 32))
    assert sum(simulated.itl_samples().values()) == 8


def test_joined_hints_follow_the_law() -> None:
    llm = dataclasses.replace(LLM, ingress_ns=700, egress_ns=300)
    first, second = device(llm).joined()
    assert (first.replica, first.pool, first.pool_kind, first.device, first.node) == (
        4,
        "llm",
        PoolKind.LLM,
        2,
        "node0",
    )
    assert (first.tasks_max, first.batch_tokens_max, first.kv_tokens_max) == (8, 512, 1_600)
    alone_ns = LLM_TIME.iteration_ps(IterationWork(chunks=1, prefill_tokens=512, attention2=512**2)) / 1000
    assert first.fixed_ns + first.input_token_ns * 512 == pytest.approx(alone_ns + 1_000)
    seven_ns = LLM_TIME.iteration_ps(IterationWork(7, 7 * 576)) / 1000
    assert first.output_token_ns + 7 * first.output_seq_ns == pytest.approx(seven_ns)
    assert (second.replica, second.pool_kind, second.kv_tokens_max) == (5, PoolKind.EMBEDDING, 0)
    assert second.fixed_ns + second.input_token_ns * 512 == pytest.approx(EMBED_TIME.batch_ps(512, 512**2) / 1000)


def test_joined_hints_include_the_cpu() -> None:
    cpu = dataclasses.replace(
        LLM, api_server_ns=900, api_server_token_ns=3, detokenizer_token_ns=50, scheduler_ns=70, scheduler_seq_ns=2
    )
    was, now = speed_hints(LLM), speed_hints(cpu)
    assert (now.fixed_ns - was.fixed_ns, now.input_token_ns - was.input_token_ns) == pytest.approx((950, 3))
    assert (now.output_token_ns - was.output_token_ns, now.output_seq_ns - was.output_seq_ns) == pytest.approx((70, 2))
    beside = speed_hints(dataclasses.replace(cpu, async_scheduling=True))
    assert (beside.output_token_ns, beside.output_seq_ns) == (was.output_token_ns, was.output_seq_ns)


def test_a_sequence_that_is_too_long_fails_in_the_same_step() -> None:
    simulated = device(dataclasses.replace(LLM, max_model_len=40), output_tokens=9)
    (event,) = simulated.step(Nanos(50), [Dispatch(4, (task(1),))])
    assert isinstance(event, TaskFailed)
    assert not event.retryable
    assert event.reason == "sequence too long: prompt and output come to 41 tokens, the replica takes up to 40"
    whole = dataclasses.replace(LLM, chunked_prefill=False, max_num_batched_tokens=40)
    (event,) = device(whole, output_tokens=9).step(Nanos(50), [Dispatch(4, (task(1),))])
    assert isinstance(event, TaskFailed)
    assert event.reason.endswith("the replica takes up to 40")


def test_expected_yield_of_drafts() -> None:
    drafting = dataclasses.replace(LLM, num_speculative_tokens=3, acceptance_rate=0.7)
    assert drafting.numbers()["draft_yield_ppm"] == pytest.approx((1 + 0.7 + 0.49 + 0.343) * 10**6, abs=2)
    assert dataclasses.replace(drafting, acceptance_rate=1.0).numbers()["draft_yield_ppm"] == 4_000_000
    assert LLM.numbers()["draft_yield_ppm"] == 1_000_000


def test_startup_reads_the_weights() -> None:
    llm = dataclasses.replace(LLM, startup_ns=7, weight_bytes=16 * 10**9, weight_bytes_per_s=2 * 10**9)
    assert device(llm).startup_ns() == 8 * 10**9 + 7
    assert device(None).startup_ns() == 0


def test_crash() -> None:
    simulated = device()
    simulated.step(Nanos(0), [Dispatch(4, (task(1),))])
    simulated.crash(Nanos(100))
    assert simulated.wakeup_at == NEVER
    assert simulated.report(Nanos(200))[0] == ReplicaReported(4, 0, 0, 100)


def test_what_cannot_be() -> None:
    simulated = device()
    with pytest.raises(IllegalEvent, match="device 2 has no replica 6"):
        simulated.step(Nanos(0), [Dispatch(6, (task(1),))])
    with pytest.raises(IllegalEvent, match="device 2 has no replica 4"):
        device(llm=None).step(Nanos(0), [Cancel(4, 3)])
    with pytest.raises(IllegalEvent, match="Respond is not a command for a replica"):
        simulated.step(Nanos(0), [Respond(1)])
    with pytest.raises(ConfigError, match="request 1: 32 input and 0 output tokens"):
        device(output_tokens=0).step(Nanos(0), [Dispatch(4, (task(1),))])


def test_time_ends_after_106_days() -> None:
    forever = 2**31 - 1
    simulated = device(dataclasses.replace(LLM, kv_blocks=2**30), output_tokens=forever)
    simulated.step(Nanos(0), [Dispatch(4, (task(1, output_tokens_max=forever),))])
    simulated.step(simulated.wakeup_at, ())  # the first token
    with pytest.raises(ConfigError, match=r"device 2: simulated time passed 2\^63 ps \(106 days\); shorten the load"):
        _ = simulated.wakeup_at


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs of replica 4: expected a whole number from 1"),
        ({"block_size": 1.5}, "block_size of replica 4: expected a whole number from 1 to .*, got 1.5"),
        ({"kv_blocks": 0}, "kv_blocks of replica 4"),
        ({"egress_ns": -1}, "egress_ns of replica 4: expected a whole number from 0"),
        ({"max_num_batched_tokens": 7}, "max_num_batched_tokens: expected at least max_num_seqs = 8"),
        ({"watermark_blocks": -1}, "watermark_blocks of replica 4: expected a whole number from 0"),
        ({"acceptance_rate": 1.1}, "acceptance_rate of replica 4: expected 0 to 1, got 1.1"),
        ({"acceptance_rate": float("nan")}, "acceptance_rate of replica 4: expected 0 to 1, got nan"),
        ({"weight_bytes": 5}, "weight_bytes_per_s of replica 4: expected more than 0, because weight_bytes = 5"),
    ],
)
def test_llm_configuration_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(LLM, **change)


def test_other_configuration_is_checked() -> None:
    with pytest.raises(ConfigError, match="max_batch_tasks of replica 5"):
        dataclasses.replace(EMBED, max_batch_tasks=0)
    with pytest.raises(ConfigError, match="device 2 on node0: expected an LLM engine"):
        device(None, None)
    with pytest.raises(ConfigError, match="two replicas have the id 4"):
        device(LLM, dataclasses.replace(EMBED, replica=4))
