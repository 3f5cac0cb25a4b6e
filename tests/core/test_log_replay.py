"""Recorded runs, replayed: equal when nothing was touched, and where they part when something was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_core import events as e
from sage_core.commands import AnyCommand
from sage_core.errors import DataError
from sage_core.log import DIGEST_BYTES, GENESIS, Chain, Step, decode_events
from sage_core.native_plane import Plane
from sage_core.replay import replay
from sage_core.rng import Streams
from sage_core.units import NEVER, Nanos

MakePlane = Callable[..., Plane]
Log = list[Step]

EVERY_EVENT: tuple[e.AnyEvent, ...] = (
    e.RequestArrived(0, "chat", 0, "ada", 1, 10, 20, 5, 6, 7, 8),
    e.RequestArrived(1, "embed", 2, "böb", 0, 10, 0, 5),
    e.RequestCancelled(1),
    e.TokensProduced(65536, 3),
    e.TaskFinished(65536, 4),
    e.TaskFailed(65536, "out of memory", True),
    e.ReplicaReported(2, 3, 4, 5),
    e.ReplicaJoined(2, "llm", 0, 1, "node", 8, 2048, 10**6, 0.1, 1e-3, 2.5, 1 / 3),
    e.ReplicaDraining(2),
    e.ReplicaLeft(2),
    e.PolicyChanged("hybrid"),
    e.RunEnded("over"),
)


@pytest.fixture(scope="module")
def recorded(world: Callable[..., Any], make_plane: MakePlane) -> Log:
    """About 400 steps under ``slo_aware`` and whatever it is switched to, to the end of the run."""
    here = world(make_plane("slo_aware"), "slo_aware")
    chain = Chain()
    log: Log = []
    step, close = here.plane.step, here.plane.close

    def recording(now: Nanos, events: list[e.AnyEvent]) -> list[AnyCommand]:
        commands: list[AnyCommand] = step(now, events)
        log.append(chain.step(now, events, commands))
        return commands

    def closing(now: Nanos, reason: str) -> list[AnyCommand]:
        here.plane.step = step
        commands: list[AnyCommand] = close(now, reason)
        log.append(chain.step(now, (e.RunEnded(reason),), commands))
        return commands

    here.plane.step, here.plane.close = recording, closing
    here.wander(Streams(3).stream("log"), 1_500)
    here.close()
    assert len(log) > 300
    assert here.ends["failed"] > 0
    return log


def again(make_plane: MakePlane, log: Log, policy: str = "slo_aware", **options: Any) -> Any:
    return replay(log, make_plane(policy, **options))


class TestLog:
    @pytest.mark.parametrize("event", EVERY_EVENT, ids=lambda event: type(event).__name__)
    def test_an_event_is_read_back_as_it_was(self, event: e.AnyEvent) -> None:
        assert decode_events(1, Chain().step(0, [event], []).events) == (event,)

    def test_there_is_one_of_every_event(self) -> None:
        assert {type(event) for event in EVERY_EVENT} == set(e.AnyEvent.__args__)

    def test_the_digest_covers_instant_events_commands_and_all_before(self) -> None:
        from sage_core.commands import Respond

        def digest(now: int, events: list[e.AnyEvent], commands: list[AnyCommand], before: bytes = GENESIS) -> bytes:
            chain = Chain()
            chain.digest = before
            return chain.step(now, events, commands).digest

        base = digest(5, [EVERY_EVENT[0]], [Respond(0)])
        assert len(base) == DIGEST_BYTES
        others = [
            digest(6, [EVERY_EVENT[0]], [Respond(0)]),
            digest(5, [EVERY_EVENT[1]], [Respond(0)]),
            digest(5, [EVERY_EVENT[0]], [Respond(1)]),
            digest(5, [EVERY_EVENT[0]], []),
            digest(5, [EVERY_EVENT[0], EVERY_EVENT[2]], [Respond(0)]),
            digest(5, [EVERY_EVENT[0]], [Respond(0)], base),
        ]
        assert len({base, *others}) == 7

    @pytest.mark.parametrize(
        "damage", [b"", b"\xc1", b"\x91", b"\x91\x92\xa4Nope\x01", b"\x90\x00", b"\xa1\xff"], ids=bytes.hex
    )
    def test_damaged_bytes_name_the_step(self, damage: bytes) -> None:
        with pytest.raises(DataError, match=r"log step 12: events cannot be decoded \(.*\); the log is damaged"):
            decode_events(12, damage)


class TestReplay:
    @pytest.mark.parametrize("mechanism", ["native", "reference"])
    def test_an_untouched_log_is_decided_again_exactly(
        self, make_plane: MakePlane, recorded: Log, mechanism: str
    ) -> None:
        replayed = again(make_plane, recorded, mechanism=mechanism)
        assert replayed.divergence is None
        assert (replayed.steps, replayed.digest) == (len(recorded), recorded[-1].digest)

    def test_an_empty_log(self, make_plane: MakePlane) -> None:
        assert again(make_plane, []).digest == GENESIS

    @pytest.mark.parametrize("at", [0, 57, -1])
    def test_a_changed_digest_is_found_where_it_is(self, make_plane: MakePlane, recorded: Log, at: int) -> None:
        log = list(recorded)
        changed = bytes([log[at].digest[0] ^ 1]) + log[at].digest[1:]
        log[at] = log[at]._replace(digest=changed)
        divergence = again(make_plane, log).divergence
        assert divergence.step == at % len(log) + 1
        assert (divergence.expected, divergence.actual) == (changed, recorded[at].digest)
        assert str(divergence).startswith(f"step {divergence.step} at {divergence.now} ns: recorded {changed.hex()}")

    def test_a_changed_instant_is_found_where_it_is(self, make_plane: MakePlane, recorded: Log) -> None:
        log = list(recorded)
        log[40] = log[40]._replace(now=log[40].now + 1)
        assert again(make_plane, log).divergence.step == 41

    def test_a_changed_event_is_found_where_it_is_and_shown(self, make_plane: MakePlane, recorded: Log) -> None:
        at, arrived = next(
            (at, event)
            for at, step in enumerate(recorded)
            for event in decode_events(at + 1, step.events)
            if isinstance(event, e.RequestArrived) and at > 50
        )
        changed = [
            msgspec.structs.replace(event, input_tokens=event.input_tokens + 1) if event == arrived else event
            for event in decode_events(at + 1, recorded[at].events)
        ]
        log = list(recorded)
        log[at] = log[at]._replace(events=msgspec.msgpack.encode(changed))
        divergence = again(make_plane, log).divergence
        assert divergence.step == at + 1
        assert f"input_tokens={arrived.input_tokens + 1}" in str(divergence)

    def test_another_encoding_of_the_same_number_is_another_log(self, make_plane: MakePlane, recorded: Log) -> None:
        """Byte for byte: an unsigned 32-bit number written as a signed one reads the same, and is noticed."""
        at = next(at for at, step in enumerate(recorded) if b"TaskFinished\xce\x00" in step.events)
        bent = recorded[at].events.replace(b"TaskFinished\xce\x00", b"TaskFinished\xd2\x00", 1)
        assert decode_events(at + 1, bent) == decode_events(at + 1, recorded[at].events)
        log = [*recorded[:at], recorded[at]._replace(events=bent)]
        assert again(make_plane, log).divergence.step == at + 1

    def test_a_missing_step_is_found_where_it_was(self, make_plane: MakePlane, recorded: Log) -> None:
        assert again(make_plane, recorded[:60] + recorded[61:]).divergence.step == 61

    def test_a_repeated_step_is_found(self, make_plane: MakePlane, recorded: Log) -> None:
        assert again(make_plane, recorded[:60] + recorded[59:]).divergence.step == 61

    def test_swapped_steps_are_found_at_the_first(self, make_plane: MakePlane, recorded: Log) -> None:
        log = list(recorded)
        log[30], log[31] = log[31], log[30]
        divergence = again(make_plane, log).divergence
        assert divergence.step == 31

    def test_a_log_cut_short_agrees_as_far_as_it_goes(self, make_plane: MakePlane, recorded: Log) -> None:
        """The caller knows how long it should be: a manifest holds the number of steps and the last digest."""
        replayed = again(make_plane, recorded[:100])
        assert replayed.divergence is None
        assert (replayed.steps, replayed.digest) == (100, recorded[99].digest)

    def test_another_policy_parts_at_the_first_decision_that_differs(
        self, make_plane: MakePlane, recorded: Log
    ) -> None:
        divergence = again(make_plane, recorded, policy="round_robin").divergence
        assert divergence is not None
        assert divergence.commands
        # Up to there both decided the same, and the log says so.
        upto = recorded[: divergence.step - 1]
        assert again(make_plane, upto, policy="round_robin").divergence is None

    def test_other_attempts_part_too(self, make_plane: MakePlane, recorded: Log) -> None:
        assert again(make_plane, recorded, attempts_max=1).divergence is not None

    def test_a_step_that_cannot_be_taken_is_a_divergence_with_the_reason(
        self, make_plane: MakePlane, recorded: Log
    ) -> None:
        log = list(recorded)
        log[20] = log[20]._replace(events=msgspec.msgpack.encode([e.ReplicaLeft(777)]))
        divergence = again(make_plane, log).divergence
        assert divergence.step == 21
        assert str(divergence) == (
            f"step 21 at {log[20].now} ns cannot be taken: "
            "IllegalEvent: replica 777 is not known to the plane: ReplicaLeft"
        )

    def test_numbers_too_large_for_a_column_are_a_divergence(self, make_plane: MakePlane, recorded: Log) -> None:
        log = list(recorded)
        log[0] = log[0]._replace(
            events=msgspec.msgpack.encode([e.RequestArrived(0, "chat", 0, "a", 0, 1, 1, 0, NEVER + 1)])
        )
        assert again(make_plane, log).divergence.step == 1

    def test_damaged_bytes_are_an_error_that_names_the_step(self, make_plane: MakePlane, recorded: Log) -> None:
        log = list(recorded)
        log[33] = log[33]._replace(events=log[33].events[:-1])
        with pytest.raises(DataError, match="log step 34: events cannot be decoded"):
            again(make_plane, log)

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_no_changed_byte_goes_unnoticed(self, make_plane: MakePlane, recorded: Log, data: st.DataObject) -> None:
        """Any one byte of any step: the replay parts at that step, or the step cannot be read. It never agrees."""
        at = data.draw(st.integers(0, 80), label="step")
        if not recorded[at].events:
            return
        index = data.draw(st.integers(0, len(recorded[at].events) - 1), label="byte")
        flip = data.draw(st.integers(1, 255), label="flip")
        bent = bytearray(recorded[at].events)
        bent[index] ^= flip
        log = [*recorded[:at], recorded[at]._replace(events=bytes(bent))]
        try:
            found = again(make_plane, log).divergence
        except DataError as error:
            found = error
        assert found is not None
        assert str(found).startswith((f"step {at + 1} at ", f"log step {at + 1}: "))
