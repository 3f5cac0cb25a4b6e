"""The engine's rules on cases small enough to work out by hand, for the native engine and the reference alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sage_core import _native
from sage_core.errors import IllegalEvent
from sage_core.units import NEVER
from sage_sim import engine_reference
from sage_sim.engine_reference import FAILED, FINISHED, FIRST_TOKEN

Numbers = dict[str, int]
Make = Callable[[Numbers | None, Numbers | None], Any]

# Picoseconds. A prefill line below 500 ns is on the floor; decodes beside a prefill count twice.
LAW: Numbers = {
    "decode_base": 1_000_000,
    "decode_seq": 10_000,
    "decode_kv": 100,
    "prefill_floor": 500_000,
    "prefill_base": 200_000,
    "prefill_token": 20_000,
    "prefill_attn": 10,
    "mixed_permille": 2_000,
    "overhead": 5_000,
}
# A prefill iteration takes 2 us and a decode iteration 1 us, whatever is in it.
FLAT: Numbers = dict.fromkeys(LAW, 0) | {"decode_base": 1_000_000, "prefill_floor": 2_000_000}


@pytest.fixture(params=["native", "reference"])
def make(request: pytest.FixtureRequest) -> Make:
    return _native.Engine if request.param == "native" else engine_reference.Engine


def llm(law: Numbers, **changes: int) -> Numbers:
    engine = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "block_size": 4,
        "kv_blocks": 1_000,
        "chunked_prefill": 1,
        "priority_queue": 0,
        "ingress_ns": 0,
        "egress_ns": 0,
    }
    return law | engine | changes


def embed(law: Numbers, **changes: int) -> Numbers:
    engine = {"max_batch_tasks": 4, "max_batch_tokens": 100, "padding": 0, "ingress_ns": 0, "egress_ns": 0}
    return law | engine | changes


def drained(engine: Any) -> list[tuple[int, int, int]]:
    """(instant, code, task) of everything still to come."""
    events = []
    while (at := engine.wakeup_at) != NEVER:
        told = engine.advance(at)
        assert told
        events += [(at, code, task) for code, task, _ in told]
    return events


def test_prefill_then_decode(make: Make) -> None:
    engine = make(llm(LAW), None)
    engine.submit_llm(0, 7, 10, 3, 0)
    assert engine.wakeup_at == 505  # the floor and the overhead
    assert engine.advance(505) == [(FIRST_TOKEN, 7, 1)]
    # Contexts of 10 and 11: 1,016,000 and 1,016,100 ps more, told at the next whole nanosecond.
    assert engine.wakeup_at == 2_538
    assert engine.advance(2_538) == [(FINISHED, 7, 3)]
    assert engine.wakeup_at == NEVER
    assert (engine.iterations, engine.itl_count, engine.itl_sum_ns, engine.busy_ns) == (3, 2, 2_032, 2_537)
    ((edge, gaps),) = engine.itl_samples().items()
    assert gaps == 2
    assert edge <= 1_016 < edge + edge // 100


def test_one_token_is_first_and_last(make: Make) -> None:
    engine = make(llm(LAW), None)
    engine.submit_llm(1_000, 1, 10, 1, 0)
    assert drained(engine) == [(1_505, FIRST_TOKEN, 1), (1_505, FINISHED, 1)]


def test_long_prompts_are_chunked(make: Make) -> None:
    engine = make(llm(LAW, max_num_batched_tokens=40), None)
    engine.submit_llm(0, 1, 100, 1, 0)
    # 40, 40 and 20 tokens on contexts of 0, 40 and 80: 1,013,000 + 1,029,000 + 623,000 ps; woken once, at the end.
    assert engine.wakeup_at == 2_665
    assert drained(engine) == [(2_665, FIRST_TOKEN, 1), (2_665, FINISHED, 1)]
    assert engine.iterations == 3


def test_mixed_iteration(make: Make) -> None:
    engine = make(llm(LAW), None)
    engine.submit_llm(0, 1, 50, 2, 0)
    engine.submit_llm(1_000, 2, 60, 1, 0)  # during the first prefill, which takes 1,217,500 ps
    # Then 60 new tokens, 1,418,000 ps, beside one decode on a context of 50, 15,000 ps counted twice; overhead 5,000.
    assert drained(engine) == [
        (1_218, FIRST_TOKEN, 1),
        (2_671, FINISHED, 1),
        (2_671, FIRST_TOKEN, 2),
        (2_671, FINISHED, 2),
    ]


def test_what_is_submitted_at_one_instant_meets_the_same_iteration(make: Make) -> None:
    engine = make(llm(FLAT), None)
    engine.submit_llm(5_000, 1, 8, 1, 0)
    assert engine.advance(5_000) == []
    engine.submit_llm(5_000, 2, 8, 1, 0)
    assert [at for at, _, _ in drained(engine)] == [7_000] * 4
    assert engine.iterations == 1


def test_arrival_in_the_middle_of_a_jump_waits_for_the_iteration_boundary(make: Make) -> None:
    engine = make(llm(FLAT), None)
    engine.submit_llm(0, 1, 8, 101, 0)
    engine.advance(2_000)
    assert engine.wakeup_at == 102_000
    engine.submit_llm(50_500, 2, 8, 1, 0)  # boundary at 51,000, prefill of 2,000 in place of a decode of 1,000
    assert drained(engine) == [(53_000, FIRST_TOKEN, 2), (53_000, FINISHED, 2), (103_000, FINISHED, 1)]


def test_arrival_at_a_boundary_joins_there(make: Make) -> None:
    engine = make(llm(FLAT), None)
    engine.submit_llm(0, 1, 8, 101, 0)
    engine.advance(51_000)
    engine.submit_llm(51_000, 2, 8, 1, 0)
    assert engine.wakeup_at == 53_000


def test_preemption_recomputes_prompt_and_output(make: Make) -> None:
    # 4 blocks of 4 tokens; both need 3 in the end. Iteration 1 prefills 7 + 7 tokens into 2 + 2 blocks, iteration 2
    # fills them, iteration 3 preempts the second. The first ends with iteration 6, and only then do the 7 + 2 tokens
    # of the second fit again: a prefill that yields its third token, then three decodes.
    engine = make(llm(FLAT, kv_blocks=4), None)
    engine.submit_llm(0, 1, 7, 6, 0)
    engine.submit_llm(0, 2, 7, 6, 0)
    engine.advance(2_000)
    assert (engine.running, engine.kv_blocks_free) == (2, 0)
    engine.advance(3_500)
    assert (engine.running, engine.waiting, engine.preemptions, engine.kv_blocks_free) == (1, 1, 1, 1)
    assert drained(engine) == [(7_000, FINISHED, 1), (12_000, FINISHED, 2)]
    assert (engine.iterations, engine.preemptions, engine.kv_blocks_free) == (10, 1, 4)
    assert (engine.itl_count, engine.itl_sum_ns) == (10, (7_000 - 2_000) + (12_000 - 2_000))
    edge = max(engine.itl_samples())
    assert edge <= 6_000 < edge + edge // 100  # from 3,000 to 9,000: the gap that the preemption made


def test_preemption_takes_the_least_urgent_in_a_priority_queue(make: Make) -> None:
    engine = make(llm(FLAT, kv_blocks=4, priority_queue=1), None)
    engine.submit_llm(0, 1, 7, 6, 5)
    engine.submit_llm(1_000, 2, 7, 6, 1)  # joins at 2,000, so it is the last running one, but the more urgent
    engine.submit_llm(1_000, 3, 7, 1, 9)
    ends = [(at, task) for at, code, task in drained(engine) if code == FINISHED]
    assert [task for _, task in ends] == [2, 1, 3]
    assert engine.preemptions >= 1


def test_preemption_gives_back_the_budget_of_the_preempted(make: Make) -> None:
    engine = make(llm(FLAT, kv_blocks=11, max_num_batched_tokens=8, priority_queue=1), None)
    engine.submit_llm(0, 1, 29, 16, 9)  # four iterations of prefill, 8 blocks
    engine.advance(4_000)
    engine.submit_llm(4_000, 2, 3, 20, 0)  # joins the fourth, 1 block
    engine.advance(7_000)
    engine.submit_llm(7_000, 3, 30, 1, 1)  # 6 tokens in the fifth, 2 blocks: none left
    # The sixth: task 1 takes a token of the budget, then is preempted for the fifth token of task 2. Task 3 gets 7 of
    # the 8 tokens of the budget, not 6: 13 tokens in 4 blocks.
    engine.advance(11_000)
    assert (engine.iterations, engine.preemptions, engine.running) == (5, 1, 2)
    assert engine.kv_blocks_free == 11 - 2 - 4
    assert {task for _, code, task in drained(engine) if code == FINISHED} == {1, 2, 3}


def test_waiting_order(make: Make) -> None:
    def order(**changes: int) -> list[int]:
        engine = make(llm(FLAT, max_num_seqs=1, **changes), None)
        for task, priority in ((1, 3), (2, 3), (3, 0), (4, 3)):
            engine.submit_llm(0, task, 4, 2, priority)
        return [task for _, code, task in drained(engine) if code == FINISHED]

    assert order(priority_queue=0) == [1, 2, 3, 4]
    assert order(priority_queue=1) == [3, 1, 2, 4]


def test_head_of_line_blocks_smaller_ones_behind(make: Make) -> None:
    engine = make(llm(FLAT, kv_blocks=10), None)
    engine.submit_llm(0, 1, 20, 9, 0)  # 7 blocks in the end
    engine.submit_llm(0, 2, 30, 1, 0)  # 8 blocks: not beside the first
    engine.submit_llm(0, 3, 4, 1, 0)  # would fit, but is behind
    assert [(at, task) for at, code, task in drained(engine) if code == FINISHED] == [
        (10_000, 1),
        (12_000, 2),
        (12_000, 3),
    ]


@pytest.mark.parametrize(
    ("submitted", "expected"),
    [(4_000, [(11_000, 3), (16_000, 1), (18_000, 2)]), (8_000, [(15_000, 3), (16_000, 1), (18_000, 2)])],
)
def test_an_urgent_arrival_passes_a_head_that_waits_for_blocks(
    make: Make, submitted: int, expected: list[tuple[int, int]]
) -> None:
    engine = make(llm(FLAT, kv_blocks=10, priority_queue=1, ingress_ns=5_000), None)
    engine.submit_llm(0, 1, 20, 9, 1)  # runs from 5,000; its eight decodes from 7,000 would be one jump
    engine.submit_llm(0, 2, 30, 1, 1)  # waits for the first to end
    engine.advance(submitted)
    engine.submit_llm(submitted, 3, 4, 1, 0)  # visible 5,000 later, in the middle of that jump
    assert [(at, task) for at, code, task in drained(engine) if code == FINISHED] == expected


def test_cancelling_the_head_lets_the_next_one_in(make: Make) -> None:
    engine = make(llm(FLAT, kv_blocks=10), None)
    engine.submit_llm(0, 1, 20, 9, 0)
    engine.submit_llm(0, 2, 30, 1, 0)
    engine.submit_llm(0, 3, 4, 1, 0)
    engine.advance(4_500)
    assert engine.cancel(4_500, 2)
    assert (engine.running, engine.waiting) == (1, 1)
    assert [(at, task) for at, code, task in drained(engine) if code == FINISHED] == [(7_000, 3), (11_000, 1)]


def test_without_chunking_prompts_are_whole(make: Make) -> None:
    engine = make(llm(FLAT, max_num_batched_tokens=16, chunked_prefill=0), None)
    for task, tokens in ((1, 20), (2, 10), (3, 10), (4, 6)):
        engine.submit_llm(0, task, tokens, 1, 0)
    # 20 alone, over the budget; 10, and the next 10 do not fit beside it; 10 and 6.
    assert [(at, task) for at, code, task in drained(engine) if code == FINISHED] == [
        (2_000, 1),
        (4_000, 2),
        (6_000, 3),
        (6_000, 4),
    ]


def test_what_can_never_fit_fails_at_once(make: Make) -> None:
    engine = make(llm(FLAT, kv_blocks=4, ingress_ns=50), None)
    engine.submit_llm(10, 1, 10, 7, 0)  # 16 tokens are computed on: fits
    engine.submit_llm(10, 2, 10, 8, 0)  # 17: does not
    assert engine.advance(10) == [(FAILED, 2, 5)]
    assert [task for _, _, task in drained(engine)] == [1, 1]


def test_ingress_and_egress(make: Make) -> None:
    engine = make(llm(FLAT, ingress_ns=300, egress_ns=70), None)
    engine.submit_llm(1_000, 1, 4, 2, 0)
    assert (engine.waiting, engine.running) == (0, 0)
    engine.advance(1_300)
    assert (engine.waiting, engine.running) == (1, 0)
    engine.advance(1_301)
    assert (engine.waiting, engine.running) == (0, 1)
    assert drained(engine) == [(3_370, FIRST_TOKEN, 1), (4_370, FINISHED, 1)]


def test_cancel_lets_the_iteration_in_progress_end(make: Make) -> None:
    law = FLAT | {"decode_seq": 100_000}
    engine = make(llm(law), None)
    engine.submit_llm(0, 1, 4, 11, 0)
    engine.submit_llm(0, 2, 4, 50, 0)
    engine.advance(2_000)
    assert engine.cancel(3_500, 2)  # iterations of 1,200: 2,000 to 3,200 to 4,400; then of 1,100
    assert engine.kv_blocks_free == 1_000 - 2
    assert drained(engine) == [(4_400 + 8 * 1_100, FINISHED, 1)]
    assert not engine.cancel(50_000, 2)
    assert not engine.cancel(50_000, 1)


def test_at_a_boundary_the_iteration_has_ended_and_the_next_has_not_begun(make: Make) -> None:
    engine = make(llm(FLAT), None)
    engine.submit_llm(0, 1, 4, 21, 0)
    engine.submit_llm(0, 2, 4, 21, 0)
    engine.advance(6_000)  # the prefill of 4 tokens and four decodes: 8 tokens each in 2 blocks
    assert (engine.iterations, engine.itl_count, engine.kv_blocks_free) == (5, 8, 996)
    assert engine.cancel(6_000, 2)
    assert (engine.iterations, engine.itl_count, engine.kv_blocks_free) == (5, 8, 998)
    assert drained(engine) == [(22_000, FINISHED, 1)]


def test_cancel_takes_back_what_was_not_told(make: Make) -> None:
    engine = make(llm(FLAT, egress_ns=1_000), None)
    engine.submit_llm(0, 1, 4, 1, 0)
    assert engine.cancel(2_500, 1)
    assert engine.wakeup_at == NEVER


def test_embedding_batches(make: Make) -> None:
    law = FLAT | {"prefill_floor": 0, "prefill_token": 1_000}  # a nanosecond per token
    sizes = ((1, 10), (2, 30), (3, 20), (4, 90), (5, 200), (6, 1), (7, 1), (8, 1), (9, 1), (10, 1))
    for padding, instants in (
        (0, [60] * 3 + [150] + [350] + [354] * 4 + [355]),
        (1, [90] * 3 + [180] + [380] + [384] * 4 + [385]),
    ):
        engine = make(None, embed(law, padding=padding))
        for task, tokens in sizes:
            engine.submit_embed(0, task, tokens)
        assert [(at, task) for at, _, task in drained(engine)] == list(zip(instants, range(1, 11), strict=True))
        assert engine.embed_batches == 5


def test_engines_on_one_device_take_turns(make: Make) -> None:
    engine = make(llm(FLAT), embed(FLAT | {"prefill_floor": 3_000_000}, max_batch_tasks=1))
    engine.submit_llm(0, 1, 4, 4, 0)
    for task in (11, 12):
        engine.submit_embed(500, task, 5)
    # LLM 0-2, embedding 2-5, LLM 5-6, embedding 6-9, LLM 9-10-11 us.
    assert drained(engine) == [
        (2_000, FIRST_TOKEN, 1),
        (5_000, FINISHED, 11),
        (9_000, FINISHED, 12),
        (11_000, FINISHED, 1),
    ]
    assert (engine.busy_ns, engine.embed_busy_ns) == (5_000, 6_000)
    assert (engine.itl_count, engine.itl_sum_ns) == (3, 9_000)


def test_crash_forgets(make: Make) -> None:
    engine = make(llm(FLAT, kv_blocks=4), embed(FLAT))
    engine.submit_llm(0, 1, 4, 9, 0)
    engine.submit_embed(0, 2, 4)
    engine.submit_llm(2_500, 3, 4, 9, 0)
    engine.clear(2_500)
    assert (engine.wakeup_at, engine.running, engine.waiting, engine.kv_blocks_free) == (NEVER, 0, 0, 4)
    engine.submit_llm(3_000, 1, 4, 1, 0)
    assert [at for at, _, _ in drained(engine)] == [5_000, 5_000]


def test_misuse_is_refused(make: Make) -> None:
    engine = make(llm(FLAT), None)
    engine.submit_llm(100, 1, 4, 4, 0)
    with pytest.raises(IllegalEvent, match="task 1 was submitted twice"):
        engine.submit_llm(100, 1, 4, 4, 0)
    with pytest.raises(IllegalEvent, match="time went back: 99 after 100"):
        engine.advance(99)
    with pytest.raises(IllegalEvent, match="no embedding engine"):
        engine.submit_embed(100, 2, 4)
    with pytest.raises(IllegalEvent, match="no LLM engine"):
        make(None, embed(FLAT)).submit_llm(0, 1, 4, 4, 0)
    for tokens, output_tokens in ((0, 1), (1, 0), (2**31, 1)):
        with pytest.raises(IllegalEvent, match="token counts from 1 to 2147483647"):
            engine.submit_llm(100, 3, tokens, output_tokens, 0)


def test_all_is_over_at_the_end_of_time(make: Make) -> None:
    engine = make(llm(LAW), None)
    for task in range(20):
        engine.submit_llm(task, task, 100, 50, 0)
    assert sum(code == FINISHED for code, _, _ in engine.advance(NEVER)) == 20
