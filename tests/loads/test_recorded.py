"""`load=recorded`: the requests of a log, with the output lengths that it tells and stated rules for those it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sage_bench.compose import make_parts
from sage_bench.config import composed
from sage_bench.loads.recorded import RecordedLoad
from sage_bench.results.manifest import LoadFact, PolicyFact, Timing, write_manifest
from sage_bench.results.reader import Run
from sage_bench.results.writer import StepWriter
from sage_bench.run import run
from sage_core.errors import ConfigError, DataError
from sage_core.events import (
    AnyEvent,
    PolicyChanged,
    ReplicaLeft,
    RequestArrived,
    RequestCancelled,
    RunEnded,
    TaskFailed,
    TaskFinished,
    TokensProduced,
)
from sage_core.load import Arrival
from sage_core.log import Chain
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_core.units import Nanos, RequestKind, task_id

Steps = Sequence[tuple[int, Sequence[AnyEvent]]]
Record = Callable[..., Path]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """``record(steps, **facts)``: the folder of a live run with this log. What was decided does not matter to a load."""

    def write(steps: Steps, **facts: Any) -> Path:
        chain = Chain()
        with StepWriter(tmp_path / "steps.parquet") as log:
            for now, events in steps:
                log(*chain.step(now, events, ()))
        given: dict[str, Any] = {"source": "live", "cooldown_at_ns": None, "config": {}, **facts}
        write_manifest(
            tmp_path, experiment="run", run_id="r", status="complete", policy=PolicyFact("fifo"), seed=0, load=LoadFact(),
            duration_ns=1, digest=chain.digest.hex(), steps=len(steps), control_s=0.0, native_build="reference",
            timing=Timing("2026-01-01T00:00:00+00:00", 1.0, 1.0), **given,
        )  # fmt: skip
        return tmp_path

    return write


def asked(request: int, scheduled_at: int = 0, pipeline: str = "chat", **fields: Any) -> RequestArrived:
    kind = RequestKind.EMBEDDING if pipeline == "embed" else RequestKind.LLM_CHAT
    given = {"tenant": "t", "priority": 0, "input_tokens": 9, "output_tokens_max": 0 if pipeline == "embed" else 512}
    return RequestArrived(request, pipeline, int(kind), scheduled_at=scheduled_at, **{**given, **fields})


def load_of(folder: Path, seed: int = 1) -> RecordedLoad:
    return RecordedLoad(str(folder), streams=Streams(seed), slo=SloTable())


def lengths(folder: Path, seed: int = 1) -> dict[int, int]:
    return {arrival.request.request: arrival.output_tokens for arrival in load_of(folder, seed).arrivals()}


def finished(request: int, tokens: int, n: int = 0) -> TaskFinished:
    return TaskFinished(task_id(request, n), tokens)


def test_requests_arrive_when_they_did_and_are_as_long_as_they_were(record: Record) -> None:
    late = asked(0, scheduled_at=70, ttft_due_at=500, due_at=900, prefix=3, tenant="a", priority=2)
    folder = record(
        [
            (100, (late, asked(1, 100))),
            (120, (asked(2, 110, "embed"),)),
            (400, (finished(1, 7), finished(0, 30))),
            (500, (finished(2, 0),)),
        ]
    )
    load = load_of(folder)
    assert list(load.arrivals()) == list(load.arrivals()) == [
        Arrival(Nanos(100), late, 30),
        Arrival(Nanos(100), asked(1, 100), 7),
        Arrival(Nanos(120), asked(2, 110, "embed"), 0),
    ]  # fmt: skip
    assert load.ended(500, 0) is None
    assert load.files() == [str(folder / "steps.parquet")]
    (folder / "tasks.parquet").touch()
    assert load.files() == [str(folder / "steps.parquet"), str(folder / "tasks.parquet")], (
        "sizes of results are read there"
    )
    assert load.limits == (None, None)
    assert [note for note in load.notes if "shared prefix" not in note] == []


def test_the_attempt_that_finished_counts(record: Record) -> None:
    events = (TokensProduced(task_id(0, 0), 4), TaskFailed(task_id(0, 0), "gone", True), finished(0, 21, n=1))
    assert lengths(record([(0, (asked(0),)), (9, events)])) == {0: 21}


def test_an_answer_without_tokens_is_simulated_with_one(record: Record) -> None:
    assert lengths(record([(0, (asked(0),)), (9, (finished(0, 0),))])) == {0: 1}


def test_an_unknown_length_is_that_of_a_like_request_that_finished(record: Record) -> None:
    """Same pipeline, tenant and priority, and longer than what had been produced; else the cap."""
    done = [(asked(i), finished(i, 10 + i)) for i in range(40)]
    other = (asked(40, tenant="other"), finished(40, 400))
    rejected = [asked(i) for i in range(100, 200)]
    steps: list[tuple[int, tuple[AnyEvent, ...]]] = [(i, pair) for i, pair in enumerate([*done, other])]
    steps += [
        (50, tuple(rejected)),
        (51, (asked(200), asked(201), asked(202, tenant="nobody"), asked(203, pipeline="embed"))),
        (52, (TokensProduced(task_id(200, 0), 1), TokensProduced(task_id(200, 0), 43))),
        (53, (TokensProduced(task_id(201, 0), 49),)),
        (54, (RunEnded("the end"),)),
    ]
    folder = record(steps)
    found = lengths(folder)
    drawn = [found[i] for i in range(100, 200)]
    assert set(drawn) <= set(range(10, 50)) and len(set(drawn)) > 20
    assert found[200] in range(45, 50)
    assert found[201] == 512 and found[202] == 512  # none was longer; none was like it
    assert found[203] == 0
    assert lengths(folder) == found
    assert lengths(folder, seed=2) != found
    assert [note for note in load_of(folder).notes if note.startswith("103 requests did not finish")]


def test_clients_who_left_are_kept_with_what_they_had_been_given(record: Record) -> None:
    steps: Steps = [
        (0, (asked(0), asked(1), asked(2), asked(3))),
        (5, (TokensProduced(task_id(0, 0), 3), finished(2, 8))),
        (6, (RequestCancelled(0), RequestCancelled(1), RequestCancelled(2), RequestCancelled(3))),
        (7, (finished(3, 5),)),  # the engine had it ready
    ]
    folder = record(steps)
    assert lengths(folder) == {0: 3, 2: 8, 3: 5}
    assert any(note.startswith("3 clients left") for note in load_of(folder).notes)


def test_what_cannot_be_repeated_is_told(record: Record) -> None:
    steps: Steps = [(0, (asked(0, prefix=4),)), (1, (PolicyChanged("fifo"), ReplicaLeft(1))), (2, (finished(0, 5),))]
    notes = load_of(record(steps)).notes
    assert [note.split()[0] for note in notes] == ["1", "the", "1"]
    assert "shared prefix" in notes[0] and "policy was changed 1 times" in notes[1] and "cluster.faults" in notes[2]
    # The faults of a simulation are in its configuration.
    assert len(load_of(record(steps, source="simulation")).notes) == 2


def test_the_cool_down_begins_where_it_did(record: Record) -> None:
    folder = record([(0, (asked(0),))], cooldown_at_ns=4_000_000_000, config={"cooldown_s": 1.5})
    assert load_of(folder).limits.until == 5_500_000_000
    assert load_of(folder).began == 0


def test_a_load_that_began_after_its_gateway(record: Record) -> None:
    folder = record([(0, (asked(0),))], warmup_ns=1_250_000_000, config={"warmup_s": 1.0})
    assert load_of(folder).began == 250_000_000, "its warm-up is of the load"


def test_a_simulated_run_gives_back_its_load(tmp_path: Path) -> None:
    """Against the load that made it: every request, instant and true length."""
    overrides = [
        "experiment=mixed",
        "load.rate=50",
        "load.duration_s=4",
        "seed=3",
        "policy=hybrid",
        f"results={tmp_path}",
    ]
    result = run(composed(overrides))
    told = list(load_of(result.folder).arrivals())
    assert told == [arrival._replace(contents=None) for arrival in make_parts(result.config).load.arrivals()]
    assert len(told) > 100


@pytest.mark.parametrize("mechanism", ["native", "reference"])
def test_a_log_with_gaps_in_it_can_be_run(record: Record, tmp_path: Path, mechanism: str) -> None:
    """Ids stay those of the log where requests are left out, and need not be in order."""
    steps: Steps = [
        (5, (asked(7), asked(3), asked(4, 2, "embed"))),
        (6, (RequestCancelled(3), finished(7, 6))),
        (9, (asked(1), finished(4, 0))),
        (10, (finished(1, 4),)),
    ]
    folder = record(steps)
    chosen = ["load=recorded", f"load.run={folder}", f"mechanism={mechanism}", f"results={tmp_path / 'results'}"]
    result = run(composed(chosen))
    rows = {row["request"]: row for row in Run(result.folder).table("requests").to_pylist()}
    assert {request: row["output_tokens"] for request, row in rows.items()} == {7: 6, 4: 0, 1: 4}
    assert {row["outcome"] for row in rows.values()} == {"responded"}
    assert (rows[4]["scheduled_ns"], rows[4]["arrived_ns"]) == (2, 5)


def test_mistakes_are_named(record: Record, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"load\.run: expected the folder of a run"):
        RecordedLoad(None, streams=Streams(1), slo=SloTable())
    with pytest.raises(DataError, match=r"nowhere.*expected the manifest of a run"):
        load_of(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"steps\.parquet: no request arrived"):
        load_of(record([(0, (ReplicaLeft(1),))]))
    (tmp_path / "steps.parquet").unlink()
    with pytest.raises(DataError, match=r"there is no log"):
        load_of(tmp_path)
