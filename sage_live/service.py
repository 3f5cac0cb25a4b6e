"""The live control plane with its engines: what the gateway serves over HTTP and a client may hold in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from sage_core import events as e
from sage_core.classify import SHAPES, ClassificationError, RequestClassifier
from sage_core.commands import Fail, Reject, Respond
from sage_core.errors import ConfigError, DataError
from sage_core.native_plane import Plane
from sage_core.slo import SloTable
from sage_core.stepper import ColumnRecorder, Recorder
from sage_core.units import NEVER, PoolKind, RequestKind, request_of, seconds
from sage_live import errors
from sage_live.call import Call
from sage_live.driver import LiveDriver, Outcome
from sage_live.health import HealthConfig, State, Watch
from sage_live.http_engine import EngineSpec, HttpEngine
from sage_live.pipelines.function_engine import FunctionEngine
from sage_live.pipelines.pipeline import LivePipeline
from sage_live.pipelines.question import question
from sage_live.pipelines.run import PipelineRun

PIPELINES: Final = {RequestKind.LLM_CHAT: "chat", RequestKind.LLM_GENERATE: "generate", RequestKind.EMBEDDING: "embed"}
"""What a request of each kind goes through, on the pool of its model."""

SHAPE_OF: Final = {kind: key for key, kind in SHAPES.items()}
"""The key of the body that says what is asked; each body was decoded by it."""

TENANTS_MAX: Final = 10_000
"""Names of tenants that the plane may come to know: it remembers each for good. Whoever comes later is :data:`OTHERS`."""

OTHERS: Final = "_others"
"""Tenants beyond the last that the plane knows by name, all together."""

OUTPUT_TOKENS_MAX: Final = 2**31 - 1
"""What a cap may come to; several choices of the longest answer that can be asked for would be more."""

_log = logging.getLogger(__name__)

GAP_MAX: Final = 1 << 16
"""How far ahead of the next number a client's own may be; the plane wants ids dense."""


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """live_max: requests that may be live at once; above it clients are told to come back. request_s: what a request
    may take in all. no_engine_s: what it may wait while no engine of its model is in service. output_tokens_max: assumed
    cap of a client that states none. trust_schedule: take the client's word for when a request was scheduled, what its
    number is, how long its prompt, and by which cap to plan (a load generator on this machine)."""

    live_max: int = 10_000
    request_s: float = 600.0
    no_engine_s: float = 30.0
    output_tokens_max: int = 1024
    trust_schedule: bool = False

    def __post_init__(self) -> None:
        if self.live_max < 1:
            raise ConfigError(f"live_max: expected 1 or more, got {self.live_max}")
        for key in ("request_s", "no_engine_s"):
            if not 0 < getattr(self, key) <= 1e6:
                raise ConfigError(f"{key}: expected seconds above 0, got {getattr(self, key)!r}")


class _Deployed(NamedTuple):
    """A pipeline in service. models: what the engines of its pools serve, by pool."""

    live: LivePipeline
    models: Mapping[str, str]


class Observer(Protocol):
    """Told of every call once, when it has ended: for metrics, logs and traces."""

    def __call__(self, call: Call, outcome: Outcome, status: int, now: int) -> None: ...


class Served:
    """A model, and what is known of its prompts. ``pool``: the plane's name for its engines."""

    __slots__ = ("engines", "kind", "model", "pool", "tokens_per_byte")

    WEIGHT: Final = 0.05

    def __init__(self, model: str, kind: PoolKind, pool: str) -> None:
        self.model = model
        self.kind = kind
        self.pool = pool
        self.engines = 0
        self.tokens_per_byte = 0.25

    def estimate(self, bytes_: int) -> int:
        """Tokens of a prompt of so many bytes."""
        return max(1, round(bytes_ * self.tokens_per_byte))

    def learn(self, bytes_: int, tokens: int) -> None:
        """An engine has counted the tokens of a prompt."""
        if bytes_ and tokens:
            self.tokens_per_byte += (min(tokens / bytes_, 4.0) - self.tokens_per_byte) * self.WEIGHT


class InferenceService:
    """Build inside a running event loop; :meth:`close` when done."""

    def __init__(
        self,
        plane: Plane,
        config: ServiceConfig | None = None,
        *,
        slo: SloTable | None = None,
        health: HealthConfig | None = None,
        record: Recorder | ColumnRecorder | None = None,
        observe: Observer | None = None,
        on_state: Callable[[HttpEngine, State, str], None] | None = None,
    ) -> None:
        self.driver = LiveDriver(plane, record)
        self.config = config or ServiceConfig()
        self.calls: dict[int, Call] = {}
        self.watches: dict[str, Watch] = {}
        self.models: dict[str, Served] = {}
        self.pipelines: dict[str, _Deployed] = {}
        self.policy = plane.policy.name
        self.draining = False
        self._slo = slo or SloTable()
        self._health = health or HealthConfig()
        self.observe = observe
        self._on_state = on_state
        self._classifier = RequestClassifier()
        self._tenants: set[str] = {"default"}
        self._functions: dict[str, FunctionEngine] = {}
        self._pools: dict[str, tuple[str, PoolKind]] = {}  # what each was first, for the plane never forgets
        self._request_next = 0
        self._deserted: dict[str, int] = {}  # models without an engine in service, and when that was seen first
        self._skipped: set[int] = set()  # below the next number and not given out
        self._device_next = 0
        self._emptied: asyncio.Event | None = None
        self._timer = asyncio.get_running_loop().call_later(1.0, self._sweep)

    # --- engines --------------------------------------------------------------------------------------------------

    def add_engine(self, spec: EngineSpec) -> Watch:
        """An engine is put in service; it gets work when it is found healthy. ConfigError for one that clashes."""
        served = self.models.get(spec.model)
        pool = spec.pool or spec.model
        if served is not None and (served.kind is not spec.kind or served.pool != pool):
            raise ConfigError(
                f"engine {spec.url}: model {spec.model!r} is served as {served.kind.name} by pool {served.pool!r}, "
                f"not as {spec.kind.name} by {pool!r}; engines of one model are of one kind"
            )
        model, kind = self._pools.get(pool, (spec.model, spec.kind))
        if (model, kind) != (spec.model, spec.kind):
            raise ConfigError(
                f"engine {spec.url}: pool {pool!r} is that of the {kind.name} engines of {model!r} for as long as this "
                f"control plane runs; it cannot take {spec.model!r} as {spec.kind.name}"
            )
        if spec.called in self.watches:
            raise ConfigError(f"engine {spec.called!r} is in service already; give this one another name")
        if pool in self._functions:
            raise ConfigError(
                f"engine {spec.url}: pool {pool!r} is that of a pipeline's functions; choose another name"
            )
        engine = HttpEngine(spec, self.calls, self._device_next)
        self._device_next += 1
        self._pools[pool] = (spec.model, spec.kind)
        if served is None:
            served = self.models[spec.model] = Served(spec.model, spec.kind, pool)
            self._register()
        served.engines += 1
        self.driver.add(engine)
        watch = self.watches[engine.name] = Watch(engine, self.driver, self._health, self._peers, self._state)
        return watch

    def add_pipeline(self, live: LivePipeline) -> None:
        """Requests may ask for it by its name, as if it were a model. The plane has to know it already. ConfigError for a
        pool that no engine is in, or one for other work, or a name that is taken: engines come first."""
        if live.name in self.models:
            raise ConfigError(f"pipeline {live.name!r}: a model is called that already; choose another name")
        for pool, kind in live.engine_pools.items():
            if pool not in self._pools:
                raise ConfigError(
                    f"pipeline {live.name}: no engine is in pool {pool!r}, which it needs; there are "
                    f"{', '.join(self._pools) or 'none'} (say --pool {pool}=MODEL)"
                )
            model, there = self._pools[pool]
            if there is not kind:
                stage = next(each.name for each in live.pipeline.stages if each.op.pool == pool)
                raise ConfigError(
                    f"pipeline {live.name}: stage {stage} needs {kind.name} engines, and those of pool {pool!r} ({model}) are "
                    f"{there.name}"
                )
        for pool in live.workers:
            if pool in self._pools:
                raise ConfigError(
                    f"pipeline {live.name}: pool {pool!r} is that of the engines of {self._pools[pool][0]!r}, and functions "
                    "cannot share it; choose another name"
                )
        for pool, workers in live.workers.items():
            if pool not in self._functions:
                number, device = self.driver.replica_number(), self._device_next
                engine = FunctionEngine(pool, self.calls, workers.joined(number, pool, device))
                self._device_next += 1
                self._functions[pool] = engine
                self.driver.add(engine)
        self.pipelines[live.name] = _Deployed(live, {pool: self._pools[pool][0] for pool in live.engine_pools})
        self.models[live.name] = Served(live.name, PoolKind.LLM, "")
        self._register()

    async def remove_engine(self, name: str, *, drain: bool = True) -> None:
        """Out of service: after what it has, or at once. KeyError for an unknown name."""
        watch = self.watches[name]
        if drain:
            await watch.drain().wait()
        await watch.close()
        await self.driver.remove(watch.engine)
        if self.watches.pop(name, None) is not None:
            served = self.models[watch.engine.spec.model]
            served.engines -= 1
            if not served.engines:
                del self.models[served.model]
                self._register()
                for call in self.calls.values():
                    if call.model == served.model:
                        self._give_up(call, errors.overloaded(5.0, f"No engine of {call.model} is in service."))

    def _register(self) -> None:
        """The classifier knows what is served now, whatever a model's name may suggest."""
        self._classifier = RequestClassifier(
            {
                model: RequestKind.EMBEDDING if served.kind is PoolKind.EMBEDDING else RequestKind.LLM_CHAT
                for model, served in self.models.items()
            }
        )

    def set_policy(self, name: str) -> None:
        """Queued work is decided anew under it. The plane raises for an unknown one: check before."""
        self.policy = name
        self.driver.post(e.PolicyChanged(name))

    def _peers(self, engine: HttpEngine) -> list[HttpEngine]:
        pool = engine.spec.pool or engine.spec.model
        return [
            watch.engine
            for watch in self.watches.values()
            if watch.engine is not engine
            and watch.state is State.HEALTHY
            and (watch.engine.spec.pool or watch.engine.spec.model) == pool
        ]

    def _state(self, engine: HttpEngine, state: State, why: str) -> None:
        if self._on_state is not None:
            self._on_state(engine, state, why)

    # --- requests -------------------------------------------------------------------------------------------------

    def check(self, call: Call) -> Served:
        """What serves the call. Raises ApiError where nothing will even be tried."""
        if self.driver.broken is not None:
            raise errors.internal()
        served = self.models.get(call.model)
        if served is None:
            raise errors.model_not_found(call.model, sorted(self.models))
        try:
            call.kind = self._classifier.classify(call.path, call.model, (SHAPE_OF[call.kind],))
        except ClassificationError as error:
            raise errors.bad_request(f"{error}.", param="model") from None
        if self.draining:
            raise errors.overloaded(5.0, "The gateway is shutting down.")
        if self.driver.live >= self.config.live_max:
            raise errors.overloaded(1.0)
        return served

    def submit(
        self,
        call: Call,
        *,
        priority: int = 0,
        output_tokens_max: int | None = None,
        input_tokens: int | None = None,
        ttft_s: float | None = None,
        e2e_s: float | None = None,
        scheduled_at: int | None = None,
        number: int | None = None,
    ) -> int:
        """Ask; the answer goes to ``call.answer``. The request's number: ``number`` if it is free, else the next.

        input_tokens: exact, where the caller knows. ttft_s, e2e_s: the client's own objectives, else those of its
        class. Raises ApiError where nothing is even tried.
        """
        driver = self.driver
        served = self.check(call)
        if call.tenant not in self._tenants:
            if len(self._tenants) < TENANTS_MAX:
                self._tenants.add(call.tenant)
            else:
                call.tenant = OTHERS
        now = driver.now
        at = now if scheduled_at is None else max(0, min(scheduled_at, now))
        generates = call.kind is not RequestKind.EMBEDDING
        cap = min(output_tokens_max or self.config.output_tokens_max, OUTPUT_TOKENS_MAX) if generates else 0
        call.input_tokens = served.estimate(len(call.body)) if input_tokens is None else input_tokens
        objective = self._slo.of(int(call.kind), priority)
        deployed = self.pipelines.get(call.model)
        if deployed is not None:
            text = question(call)
            call.input_tokens = served.estimate(len(text.encode())) if input_tokens is None else input_tokens
            call.run = PipelineRun(deployed.live, call, text, deployed.models)
        number = call.request = self._number(number)
        call.arrived_ns = now
        call.deadline_ns = now + int(self.config.request_s * 1e9)
        self.calls[number] = call
        driver.submit(
            e.RequestArrived(
                number,
                f"{PIPELINES[call.kind]}@{served.pool}" if deployed is None else call.model,
                int(call.kind),
                call.tenant,
                priority,
                call.input_tokens,
                cap,
                at,
                objective.ttft_due_at(at) if ttft_s is None else at + seconds(ttft_s),
                min(objective.due_at(at, cap), NEVER) if e2e_s is None else at + seconds(e2e_s),
            ),
            self._ended,
        )
        return number

    def _number(self, wanted: int | None) -> int:
        following = self._request_next
        if wanted is None or not following <= wanted < following + GAP_MAX:
            if wanted is not None and wanted in self._skipped:
                self._skipped.discard(wanted)
                return wanted
            wanted = following
        self._skipped.update(range(following, wanted))
        self._request_next = wanted + 1
        return wanted

    def cancel(self, request: int) -> None:
        """The client went away."""
        self.driver.cancel(request)

    def _ended(self, outcome: Outcome) -> None:
        call = self.calls.pop(outcome.request)
        try:
            status = self._answer(call, outcome)
            if call.prompt_tokens and status == 200 and call.run is None:
                served = self.models.get(call.model)
                if served is not None:
                    served.learn(len(call.body), call.prompt_tokens)
            if self.observe is not None:
                self.observe(call, outcome, status, self.driver.now)
        except Exception:  # who is told of one request must not end the control plane, and with it all the others
            _log.exception("request %d: its client could not be told how it ended", call.request)
        call.run = None  # which holds the call: no cycle is left to the collector
        if self._emptied is not None and not self.calls:
            self._emptied.set()

    def _answer(self, call: Call, outcome: Outcome) -> int:
        """Tell the client; the status it was told, 499 for one that went away."""
        answer = call.answer
        if call.run is not None:
            outcome = self._settled(call, call.run, outcome)
        if type(outcome) is Respond:
            if call.stream:
                if not call.begun:
                    answer.begin(call.reply_type)
                answer.finish(call.tail)
            else:
                answer.complete(200, call.reply, call.reply_type)
            return 200
        if type(outcome) is Reject:
            error = errors.rate_limited(max(outcome.retry_after_ns / 1e9, 0.001), f"Not admitted: {outcome.reason}.")
        elif type(outcome) is Fail:
            if call.verdict is not None and not call.begun:
                status, body = call.verdict
                answer.complete(status, body, call.reply_type)
                return status
            if self.driver.broken is not None:
                answer.fail(errors.internal())
                return 500
            error = call.error or (
                errors.overloaded(5.0, "The gateway is shutting down.")
                if self.draining
                else errors.upstream_failed(f"The request failed: {outcome.reason}.")
            )
        elif call.given_up is not None:
            error = call.given_up
        else:
            return 499
        answer.fail(error)
        return error.status

    def _settled(self, call: Call, run: PipelineRun, outcome: Outcome) -> Outcome:
        """What became of a pipeline is put where that of a single request is."""
        if type(outcome) is Respond:
            try:
                run.answer()
            except DataError as error:
                call.error = errors.upstream_failed(f"The pipeline's answer cannot be made: {error}")
                return Fail(call.request, str(error))
        elif type(outcome) is Fail:
            run.failed()
        return outcome

    def _in_service(self, model: str) -> bool:
        deployed = self.pipelines.get(model)
        if deployed is not None:
            return all(map(self._in_service, deployed.models.values()))
        return any(watch.state is State.HEALTHY and watch.engine.spec.model == model for watch in self.watches.values())

    def _sweep(self) -> None:
        """Once a second: what takes too long ends."""
        self._timer = asyncio.get_running_loop().call_later(1.0, self._sweep)
        now = self.driver.now
        waited = now - int(self.config.no_engine_s * 1e9)
        self._deserted = deserted = {
            model: self._deserted.get(model, now) for model in self.models if not self._in_service(model)
        }
        at_work = self._at_work() if deserted and self.pipelines else frozenset()
        for call in self.calls.values():
            if call.deadline_ns <= now:
                self._give_up(call, errors.upstream_timeout(f"No answer within {self.config.request_s:g} s."))
            elif not deserted:
                break  # in order of arrival, and all may take as long
            elif call.model not in deserted or call.arrived_ns >= waited:
                continue
            elif call.dispatched_ns < 0 or (
                call.run is not None and deserted[call.model] < waited and call.request not in at_work
            ):  # a pipeline between two stages
                self._give_up(call, errors.overloaded(5.0, f"No engine of {call.model} is in service."))

    def _at_work(self) -> frozenset[int]:
        """Requests that an engine or a function has a part of."""
        found = {request_of(task) for watch in self.watches.values() for task in watch.engine.flights}
        return frozenset(found.union(*(engine.at_work for engine in self._functions.values())))

    def _give_up(self, call: Call, error: errors.ApiError) -> None:
        """The request is cancelled, and its client told why."""
        call.given_up = error
        self.driver.cancel(call.request)

    # --- the end --------------------------------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> None:
        """Take no more requests; wait until the live ones have ended, at most so long."""
        self.draining = True
        if self.calls:
            self._emptied = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), grace_s)

    async def close(self, reason: str = "the gateway was closed") -> None:
        """Fail what is live, stop watching, close the connections."""
        self.draining = True
        self._timer.cancel()
        for watch in self.watches.values():
            await watch.close()
        await self.driver.close(reason)
