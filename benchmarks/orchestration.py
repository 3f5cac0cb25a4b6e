"""The same RAG in three forms on the same emulated engines: ``make bench-orchestration`` writes ``orchestration.json``.

*declared*: ``conf/pipeline/rag.yaml`` behind the gateway. *script* and *microservices*: ``examples/apps/baselines``. Engines (two
LLM, one embedding), index, questions and their instants are the same, and so are the answers: a prompt decides how long its
answer is, and the three make the same prompts. All three are up all the time and one of them is asked at a time, in
turn, repetition by repetition, so that a slow minute of the machine falls on each. Bounds on requests in flight are set so
high that none of the baselines turns anything away.

Loads: *alone*, a user who asks the same questions one after another, which shows what a form itself adds; *light*; *busy*, close to what the engines can do; *documents*, half of it while documents are embedded by the same
engine, which the declared form does through its gateway and the others past it; *users*, a closed loop. Latencies count from
the scheduled instant, failures miss the objective. CPU is that of the form's own processes, a question.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import psutil
import uvloop
import yaml
from loopback import cpu_ns, cpu_seconds, free_port, others_share
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sage_bench.client import UnifiedInferenceClient
from sage_bench.compose import device_makers, make_parts
from sage_bench.config import LiveDriverConfig, checked, composed
from sage_bench.indexing import Build, build_index
from sage_bench.live import engine_spec
from sage_bench.loads.arrivals import ArrivalProcess, OnOff, Poisson
from sage_bench.metrics.statistics import holm, paired, t_interval, verdict
from sage_core.rng import Streams
from sage_core.units import SECOND, PoolKind
from sage_live.http.client import Pool, UpstreamError
from sage_live.processes import EngineProcess
from sage_live.retrieval.corpus import python_topics

ROOT: Final = Path(__file__).resolve().parents[1]
BASELINES: Final = ROOT / "examples/apps/baselines"
OUT: Final = Path("results/bench/orchestration.json")

FORMS: Final = ("declared", "script", "microservices")
POLICY: Final = "hybrid"
CLUSTER: Final = (
    "cluster.devices=["
    "{node: a100, count: 2, llm: {profile: llama-3.1-8b-a100-tp1, max_num_seqs: 8, max_num_batched_tokens: 2048}}, "
    "{node: l4, embed: {profile: bge-large-en-v1.5-l4, max_batch_tasks: 32, max_batch_tokens: 16384}}]"
)
"""Few sequences an engine: it is full at a rate that leaves two cores time to spare."""

OUTPUT_TOKENS: Final = 60
"""Mean of the answers, which are exponential, up to the 128 that a client asks for."""

SLO_S: Final = 2.0
DOCUMENT_SLO_S: Final = 30.0
PLACES: Final = 512
"""Requests in flight that a baseline allows."""

BUSY: Final = 20.0
LIGHT, HALF = BUSY / 8, BUSY / 2
DOCUMENTS: Final = 100.0
USERS: Final = 12
WARMUP_S: Final = 3.0
DRAIN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """rate, documents: requests/s. users: of a closed loop, instead of a rate. questions: of each user, instead of a time;
    then all of them count."""

    rate: float = 0.0
    documents: float = 0.0
    users: int = 0
    questions: int = 0


LOADS: Final[Mapping[str, Load]] = {
    "alone": Load(users=1, questions=20),
    "light": Load(LIGHT),
    "busy": Load(BUSY),
    "documents": Load(HALF, DOCUMENTS),
    "users": Load(users=USERS),
}

BETTER: Final = {
    "mean_s": "lower", "p50_s": "lower", "p95_s": "lower", "p99_s": "lower", "slo_attainment": "higher",
    "answered_rps": "higher", "cpu_ms": "lower",
}  # fmt: skip

JUDGED: Final = ("mean_s", "p95_s", "slo_attainment", "cpu_ms")
"""With a verdict. The others say the same in other words, and every comparison more weakens all of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, each run, after a warm-up")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--loads", nargs="+", choices=tuple(LOADS), default=list(LOADS))
    parser.add_argument("--policy", default=POLICY, help="of the declared form")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "policy": options.policy, "cores": os.cpu_count(), "repetitions": 0, "seconds": options.seconds,
        "slo_s": SLO_S, "load_average": os.getloadavg()[0],
    }  # fmt: skip
    before = cpu_seconds()
    console = Console(highlight=False, width=120)
    with tempfile.TemporaryDirectory(prefix="sage-bench-orchestration-") as name:

        def keep(repetitions: int, runs: Runs) -> None:
            figures["repetitions"] = repetitions
            write(options.out, figures, runs)

        runs = uvloop.run(measured(options, Path(name), console, keep))
    # Only now: the CPU time of our processes is known when they have ended.
    figures |= {"load_average_end": os.getloadavg()[0], "others_share": others_share(before)}
    write(options.out, figures, runs)
    for load in options.loads:
        console.print(table_of(load, figures["loads"][load]))
    console.print(
        f"written to {options.out}; load average {figures['load_average']:.2f} before; other programs had "
        f"{figures['others_share']:.0%} of the cores (above 10 %: measure again)"
    )


# --- the three forms -------------------------------------------------------------------------------------------------


class Form(Protocol):
    """One way to build it. ``processes``: what it consists of, beside engines. ``documents``: where those are embedded."""

    processes: Sequence[psutil.Process]
    documents: Pool

    async def ask(self, question: str) -> bool:
        """Whether it was answered."""


@dataclass(slots=True)
class Http:
    """Asked by POST."""

    pool: Pool
    path: str
    body: Callable[[str], object]
    processes: Sequence[psutil.Process]
    documents: Pool
    headers: tuple[tuple[bytes, bytes], ...] = ()

    async def ask(self, question: str) -> bool:
        return await post(self.pool, self.path, self.body(question), self.headers)


@dataclass(slots=True)
class Lines:
    """Asked by a line, answers by one: number and whether it could."""

    process: asyncio.subprocess.Process
    processes: Sequence[psutil.Process]
    documents: Pool
    waiting: dict[int, asyncio.Future[bool]] = field(default_factory=dict)
    numbers: Any = field(default_factory=itertools.count)

    async def ask(self, question: str) -> bool:
        assert self.process.stdin is not None
        number = next(self.numbers)
        answered = self.waiting[number] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(json.dumps([number, question]).encode() + b"\n")
        return bool(await answered)

    async def read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            number, answered = json.loads(line)
            self.waiting.pop(number).set_result(answered)


class Answer:
    """The sink of an answer."""

    def __init__(self) -> None:
        self.status = 0
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status

    def on_body(self, data: bytes) -> None:
        """Nobody reads it."""

    def on_end(self) -> None:
        self.done.set_result(self.status == 200)

    def on_error(self, error: UpstreamError) -> None:
        self.done.set_result(False)


async def post(pool: Pool, path: str, body: object, headers: tuple[tuple[bytes, bytes], ...] = ()) -> bool:
    """Whether the answer is a 200."""
    answer = Answer()
    pool.send("POST", path, ((b"content-type", b"application/json"), *headers), msgspec.json.encode(body), answer)
    return await answer.done


@contextlib.asynccontextmanager
async def forms(folder: Path, policy: str) -> AsyncIterator[dict[str, Form]]:
    """Engines, an index, and the three forms before them."""
    async with contextlib.AsyncExitStack() as running:

        async def started(name: str, command: Sequence[str], port: int, health: str = "/health") -> EngineProcess:
            process = await EngineProcess.start(name, command, port=port, health=health, timeout_s=60.0)
            running.push_async_callback(process.stop)
            return process

        def pool(url: str) -> Pool:
            made = Pool(url, idle_s=3.0)
            running.push_async_callback(made.close)
            return made

        parts = make_parts(checked(composed(["driver=live", CLUSTER, f"policy={policy}"]))[0])
        groups = [group for group in parts.config.cluster.devices for _ in range(group.count)]
        assert isinstance(parts.config.driver, LiveDriverConfig)
        listed = list[dict[str, Any]]()
        llms, embedders = list[str](), list[str]()
        for number, (group, make) in enumerate(zip(groups, device_makers(parts), strict=True)):
            port = free_port()
            command = [sys.executable, "-m", "sage_bench", "llm", "serve", "--port", str(port)]
            command += ["--output-tokens-mean", str(OUTPUT_TOKENS)]
            if group.llm is not None:
                command += ["--llm-config", msgspec.json.encode(group.llm).decode(), "--model", "llm"]
            if group.embed is not None:
                command += ["--embed-config", msgspec.json.encode(group.embed).decode(), "--embed-model", "embed"]
            engine = await started(f"engine-{number}", command, port)
            (embedders if group.llm is None else llms).append(engine.url)
            (joined,) = make(0).joined()
            listed.append(yaml_of(engine_spec(joined, engine.url, number, parts.config.driver)))
        (embedder,) = embedders
        (folder / "engines.yaml").write_text(yaml.safe_dump(listed))
        index = folder / "docs.index"
        await asyncio.to_thread(indexed, embedder, index)

        port = free_port()
        command = ["gateway", "start", "--engines", str(folder / "engines.yaml"), "--port", str(port)]
        command += ["--pipeline", "rag", "--index", f"docs={index}", f"policy={policy}", "slo=none"]
        gateway = await started("gateway", [sys.executable, "-m", "sage_bench", *command], port)
        script = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--serve-script", str(index), embedder, *llms,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        lines = Lines(script, [psutil.Process(script.pid)], pool(embedder))
        reading = asyncio.ensure_future(lines.read())
        running.push_async_callback(stopped, script, reading)
        services: dict[str, EngineProcess] = {}
        retry = "timeout_s: 120, attempts: 2, backoff_s: 0.5"
        for name, given in (
            ("retriever", [f"index={index}", f"engines=[{embedder}]"]),
            ("generator", [f"engines=[{', '.join(llms)}]", "model=llm"]),
            ("front", []),
        ):
            port = free_port()
            given = [f"port={port}", "log=false", f"requests_max={PLACES}", "queue_s=60", *given]
            given += [f"{other}={{url: {each.url}/{path}, {retry}}}" for other, each, path in (
                (other, each, {"retriever": "search", "generator": "generate"}[other]) for other, each in services.items()
            ) if name == "front"]  # fmt: skip
            source = BASELINES / "rag_microservices" / name
            services[name] = await started(name, [sys.executable, f"{source}.py", f"{source}.yaml", *given], port)
        chat = {"model": "rag", "max_tokens": 128}
        yield {
            "declared": Http(
                pool(gateway.url), "/v1/chat/completions",
                lambda question: {**chat, "messages": [{"role": "user", "content": question}]},
                [psutil.Process(gateway.pid)], pool(gateway.url), ((b"x-sage-e2e-ms", b"%d" % (SLO_S * 1e3)),),
            ),
            "script": lines,
            "microservices": Http(
                pool(services["front"].url), "/ask", lambda question: {"question": question},
                [psutil.Process(each.pid) for each in services.values()], pool(embedder),
            ),
        }  # fmt: skip


async def stopped(script: asyncio.subprocess.Process, reading: asyncio.Future[None]) -> None:
    assert script.stdin is not None
    script.stdin.close()
    await script.wait()
    await reading


def yaml_of(spec: Any) -> dict[str, Any]:
    """An engine as ``--engines`` lists it, with what it is expected to cost."""
    names = ("url", "model", "pool", "name", "tasks_max", "batch_tokens_max", "kv_tokens_max")
    costs = ("fixed_ns", "input_token_ns", "output_token_ns", "output_seq_ns")
    kind = "embedding" if spec.kind is PoolKind.EMBEDDING else "llm"
    return {"kind": kind, **{name: getattr(spec, name) for name in (*names, *costs)}}


def indexed(embedder: str, folder: Path) -> None:
    """The demo corpus, embedded by the engine whose vectors the questions' are compared with."""
    with UnifiedInferenceClient.create(embedder) as client:
        build_index(python_topics(), client, Build("embed"), folder=folder)


def serve_script(index: str, embedder: str, *llms: str) -> None:
    """The script as a process that takes questions as lines: what it does with one is its own ``answer``."""
    spec = importlib.util.spec_from_file_location("rag_script", BASELINES / "rag_script.py")
    assert spec is not None and spec.loader is not None
    rag: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rag)
    rag.CONNECTIONS_PER_ENGINE = PLACES

    async def serve() -> None:
        loaded = rag.VectorIndex.load(Path(index))
        embedders, engines = rag.Engines([embedder], rag.EMBED_TIMEOUT_S), rag.Engines(llms, rag.LLM_TIMEOUT_S)
        options = argparse.Namespace(llm_model="llm")
        asked = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)

        async def one(number: int, question: str) -> None:
            try:
                answered = bool(await rag.answer(question, loaded, embedders, engines, options))
            except rag.OpenAIError:
                answered = False
            print(json.dumps([number, answered]), flush=True)

        async with asyncio.TaskGroup() as tasks:
            while line := await asked.readline():
                tasks.create_task(one(*json.loads(line)))

    asyncio.run(serve())


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """Of one form under one load. latencies_s: of the questions that count; NaN where there was no answer."""

    latencies_s: list[float] = field(default_factory=list)
    documents_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    span_s: float = 0.0
    asked: int = 0  # the warm-up included, as its CPU is

    def figures(self) -> dict[str, float]:
        """NaN for what the run has no answers, or no questions, to tell from."""
        asked, answered = len(self.latencies_s), [each for each in self.latencies_s if each == each]
        documents = [each for each in self.documents_s if each == each]
        p50, p95, p99 = (percentile(answered, q) for q in (50, 95, 99))
        return {
            "questions": float(asked),
            "failures": float(asked - len(answered)),
            "mean_s": statistics.fmean(answered) if answered else math.nan, "p50_s": p50, "p95_s": p95, "p99_s": p99,
            "slo_attainment": sum(each <= SLO_S for each in answered) / asked if asked else math.nan,
            "answered_rps": len(answered) / self.span_s,
            "cpu_ms": 1e3 * self.cpu_s / self.asked if self.asked else math.nan,
            **({"documents_p95_s": percentile(documents, 95)} if self.documents_s else {}),
        }  # fmt: skip


def percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else math.nan


Runs = dict[str, dict[str, list[dict[str, float]]]]


async def measured(
    options: argparse.Namespace, folder: Path, console: Console, keep: Callable[[int, Runs], None]
) -> Runs:
    """Load to form to figures, one of each repetition. keep: told their number and all that is known after each."""
    found: Runs = {load: {form: [] for form in FORMS} for load in options.loads}
    async with forms(folder, options.policy) as built:
        for form in built.values():  # connections, imports and caches are there before anything counts
            await one(form, Load(users=2), 2.0, seed=0)
        for repetition in range(1, options.repetitions + 1):
            for load in options.loads:
                turn = repetition % len(FORMS)
                for name in (*FORMS[turn:], *FORMS[:turn]):
                    outcome = await one(built[name], LOADS[load], options.seconds, seed=repetition)
                    found[load][name].append(outcome.figures())
                    console.print(f"{repetition} {load} {name}: {brief(found[load][name][-1])}", style="dim")
            keep(repetition, found)
    return found


async def one(form: Form, load: Load, seconds: float, seed: int) -> Outcome:
    """Ask for the warm-up and ``seconds``; the seed decides questions and instants."""
    streams = Streams(seed)
    ask = texts(seed)
    found = Outcome(span_s=seconds)
    loop = asyncio.get_running_loop()
    start, length = loop.time() + 0.05, WARMUP_S + seconds
    before_ns = sum(map(cpu_ns, form.processes))

    async def question(at: float, text: str) -> None:
        found.asked += 1
        answered = await form.ask(text)
        now = loop.time()
        if load.questions or WARMUP_S <= (now - start if load.users else at) < length:
            found.latencies_s.append(now - start - at if answered else float("nan"))

    async def document(at: float, text: str) -> None:
        answered = await post(form.documents, "/v1/embeddings", {"model": "embed", "input": text}, BATCH)
        if at >= WARMUP_S:
            found.documents_s.append(loop.time() - start - at if answered else float("nan"))

    async def user() -> None:
        for number in itertools.count():
            at = loop.time() - start
            if number == load.questions if load.questions else at >= length:
                break
            await question(at, ask(20))

    async def paced(instants: Sequence[float], make: Callable[[float], Any]) -> None:
        async with asyncio.TaskGroup() as asked:
            for at in instants:
                await asyncio.sleep(start + at - loop.time())
                asked.create_task(make(at))

    async with asyncio.timeout(length + DRAIN_S), asyncio.TaskGroup() as everything:
        for _ in range(load.users):
            everything.create_task(user())
        if load.rate:
            at = instants(Poisson(), load.rate, length, streams, "questions")
            everything.create_task(paced(at, lambda at: question(at, ask(20))))
        if load.documents:
            at = instants(OnOff(on_s=6.0, off_s=6.0), load.documents, length, streams, "documents")
            everything.create_task(paced(at, lambda at: document(at, ask(220))))
    if load.questions:
        found.span_s = loop.time() - start
    found.cpu_s = (sum(map(cpu_ns, form.processes)) - before_ns) / 1e9
    return found


BATCH: Final = ((b"x-sage-priority", b"1"), (b"x-sage-e2e-ms", b"%d" % (DOCUMENT_SLO_S * 1e3)))
"""What a document's request says of itself. Engines do not read it."""


def instants(process: ArrivalProcess, rate: float, length_s: float, streams: Streams, name: str) -> list[float]:
    """Seconds, below ``length_s``."""
    chunks = (chunk / SECOND for chunk in process.instants(rate, lambda part: streams.stream(f"{name}/{part}")))
    return [float(at) for at in itertools.takewhile(lambda at: at < length_s, itertools.chain.from_iterable(chunks))]


def texts(seed: int) -> Callable[[int], str]:
    """Texts of the corpus' words: ``mean`` words, from half to one and a half times as many."""
    draw = random.Random(seed)
    words = WORDS or [word for _, text in python_topics() for word in text.split() if word.isalpha()]
    WORDS[:] = words
    return lambda mean: " ".join(draw.choices(words, k=draw.randint(mean // 2, mean + mean // 2)))


WORDS: Final[list[str]] = []


# --- figures ---------------------------------------------------------------------------------------------------------


def judged(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Means of the repetitions with their intervals; and what the declared form differs by, repetition by repetition."""
    found: dict[str, Any] = {}
    for name, of in runs.items():
        intervals = {metric: t_interval([run.get(metric, math.nan) for run in of]) for metric in of[0]}
        found[name] = {
            metric: {"mean": each.mean, "low": each.low, "high": each.high} for metric, each in intervals.items()
        }
    for other in FORMS[1:]:
        rows = found[f"declared - {other}"] = {}
        for metric in BETTER:
            difference, p = paired(*([run[metric] for run in runs[form]] for form in (other, "declared")))
            rows[metric] = {"mean": difference.mean, "low": difference.low, "high": difference.high, "p": p}
    return found


def write(out: Path, figures: dict[str, Any], runs: Runs) -> None:
    """Judge what has been measured so far, and write it."""
    figures["loads"] = {load: judged(of) for load, of in runs.items()}
    adjust(figures["loads"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def adjust(loads: dict[str, Any]) -> None:
    """Verdicts on JUDGED, with p adjusted for all of these comparisons (Holm)."""
    rows = [
        (metric, row)
        for load in loads.values()
        for name, metrics in load.items() if name.startswith("declared - ")
        for metric, row in metrics.items() if metric in JUDGED
    ]  # fmt: skip
    for (metric, row), p in zip(rows, holm([row["p"] for _, row in rows]), strict=True):
        row["p_adjusted"] = p
        row["verdict"] = verdict(row["mean"], p, BETTER[metric])  # type: ignore[arg-type]


def brief(figures: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {figures[name]:.3g}"
        for name in ("questions", "failures", *BETTER, "documents_p95_s")
        if name in figures
    )


def table_of(load: str, figures: Mapping[str, Any]) -> Table:
    given = LOADS[load]
    asked = f"{given.users} user{'s'[: given.users - 1]}" if given.users else f"{given.rate:g} questions/s"
    more = f", {given.documents:g} documents/s in bursts" if given.documents else ""
    table = Table(
        "", *FORMS, *(f"declared - {other}, 95 %" for other in FORMS[1:]), box=SIMPLE, title=f"{load}: {asked}{more}"
    )
    for metric in (*BETTER, "failures", "documents_p95_s"):
        if metric not in figures[FORMS[0]]:
            continue
        cells = [f"{figures[form][metric]['mean']:.3f}" for form in FORMS]
        for other in FORMS[1:]:
            row = figures[f"declared - {other}"].get(metric)
            cells.append(
                ""
                if row is None
                else f"{row['mean']:+.3f} ± {(row['high'] - row['low']) / 2:.3f} {row.get('verdict', '')}"
            )
        table.add_row(metric, *cells)
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve-script"]:
        serve_script(*sys.argv[2:])
    else:
        main()
