"""NativeRecorder against RunRecorder: the same steps, the same rows, null for null; and memory that is really its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_bench.results import native_recorder
from sage_bench.results.native_recorder import SCHEMAS, NativeRecorder
from sage_bench.results.recorder import Recorder, RunRecorder
from sage_bench.results.writer import BUFFER_BYTES, StepWriter
from sage_core.commands import AnyCommand, Cancel, Dispatch, Fail, Reject, Respond, Task
from sage_core.errors import ConfigError, InvariantViolation, OutputError, SageError
from sage_core.events import (
    AnyEvent,
    PolicyChanged,
    ReplicaDraining,
    ReplicaJoined,
    ReplicaLeft,
    ReplicaReported,
    RequestArrived,
    RequestCancelled,
    RunEnded,
    TaskFailed,
    TaskFinished,
    TokensProduced,
)
from sage_core.log import Chain
from sage_core.rng import Streams
from sage_core.slo import Slo, SloTable
from sage_core.units import NEVER, PoolKind, RequestKind, task_id

Step = tuple[int, Sequence[AnyEvent], Sequence[AnyCommand]]

PIPELINES = {
    "chat": [("generate", "llm")],
    "embed": [("embed", "embed")],
    "rag": [("embed", "embed"), ("generate", "llm"), ("generate", "llm")],
}
SLO = SloTable({"chat": Slo(ttft_s=1e-5, tpot_s=1e-5), "chat/1": Slo(), "embedding": Slo(e2e_s=1e-5)})
TABLES = ("requests", "tasks", "replicas")

encode = msgspec.msgpack.Encoder().encode


def feed(recorder: NativeRecorder, steps: Sequence[Step]) -> None:
    """What the native event loop does."""
    chain = Chain()
    for now, events, commands in steps:
        entry = chain.step(now, events, commands)
        recorder.native.step(now, entry.events, commands, entry.digest)
        recorder.flush()


def both(folder: Path, steps: Sequence[Step], slo: SloTable = SLO, **options: Any) -> tuple[Recorder, Recorder]:
    """Record ``steps`` both ways; what the two said about them must be equal, errors included."""
    shutil.rmtree(folder, ignore_errors=True)  # of Hypothesis's last example
    said: list[SageError | None] = []
    python = RunRecorder(folder / "python", PIPELINES, slo, **options)
    native = NativeRecorder(folder / "native", PIPELINES, slo, steps=False, **options)
    for recorder in (python, native):
        try:
            with recorder:
                if isinstance(recorder, NativeRecorder):
                    feed(recorder, steps)
                else:
                    for step in steps:
                        recorder(*step)
        except SageError as error:
            said.append(error)
        else:
            said.append(None)
    assert [type(error) for error in said] == [type(said[0])] * 2
    assert str(said[0]) == str(said[1])
    assert python.counts() == native.counts()
    assert python.replicas() == native.replicas()
    for name in TABLES:
        files = [folder / way / f"{name}.parquet" for way in ("python", "native")]
        if name == "tasks" and not options.get("tasks", True):
            assert not any(file.exists() for file in files)
            continue
        expected, found = (pq.read_table(file) for file in files)
        assert found.schema.equals(SCHEMAS[name])
        assert found.to_pylist() == expected.to_pylist(), name
        found.validate(full=True)
    return python, native


@dataclass
class World:
    """Steps that a recorder must take, made out of numbers: each chooses among what is possible at that moment."""

    now: int = 0
    requests: int = 0
    replicas: int = 0
    there: list[int] = field(default_factory=list)  # replicas
    live: list[tuple[int, str]] = field(default_factory=list)
    flights: list[tuple[int, int]] = field(default_factory=list)  # (task, replica)
    tasks: dict[int, int] = field(default_factory=dict)  # made so far, by request
    leaving: list[int] = field(default_factory=list)  # clients
    events: list[AnyEvent] = field(default_factory=list)
    commands: list[AnyCommand] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def end_step(self, later: int = 0) -> None:
        self.steps.append((self.now, self.events, self.commands))
        self.events, self.commands = [], []
        self.live = [each for each in self.live if each[0] not in self.leaving]
        self.leaving.clear()
        self.now += later

    def happens(self, event: AnyEvent) -> None:
        if self.commands:  # of a step the events come first
            self.end_step()
        self.events.append(event)

    def arrive(self, a: int, b: int, word: str) -> None:
        pipeline = list(PIPELINES)[a % 3]
        kind = RequestKind.EMBEDDING if pipeline == "embed" else RequestKind(b % 2)
        scheduled_at, priority = max(0, self.now - b), b % 3
        slo = SLO.of(kind, priority)
        due_at = NEVER if b % 5 == 0 else slo.due_at(scheduled_at, a)
        self.happens(
            RequestArrived(
                self.requests,
                pipeline,
                kind,
                word,
                priority,
                a,
                b,
                scheduled_at,
                slo.ttft_due_at(scheduled_at),
                due_at,
                b,
            )
        )
        self.live.append((self.requests, pipeline))
        self.requests += 1

    def dispatch(self, a: int, b: int, word: str) -> None:
        if not (self.live and self.there):
            return
        replica = self.there[a % len(self.there)]
        chosen = []
        for i in range(b % 3 + 1):
            request, pipeline = self.live[(a + i) % len(self.live)]
            n = self.tasks[request] = self.tasks.get(request, -1) + 1
            stage = (b + i) % len(PIPELINES[pipeline])
            chosen.append(Task(task_id(request, n), stage, a % 2, b % 3, max(0, self.now - a), a, b, a))
        self.flights += [(task.task, replica) for task in chosen]
        self.commands.append(Dispatch(replica, tuple(chosen)))

    def tokens(self, a: int, b: int, word: str) -> None:
        self.happens(TokensProduced(self.some_task(a), b % 4))

    def finish(self, a: int, b: int, word: str) -> None:
        self.happens(TaskFinished(self.some_task(a, ends=True), b % 5))

    def fail_task(self, a: int, b: int, word: str) -> None:
        self.happens(TaskFailed(self.some_task(a, ends=True), word, bool(b % 2)))

    def cancel(self, a: int, b: int, word: str) -> None:
        self.commands.append(Cancel(b, self.some_task(a, ends=True)))

    def respond(self, a: int, b: int, word: str) -> None:
        self.answer(a, lambda request: Respond(request))

    def reject(self, a: int, b: int, word: str) -> None:
        self.answer(a, lambda request: Reject(request, word, b))

    def fail(self, a: int, b: int, word: str) -> None:
        self.answer(a, lambda request: Fail(request, word))

    def go_away(self, a: int, b: int, word: str) -> None:
        request = self.live[a % len(self.live)][0] if self.live else b
        self.happens(RequestCancelled(request))
        self.leaving.append(request)

    def join(self, a: int, b: int, word: str) -> None:
        self.happens(ReplicaJoined(self.replicas, word, PoolKind(a % 3), b, f"node{b % 2}", 1, 1))
        self.there.append(self.replicas)
        self.replicas += 1

    def leave(self, a: int, b: int, word: str) -> None:
        replica = self.there.pop(a % len(self.there)) if self.there and b % 4 else b
        self.happens(ReplicaLeft(replica))
        self.flights = [(task, on) for task, on in self.flights if on != replica]
        self.there = [each for each in self.there if each != replica]

    def report(self, a: int, b: int, word: str) -> None:
        self.happens(ReplicaReported(a % (self.replicas + 1), a, b, a + b))

    def other(self, a: int, b: int, word: str) -> None:
        self.happens((ReplicaDraining(a), PolicyChanged(word), RunEnded(word))[b % 3])

    def some_task(self, number: int, *, ends: bool = False) -> int:
        """One that is on a replica, or news of one that is not."""
        if not self.flights or number % 7 == 6:
            return task_id(number, 0xFFFF)
        at = number % len(self.flights)
        return self.flights.pop(at)[0] if ends else self.flights[at][0]

    def answer(self, number: int, command: Any) -> None:
        if self.live:
            request, _ = self.live.pop(number % len(self.live))
            self.commands.append(command(request))


ACTS = (
    *(World.arrive, World.arrive, World.dispatch, World.dispatch, World.tokens, World.finish, World.finish),
    *(World.fail_task, World.cancel, World.respond, World.respond, World.reject, World.fail, World.go_away),
    *(World.join, World.leave, World.report, World.other),
)
numbers = st.integers(0, 3000)
acts = st.tuples(st.sampled_from(ACTS), numbers, numbers, st.sampled_from(["llm", "embed", "", "ünï", "a" * 40]))


def steps_of(script: Sequence[Sequence[tuple[Any, int, int, str]]]) -> list[Step]:
    world = World()
    for step in ([(World.join, 0, 0, "llm"), (World.join, 1, 1, "embed")], *script):
        for act, a, b, word in step:
            act(world, a, b, word)
        world.end_step(later=sum(a for _, a, _, _ in step) % 1000)
    return world.steps


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(st.lists(acts, max_size=6), max_size=40),
    buffer_rows=st.integers(1, 20),
    tasks=st.booleans(),
    window=st.tuples(st.integers(0, 2000), st.integers(0, 20_000)),
)
def test_equal_rows_for_whatever_a_plane_may_do(
    tmp_path: Path, script: list[Any], buffer_rows: int, tasks: bool, window: tuple[int, int]
) -> None:
    warmup_ns, cooldown_at = window
    both(
        tmp_path,
        steps_of(script),
        buffer_rows=buffer_rows,
        tasks=tasks,
        warmup_ns=warmup_ns,
        cooldown_at=cooldown_at,
    )


def test_the_script_reaches_every_kind_of_row(tmp_path: Path) -> None:
    """The generator above would prove little if its worlds were poor."""
    draw = Streams(1).stream("script")
    script = [
        [(ACTS[draw.integers(len(ACTS))], int(draw.integers(3000)), int(draw.integers(3000)), "llm") for _ in range(n)]
        for n in draw.integers(0, 6, 2000)
    ]
    script.append([(act, 0, 0, "llm") for act in (World.join, World.arrive, World.dispatch)])
    both(tmp_path, steps_of(script))
    requests, tasks = (pq.read_table(tmp_path / "native" / f"{name}.parquet") for name in ("requests", "tasks"))
    assert set(requests["outcome"].to_pylist()) == {"responded", "rejected", "cancelled", "failed"}
    assert set(requests["kind"].to_pylist()) == {"chat", "generate", "embedding"}
    assert set(tasks["outcome"].to_pylist()) == {"finished", "cancelled", "failed", "lost", None}
    for name in (
        "dispatched_ns",
        "first_token_ns",
        "tpot_ns",
        "e2e_ns",
        "reason",
        "replica",
        "ttft_ok",
        "tpot_ok",
        "e2e_ok",
    ):
        assert 0 < requests[name].null_count < requests.num_rows, name
    for name in ("ttft_ok", "tpot_ok", "e2e_ok", "good", "warmup"):
        assert name == "warmup" or {True, False} <= set(requests[name].to_pylist()), name


@pytest.mark.parametrize("order", ["fifo", "priority"])
def test_equal_rows_for_a_queueing_system(tmp_path: Path, queueing: ModuleType, order: str) -> None:
    classes = (queueing.Class(), queueing.Class(kind=RequestKind.EMBEDDING, tenant="b", priority=1, output_tokens=0))
    queue = queueing.Queue(90, 0.03, 2000, 3, 2, order, 20, 0.5, classes)
    python, _ = both(tmp_path, list(queue.steps()), queue.slo, buffer_rows=300, warmup_ns=10**9)
    assert python.counts()["responded"] > 500 and python.counts()["rejected"] > 100
    assert pq.read_metadata(tmp_path / "native" / "requests.parquet").num_row_groups == -(-2000 // 300)


def joined(replica: int = 0) -> ReplicaJoined:
    return ReplicaJoined(replica, "llm", PoolKind.LLM, 0, "gpu0", 8, 2048)


def arrived(request: int, pipeline: str = "chat", priority: int = 0) -> RequestArrived:
    return RequestArrived(request, pipeline, RequestKind.LLM_CHAT, "acme", priority, 100, 50, 0)


def task(request: int, stage: int = 0) -> Task:
    return Task(task_id(request, 0), stage, 0, 0, 0, 100, 50)


@pytest.mark.parametrize(
    ("steps", "kind", "message"),
    [
        ([(0, [], [Respond(0)])], InvariantViolation, "request 0 responded, but it already ended or never arrived"),
        (
            [(0, [arrived(0)], [Reject(0, "a", 1), Fail(0, "b")])],
            InvariantViolation,
            "request 0 failed, but it already",
        ),
        ([(0, [arrived(0), arrived(0)], [])], InvariantViolation, "request 0 arrived twice"),
        ([(0, [joined()], [Dispatch(0, (task(0),))])], InvariantViolation, "request is not live"),
        ([(0, [joined(), arrived(0)], [Dispatch(0, (task(0), task(0)))])], InvariantViolation, "already in flight"),
        ([(0, [joined(), arrived(0)], [Dispatch(0, (task(0, stage=1),))])], InvariantViolation, "has no stage 1"),
        ([(0, [joined(), arrived(0)], [Dispatch(0, (task(0, stage=-1),))])], InvariantViolation, "has no stage -1"),
        ([(0, [arrived(0)], [Dispatch(9, (task(0),))])], InvariantViolation, "replica 9, which never joined"),
        ([(0, [arrived(i) for i in range(25)], [])], InvariantViolation, "25 of 25 requests .* and 15 more"),
        ([(0, [arrived(0, "agent")], [])], ConfigError, r"pipeline 'agent' .*chat, embed, rag"),
        ([(0, [arrived(0, priority=2**31)], [])], ConfigError, "request 0: priority 2147483648 is out of range"),
    ],
)
def test_equal_errors(tmp_path: Path, steps: list[Step], kind: type[SageError], message: str) -> None:
    both(tmp_path, steps)
    with pytest.raises(kind, match=message), NativeRecorder(tmp_path / "again", PIPELINES, SLO) as recorder:
        feed(recorder, steps)


@pytest.mark.parametrize(("late_first", "late_end"), [(0, 0), (1, 1), (0, 1), (1, 2)])
def test_objectives_are_met_up_to_the_threshold(tmp_path: Path, late_first: int, late_end: int) -> None:
    first, end = 10_000 + late_first, 50_000 + late_end  # 4 tokens after the first: TPOT is 10 us, as SLO asks
    event = RequestArrived(0, "chat", RequestKind.LLM_CHAT, "acme", 0, 100, 50, 0, 10_000, 50_000)
    steps: list[Step] = [
        (0, [joined(), event], [Dispatch(0, (task(0),))]),
        (first, [TokensProduced(task_id(0, 0), 1)], []),
        (end, [TaskFinished(task_id(0, 0), 5)], [Respond(0)]),
    ]
    both(tmp_path, steps)
    (row,) = pq.read_table(tmp_path / "native" / "requests.parquet").to_pylist()
    verdicts = (late_first == 0, late_end <= late_first, late_end == 0)
    assert (row["ttft_ok"], row["tpot_ok"], row["e2e_ok"]) == verdicts
    assert row["good"] == all(verdicts)


def test_the_log_is_the_one_that_python_writes(tmp_path: Path, queueing: ModuleType) -> None:
    steps = [*queueing.Queue(50, 0.02, 300).steps(), (10**12, [RunEnded("x" * (BUFFER_BYTES // 2 + 1))] * 2, [])]
    chain = Chain()
    with StepWriter(tmp_path / "python" / "steps.parquet", buffer_rows=100) as log:
        for now, events, commands in steps:
            entry = chain.step(now, events, commands)
            log(now, entry.events, entry.digest)
    with NativeRecorder(tmp_path / "native", queueing.PIPELINES, SLO, buffer_rows=100) as recorder:
        feed(recorder, steps)
    files = [tmp_path / way / "steps.parquet" for way in ("python", "native")]
    assert pq.read_table(files[0]).equals(pq.read_table(files[1]))
    groups = [[pq.read_metadata(file).row_group(i).num_rows for i in range(-(-len(steps) // 100))] for file in files]
    assert groups[0] == groups[1]


def test_the_log_is_full_by_bytes_too(tmp_path: Path) -> None:
    with NativeRecorder(tmp_path, PIPELINES, SLO) as recorder:
        event = RunEnded("x" * (BUFFER_BYTES // 2))
        for now in range(2):
            assert not recorder.native.full_tables()
            recorder.native.step(now, encode([event]), [], bytes(16))
        assert recorder.native.full_tables() == ["steps"]
        recorder.flush()
        assert recorder.native.full_tables() == []
    assert pq.read_table(tmp_path / "steps.parquet")["step"].to_pylist() == [0, 1]


def test_what_was_taken_outlives_the_recorder(tmp_path: Path) -> None:
    """The arrays are the recorder's own memory, handed over: new rows and its end must not reach them."""
    recorder = NativeRecorder(tmp_path, PIPELINES, SLO)
    native = recorder.native
    steps: list[Step] = [(i, [arrived(i)], [Reject(i, f"reason {i % 7}", 0)]) for i in range(1000)]
    feed(recorder, steps)
    columns = zip(native.take("requests"), SCHEMAS["requests"], strict=True)
    arrays = [native_recorder._array(column, field.type, 1000) for column, field in columns]
    feed(recorder, [(i, [arrived(i, priority=5)], [Reject(i, "x", 0)]) for i in range(1000, 3000)])
    recorder.close()
    del recorder, native
    table = pa.Table.from_arrays(arrays, schema=SCHEMAS["requests"])
    table.validate(full=True)
    assert table["request"].to_pylist() == list(range(1000))
    assert table["reason"].to_pylist() == [f"reason {i % 7}" for i in range(1000)]
    assert set(table["priority"].to_pylist()) == {0}
    assert table["replica"].null_count == 1000


def changed(schema: pa.Schema) -> Iterator[pa.Schema]:
    yield schema.remove(3)
    yield schema.append(pa.field("extra", pa.int64()))
    yield schema.set(2, schema.field(2).with_name("other"))
    yield schema.set(1, schema.field(1).with_type(pa.float32()))


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_columns_that_differ_from_the_schema_are_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for schema in changed(SCHEMAS[name]):
        monkeypatch.setitem(SCHEMAS, name, schema)
        with pytest.raises(InvariantViolation, match=rf"{name}: column .* must agree"):
            NativeRecorder(tmp_path, PIPELINES, SLO)


def test_a_writer_of_its_own_writes_the_same(tmp_path: Path, queueing: ModuleType) -> None:
    steps = list(queueing.Queue(rate=40, service_s=0.02, requests=2_000).steps())
    for name in ("loop", "thread"):
        folder = tmp_path / name
        with NativeRecorder(folder, queueing.PIPELINES, SLO, buffer_rows=50, background=name == "thread") as recorder:
            feed(recorder, steps)
    for table in (*TABLES, "steps"):
        one, other = (pq.read_table(tmp_path / name / f"{table}.parquet") for name in ("loop", "thread"))
        assert one.equals(other), table
    assert pq.ParquetFile(tmp_path / "thread/requests.parquet").num_row_groups > 10


def test_what_the_writer_met_is_raised(tmp_path: Path, queueing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list(queueing.Queue(rate=40, service_s=0.02, requests=500).steps())

    def full(self: object, table: pa.Table) -> None:
        raise OutputError("no space left")

    monkeypatch.setattr(native_recorder.TableFile, "write", full)
    recorder = NativeRecorder(tmp_path, queueing.PIPELINES, SLO, buffer_rows=50, background=True)
    with pytest.raises(OutputError, match="no space left"), recorder:
        feed(recorder, steps)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "tasks.parquet").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"tasks\.parquet: cannot be written: No space left on device"):
        NativeRecorder(tmp_path, PIPELINES, SLO)
    assert pq.read_table(tmp_path / "requests.parquet").num_rows == 0, "what was opened before is closed and readable"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_readable_files(tmp_path: Path, error: type[BaseException]) -> None:
    def cut_short() -> None:
        with NativeRecorder(tmp_path, PIPELINES, SLO) as recorder:
            feed(recorder, [(0, [joined(), arrived(0), arrived(1)], [Dispatch(0, (task(0),)), Reject(1, "no", 1)])])
            raise error

    with pytest.raises(error):
        cut_short()
    found = pq.read_table(tmp_path / "requests.parquet").to_pylist()
    assert [(row["request"], row["outcome"], row["ended_ns"]) for row in found] == [
        (1, "rejected", 0),
        (0, "failed", None),
    ]
    assert error.__name__ in found[1]["reason"]
    assert [row["task"] for row in pq.read_table(tmp_path / "tasks.parquet").to_pylist()] == [task_id(0, 0)]
