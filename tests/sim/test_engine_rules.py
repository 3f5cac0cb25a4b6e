"""The engine's rules on cases small enough to work out by hand, for the native engine and the reference alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sage_core import _native
from sage_core.errors import IllegalEvent
from sage_core.units import NEVER
from sage_sim import engine_reference
from sage_sim.engine import LlmReplica
from sage_sim.engine_reference import FAILED, FINISHED, FIRST_TOKEN
from sage_sim.iteration import IterationTime, Numbers

Make = Callable[[Numbers | None, Numbers | None], Any]

# Picoseconds: 200 ns and 20 ns a token, 10 ns a sequence, 100 ps a token of context, twice that beside a prefill.
LAW: Numbers = IterationTime(
    token_knots=(0, 1),
    token_ps=(200_000, 220_000),
    head_knots=(0, 1),
    head_ps=(0, 10_000),
    attention_seqs=(0, 1),
    attention_context=(0, 1),
    decode_ps=(0, 0, 0, 100),
    mixed_ps=(0, 0, 0, 200),
    prefill_pair=10,
    overhead=5_000,
).numbers()
# A prefill iteration takes 2 us and a decode iteration 1 us, whatever is in it.
FLAT: Numbers = IterationTime(token_ps=(1_000_000,), prefill_ps=(1_000_000,)).numbers()


@pytest.fixture(params=["native", "reference"])
def make(request: pytest.FixtureRequest) -> Make:
    return _native.Engine if request.param == "native" else engine_reference.Engine


def llm(law: Numbers, **changes: int) -> Numbers:
    engine = LlmReplica(
        1, "llm", IterationTime(), max_num_seqs=8, max_num_batched_tokens=256, block_size=4, kv_blocks=1_000
    )
    return engine.numbers() | law | changes


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
    assert engine.wakeup_at == 416  # 415,500 ps
    assert engine.advance(416) == [(FIRST_TOKEN, 7, 1)]
    # Contexts of 10 and 11: 236,000 and 236,100 ps more, told at the next whole nanosecond.
    assert engine.wakeup_at == 888
    assert engine.advance(888) == [(FINISHED, 7, 3)]
    assert engine.wakeup_at == NEVER
    assert (engine.iterations, engine.itl_count, engine.itl_sum_ns, engine.busy_ns) == (3, 2, 472, 887)
    ((edge, gaps),) = engine.itl_samples().items()
    assert gaps == 2
    assert edge <= 236 < edge + edge // 100


def test_one_token_is_first_and_last(make: Make) -> None:
    engine = make(llm(LAW), None)
    engine.submit_llm(1_000, 1, 10, 1, 0)
    assert drained(engine) == [(1_416, FIRST_TOKEN, 1), (1_416, FINISHED, 1)]


def test_long_prompts_are_chunked(make: Make) -> None:
    engine = make(llm(LAW, max_num_batched_tokens=40), None)
    engine.submit_llm(0, 1, 100, 1, 0)
    # 40, 40 and 20 tokens on contexts of 0, 40 and 80: 1,023,000 + 1,039,000 + 633,000 ps; woken once, at the end.
    assert engine.wakeup_at == 2_695
    assert drained(engine) == [(2_695, FIRST_TOKEN, 1), (2_695, FINISHED, 1)]
    assert engine.iterations == 3


def test_mixed_iteration(make: Make) -> None:
    engine = make(llm(LAW), None)
    engine.submit_llm(0, 1, 50, 2, 0)
    engine.submit_llm(1_000, 2, 60, 1, 0)  # during the first prefill, which takes 1,227,500 ps
    # Then 61 tokens, 1,420,000 ps; two sequences, 20,000; the pairs, 18,000; a context of 50, 10,000; overhead 5,000.
    assert drained(engine) == [
        (1_228, FIRST_TOKEN, 1),
        (2_701, FINISHED, 1),
        (2_701, FIRST_TOKEN, 2),
        (2_701, FINISHED, 2),
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
    changes = {"kv_blocks": 11, "max_num_batched_tokens": 8, "priority_queue": 1, "scheduler_reserve_full_isl": 0}
    engine = make(llm(FLAT, **changes), None)
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
    for task, tokens in ((1, 16), (2, 10), (3, 10), (4, 6)):
        engine.submit_llm(0, task, tokens, 1, 0)
    # A sequence of 17 tokens could not be prefilled again; 10, and the next 10 do not fit beside it; 10 and 6.
    assert engine.advance(0) == [(FAILED, 1, -17)]
    assert [(at, task) for at, code, task in drained(engine) if code == FINISHED] == [
        (2_000, 2),
        (4_000, 3),
        (4_000, 4),
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
    law = FLAT | {"attention_seqs": (0, 1), "decode_ps": (0, 100_000), "mixed_ps": (0, 100_000)}
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
    law = IterationTime(token_knots=(1, 2), token_ps=(1_000, 2_000)).numbers()  # a nanosecond per token
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
    engine = make(llm(FLAT), embed(FLAT | {"prefill_ps": (2_000_000,)}, max_batch_tasks=1))
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


# --- what vLLM 0.19 does besides -------------------------------------------------------------------------------------


def finished(engine: Any) -> list[tuple[int, int]]:
    """(instant, task) of everything that will end."""
    return [(at, task) for at, code, task in drained(engine) if code == FINISHED]


def test_whoever_was_scheduled_before_may_be_preempted_in_the_same_pass(make: Make) -> None:
    # 11 blocks of 1 token. The third decode leaves one block: task 1, the less urgent, is first in running order, takes
    # it, and gives it back with its others when task 2 needs one.
    engine = make(llm(FLAT, kv_blocks=11, block_size=1, priority_queue=1), None)
    engine.submit_llm(0, 1, 4, 8, 1)
    engine.submit_llm(0, 2, 2, 8, 0)
    engine.advance(2_000)
    assert (engine.running, engine.kv_blocks_free) == (2, 5)
    engine.advance(4_500)
    assert (engine.running, engine.preemptions, engine.kv_blocks_free) == (1, 1, 6)
    assert finished(engine) == [(9_000, 2), (15_000, 1)]


def test_a_sequence_that_preempts_itself_ends_the_pass(make: Make) -> None:
    # 11 blocks of 1 token, 10 of them taken after the third iteration. At 5,000 task 1 takes the last one, and task 2,
    # the least urgent, none: task 3 behind it misses the iteration, and ends with the prefill that brings task 2 back.
    engine = make(llm(FLAT, kv_blocks=11, block_size=1, priority_queue=1), None)
    engine.submit_llm(0, 1, 1, 6, 0)
    engine.submit_llm(0, 2, 3, 4, 1)
    engine.submit_llm(500, 3, 1, 5, 0)
    assert finished(engine) == [(8_000, 1), (10_000, 3), (10_000, 2)]
    assert engine.preemptions == 1


def test_a_prompt_needs_room_for_all_of_it(make: Make) -> None:
    def waits(reserve: int) -> int:
        engine = make(llm(FLAT, kv_blocks=10, max_num_batched_tokens=8, scheduler_reserve_full_isl=reserve), None)
        engine.submit_llm(0, 1, 8, 9, 0)  # takes 4 blocks in the end
        engine.submit_llm(0, 2, 36, 1, 0)  # 9 blocks, in chunks of 2 blocks
        engine.advance(4_500)
        return int(engine.waiting)

    assert waits(1) == 1
    assert waits(0) == 0


def test_a_long_prompt_leaves_budget_to_others(make: Make) -> None:
    engine = make(llm(FLAT, max_num_batched_tokens=20, long_prefill_token_threshold=8), None)
    engine.submit_llm(0, 1, 24, 1, 0)  # 8 tokens an iteration
    engine.submit_llm(0, 2, 12, 1, 0)  # 8 and 4
    engine.submit_llm(0, 3, 4, 1, 0)  # 4 tokens of budget are left in the first
    assert finished(engine) == [(2_000, 3), (4_000, 2), (6_000, 1)]
    engine = make(
        llm(FLAT, max_num_batched_tokens=20, long_prefill_token_threshold=8, max_num_partial_prefills=1), None
    )
    for task, tokens in ((1, 24), (2, 12), (3, 4)):
        engine.submit_llm(0, task, tokens, 1, 0)
    # Only one prompt may be incomplete: task 2, in two parts, begins with the last part of task 1, and task 3 with it.
    assert finished(engine) == [(6_000, 1), (6_000, 3), (8_000, 2)]


def test_the_watermark_stays_free_while_anything_else_is_scheduled(make: Make) -> None:
    engine = make(llm(FLAT, kv_blocks=10, watermark_blocks=3), None)
    engine.submit_llm(0, 1, 36, 1, 0)  # 9 of 10 blocks, alone
    engine.submit_llm(0, 2, 20, 1, 0)  # 5 blocks
    engine.submit_llm(0, 3, 12, 1, 0)  # 3 blocks would leave 2
    assert finished(engine) == [(2_000, 1), (4_000, 2), (6_000, 3)]


def test_a_sequence_has_a_longest_length(make: Make) -> None:
    engine = make(llm(FLAT, max_model_len=20), None)
    engine.submit_llm(0, 1, 10, 10, 0)
    engine.submit_llm(0, 2, 10, 11, 0)
    assert engine.advance(0) == [(FAILED, 2, -21)]
    assert [task for _, task in finished(engine)] == [1]


def test_a_cached_prefix_is_not_computed_again(make: Make) -> None:
    law = IterationTime(token_knots=(0, 1), token_ps=(0 + 1, 1_000_001)).numbers()  # 1 us a token
    engine = make(llm(law, prefix_caching=1), None)
    engine.submit_llm(0, 1, 10, 1, 0, [5, 6])
    assert finished(engine) == [(10_001, 1)]
    assert engine.kv_blocks_free == 1_000
    engine.submit_llm(20_000, 2, 10, 1, 0, [5, 7])  # the first 4 tokens are the same
    assert finished(engine) == [(26_001, 2)]
    engine.submit_llm(30_000, 3, 8, 1, 0, [5, 6])  # all of it, but the last token must be computed: its block is
    assert finished(engine) == [(34_001, 3)]
    assert (engine.prefix_queries, engine.prefix_hits) == (28, 8)
    engine.submit_llm(40_000, 4, 10, 1, 0, [8, 6])  # equal ids stand for equal prefixes: nothing to be found after 8
    assert finished(engine) == [(50_001, 4)]


def test_blocks_in_use_are_shared(make: Make) -> None:
    engine = make(llm(FLAT, kv_blocks=7, prefix_caching=1), None)
    for task in (1, 2, 3):
        engine.submit_llm(0, task, 17, 2, 0, [1, 2, 3, 4])
    engine.advance(2_500)  # one prompt of 5 blocks, and a last block for each of the others
    assert (engine.running, engine.kv_blocks_free, engine.prefix_hits) == (3, 0, 32)
    assert finished(engine) == [(3_000, task) for task in (1, 2, 3)]
    assert engine.kv_blocks_free == 7


def test_the_end_of_what_was_used_longest_ago_is_overwritten_first(make: Make) -> None:
    def hits(prompt: list[int], between: int) -> int:
        """Cached tokens of a prompt, after two prompts of 4 blocks on 10 blocks and ``between`` new blocks."""
        engine = make(llm(FLAT, kv_blocks=10, prefix_caching=1), None)
        engine.submit_llm(0, 1, 16, 1, 0, [1, 2, 3, 4])
        engine.submit_llm(10_000, 2, 16, 1, 0, [5, 6, 7, 8])
        engine.submit_llm(20_000, 3, 4 * between, 1, 0)
        engine.advance(30_000)
        before = engine.prefix_hits
        engine.submit_llm(30_000, 4, 17, 1, 0, prompt)
        engine.advance(40_000)
        return int(engine.prefix_hits - before)

    assert [hits([1, 2, 3, 4], n) for n in range(1, 8)] == [16, 16, 12, 8, 4, 0, 0]
    assert [hits([5, 6, 7, 8], n) for n in range(1, 8)] == [16, 16, 16, 16, 16, 16, 12]


def test_a_preempted_sequence_finds_its_own_blocks(make: Make) -> None:
    def recomputed(caching: int) -> int:
        engine = make(llm(FLAT, kv_blocks=5, prefix_caching=caching), None)
        engine.submit_llm(0, 1, 7, 8, 0)
        engine.submit_llm(0, 2, 7, 8, 0)
        assert len(finished(engine)) == 2
        assert engine.preemptions == 1
        return int(engine.prefix_hits)

    assert recomputed(0) == 0
    # It had two full blocks; the first task overwrote one, the end of it.
    assert recomputed(1) == 4


def test_an_answer_is_cached_for_the_next_turn(make: Make) -> None:
    engine = make(llm(FLAT, prefix_caching=1), None)
    engine.submit_llm(0, 1, 6, 7, 0, [1, 2, 3])  # 12 tokens are computed in the end
    engine.submit_llm(100_000, 2, 20, 1, 0, [1, 2, 3, 4, 5])
    engine.advance(200_000)
    assert engine.prefix_hits == 12


def test_an_iteration_is_decided_when_the_one_before_it_starts(make: Make) -> None:
    engine = make(llm(FLAT, async_scheduling=1), None)
    engine.submit_llm(0, 1, 8, 10, 0)
    engine.submit_llm(500, 2, 8, 1, 0)
    # Task 1 is prefilled until 2,000, and its first decode is decided at 0: task 2 is in the iteration after that.
    assert drained(engine)[:3] == [(2_000, FIRST_TOKEN, 1), (5_000, FIRST_TOKEN, 2), (5_000, FINISHED, 2)]
    engine.submit_llm(50_000, 3, 8, 1, 0)  # nothing is in progress: at once
    assert finished(engine) == [(52_000, 3)]


def test_what_ends_is_known_to_free_its_place_an_iteration_later(make: Make) -> None:
    def ends(asynchronous: int) -> list[tuple[int, int]]:
        engine = make(llm(FLAT, max_num_seqs=1, async_scheduling=asynchronous), None)
        engine.submit_llm(0, 1, 4, 3, 0)
        engine.submit_llm(0, 2, 4, 1, 0)
        return finished(engine)

    # The iteration after the last of task 1 has nobody in it, so that nothing is in progress when task 2 gets its turn.
    assert ends(0) == ends(1) == [(4_000, 1), (6_000, 2)]
    engine = make(llm(FLAT, max_num_seqs=2, async_scheduling=1), None)
    for task, output_tokens in ((1, 3), (2, 9), (3, 1)):
        engine.submit_llm(0, task, 4, output_tokens, 0)
    # Task 1 ends at 4,000, in the midst of which an iteration of task 2 alone was decided.
    assert finished(engine) == [(4_000, 1), (7_000, 3), (11_000, 2)]


def test_a_cancellation_shortens_nothing_that_is_decided(make: Make) -> None:
    law = FLAT | {"prefill_ps": (0,), "head_knots": (0, 1), "head_ps": (0, 100_000)}  # 100 ns a sequence
    for asynchronous, end in ((0, 2_400 + 5 * 1_100), (1, 2_400 + 1_200 + 4 * 1_100)):
        engine = make(llm(law, async_scheduling=asynchronous), None)
        engine.submit_llm(0, 1, 4, 7, 0)
        engine.submit_llm(0, 2, 4, 50, 0)
        engine.advance(1_800)
        assert engine.cancel(1_900, 2)  # in the second iteration of 1,200
        assert finished(engine) == [(end, 1)]


def test_cpu_time_beside_and_before_the_gpu(make: Make) -> None:
    # The GPU takes 1,000 ns and 100 more each iteration.
    context = (0, 100_000)
    law = IterationTime(attention_context=(0, 1), decode_ps=context, mixed_ps=context, token_ps=(200_000,)).numbers()

    def end(asynchronous: int, scheduler_ns: int, scheduler_seq_ns: int) -> int:
        changes = {"scheduler_ns": scheduler_ns, "scheduler_seq_ns": scheduler_seq_ns}
        engine = make(llm(law, async_scheduling=asynchronous, **changes), None)
        engine.submit_llm(0, 1, 8, 5, 0)
        return finished(engine)[0][0]

    gpu = [200, 1_000, 1_100, 1_200, 1_300]
    assert end(0, 0, 0) == end(1, 0, 0) == sum(gpu)
    assert end(0, 1_000, 50) == sum(gpu) + 5 * 1_050
    assert end(1, 1_000, 50) == sum(max(1_050, time) for time in gpu)
    assert end(1, 5_000, 0) == 5 * 5_000


def test_the_api_server_takes_one_request_after_another(make: Make) -> None:
    engine = make(llm(FLAT, api_server_ns=1_000, api_server_token_ns=10, ingress_ns=7), None)
    engine.submit_llm(0, 1, 100, 1, 0)  # done at 2,000
    engine.submit_llm(100, 2, 200, 1, 0)  # done at 5,000
    assert finished(engine) == [(2_007 + 2_000, 1), (4_000 + 1_007 + 2_000, 2)]
    engine.submit_llm(90_000, 3, 100, 1, 0)
    assert finished(engine) == [(92_007 + 2_000, 3)]


def test_the_detokeniser_sees_all_tokens_of_an_iteration(make: Make) -> None:
    engine = make(llm(FLAT, egress_ns=30, detokenizer_token_ns=400), None)
    for task, output_tokens in ((1, 1), (2, 1), (3, 2)):
        engine.submit_llm(0, task, 4, output_tokens, 0)
    # Three tokens after 2,000; one after 3,000, which is not told before them.
    assert finished(engine) == [(2_000 + 30 + 1_200, 1), (3_230, 2), (3_430, 3)]
    engine = make(llm(FLAT, detokenizer_token_ns=2_000), None)
    for task, output_tokens in ((1, 1), (2, 1), (3, 2)):
        engine.submit_llm(0, task, 4, output_tokens, 0)
    assert finished(engine) == [(8_000, 1), (8_000, 2), (8_000, 3)]


def test_drafts_yield_what_is_expected_of_them(make: Make) -> None:
    law = IterationTime(token_knots=(0, 1), token_ps=(1, 1_000_001)).numbers()  # 1 us a token
    engine = make(llm(law, draft_tokens=2, draft_yield_ppm=1_750_000, draft_ns=500, block_size=1), None)
    engine.submit_llm(0, 1, 4, 9, 0)
    engine.advance(4_500)
    assert engine.kv_blocks_free == 1_000 - 4 - 3  # for all drafts
    # After the prefill 1, 2, 2 and 2 tokens (1.75, 3.5, 5.25, 7 in all), then the last; 3 tokens are verified each time.
    assert finished(engine) == [(4_000 + 5 * 3_500 + 1, 1)]
    assert (engine.iterations, engine.itl_count) == (6, 8)
    assert engine.itl_samples()[0] == 3  # told together


def test_a_prefilled_prompt_costs_a_decode(make: Make) -> None:
    engine = make(llm(FLAT, kv_blocks=6), None)
    engine.submit_llm(0, 1, 16, 3, 0, (), True)
    assert drained(engine) == [(1_000, FIRST_TOKEN, 1), (3_000, FINISHED, 1)]
    # Preempted for the task before it, it must be prefilled: what came with it is gone.
    engine.submit_llm(10_000, 2, 7, 8, 0)
    engine.submit_llm(10_000, 3, 12, 5, 0, (), True)
    ends = finished(engine)
    assert engine.preemptions == 1
    assert ends[-1][1] == 3
    assert engine.prefill_busy_ns == 4_000  # of tasks 2 and 3


def test_what_was_seen(make: Make) -> None:
    engine = make(llm(FLAT, max_num_batched_tokens=40), embed(FLAT, padding=1))
    engine.submit_llm(0, 1, 100, 3, 0)
    engine.submit_llm(0, 2, 20, 20, 0)
    assert tuple(engine.seen) == (0, 0, 0, 0)
    drained(engine)
    # 40 + 40 + 20 of the long prompt; two sequences of 100 and 20 tokens, and 101 and 21; then one.
    assert tuple(engine.seen) == (2, 122, 40, 100)
    assert engine.prefill_busy_ns == 3 * 2_000
    for task, tokens in ((11, 5), (12, 9)):
        engine.submit_embed(100_000, task, tokens)
    drained(engine)
    assert tuple(engine.embed_seen) == (0, 0, 18, 9)
    assert (engine.embed_tokens, engine.embed_padded_tokens) == (14, 18)
