"""Pipelines: a Python function over typed values, traced once to a static graph of stages.

An op's body states the *work* from the sizes of its inputs, never from contents. Calling an op on symbols while tracing
adds a stage; a wrongly wired pipeline is a type error to mypy and a :class:`ConfigError` here. Everything that takes
time names the pool that does it.

    @op(pool="embed")
    def embed(text: Value[Text]) -> Work[Vector]:
        return Work(input_tokens=text.tokens)

The graph is static, what a request does with it is not. A stage traced under :func:`when` runs only if the *outcome* of
another, the size of its result, is within bounds; otherwise it is skipped, and with it whatever needs it. A branch, a
loop of bounded length and a fan-out of bounded width are that and no more (:func:`repeat`, :func:`each`). Ops without a
pool take no time and are no task: :func:`join` and :func:`latest` put together what was not skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Generic, NamedTuple, NoReturn, ParamSpec, TypeVar, cast

import msgspec

from sage_core.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

REQUEST_INPUT = -1
"""Index of the pipeline's input among the values of a run."""

NO_POOL: Final = ""
"""Pool of ops that take no time."""

OUTCOME_MAX: Final = 1 << 40
STAGES_MAX: Final = 1000
"""A plan with more is a slip of the finger in a loop: each stage may become a task."""


class UnusedResult(ConfigError):
    """Stages, by name, whose result nothing uses."""

    def __init__(self, pipeline: str, stages: Sequence[str]) -> None:
        names = ", ".join(name.partition("#")[0] for name in stages)
        super().__init__(f"pipeline {pipeline}: nothing uses the result of {names}")
        self.stages = tuple(stages)


class Text:
    """Tokens: a prompt or a completion."""


class Vector:
    """An embedding."""


class Docs:
    """Retrieved passages; ``tokens`` is their length in all."""


class Outcome:
    """A decision: its "tokens" are a number from 0, which :func:`when` looks at."""


class Value(Generic[T]):
    """A size while running; a symbol while tracing, when asking for its size is an error."""

    __slots__ = ("_tokens", "_trace", "stage")

    def __init__(self, tokens: int | None, trace: Trace | None = None, stage: int = REQUEST_INPUT) -> None:
        self._tokens = tokens
        self._trace = trace
        self.stage = stage

    @property
    def tokens(self) -> int:
        """Length in tokens."""
        if self._tokens is None:
            raise ConfigError("a size is known only while a pipeline runs: use .tokens inside an op's body")
        return self._tokens

    def __bool__(self) -> NoReturn:
        raise ConfigError("a pipeline is a static graph: it cannot branch on a value while it is traced")


class Work(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """What a stage costs. ``output_tokens_max`` None means the request's own cap; 0 means it generates nothing."""

    input_tokens: int
    output_tokens_max: int | None = 0


@dataclass(frozen=True, slots=True)
class Op(Generic[P, T]):
    """A node type: a body from sizes to work, done by ``pool``."""

    name: str
    pool: str
    body: Callable[P, Work[T]]
    joins: bool = False
    """Runs if any of its inputs was not skipped, and sees those only; others need all of them."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Value[T]:
        """Add a stage to the pipeline being traced."""
        values = [value for value in args if isinstance(value, Value)]
        if len(values) != len(args) or any(isinstance(value, Value) for value in kwargs.values()):
            raise ConfigError(f"op {self.name}: values are positional, constants are keywords")
        traces = {id(value._trace): value._trace for value in values}
        trace = next(iter(traces.values()), None)
        if len(traces) != 1 or trace is None:
            raise ConfigError(f"op {self.name}: called outside trace(), or on values of different pipelines")
        return trace.add(cast("Op[Any, Any]", self), values, kwargs)


class Guard(NamedTuple):
    """The stage that has it runs only if the outcome of stage ``on`` is from ``least`` to ``most``, both included."""

    on: int
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Stage:
    """One op in one place of a pipeline. ``inputs``: stage indices, :data:`REQUEST_INPUT` for the request itself.

    name: unique in its pipeline. typical: size that the result is expected to have, by which due times of the stages
    before are predicted; None: what the op may generate at most, else the size of its work.
    """

    index: int
    op: Op[Any, Any]
    inputs: tuple[int, ...]
    constants: Mapping[str, Any]
    followers: tuple[int, ...] = ()
    guards: tuple[Guard, ...] = ()
    name: str = ""
    typical: int | None = None

    @property
    def free(self) -> bool:
        """It takes no time and is never a task."""
        return self.op.pool == NO_POOL

    @property
    def waits_for(self) -> tuple[int, ...]:
        """Other stages that must be settled before this one can be."""
        needed = {*self.inputs, *(guard.on for guard in self.guards)} - {REQUEST_INPUT}
        return tuple(sorted(needed))

    def work(self, values: Mapping[int, int]) -> Work[Any]:
        """The work, given the tokens of each input; of a join, of those that are there."""
        inputs: list[Value[Any]] = [Value(values[i]) for i in self.inputs if not self.op.joins or i in values]
        work = self.op.body(*inputs, **self.constants)
        if not isinstance(work, Work) or work.input_tokens < 0 or (work.output_tokens_max or 0) < 0:
            raise ConfigError(f"op {self.op.name}: expected Work with token counts from 0, got {work!r}")
        return work

    def runs(self, values: Mapping[int, int]) -> bool:
        """Whether it does, once all that it waits for is settled; ``values`` has what was not skipped."""
        for on, least, most in self.guards:
            if on not in values or not least <= values[on] <= most:
                return False
        there = [i in values for i in self.inputs]
        return any(there) if self.op.joins else all(there)


@dataclass(frozen=True)
class Pipeline:
    """A static graph in topological order; ``output`` is the stage whose result answers the request.

    critical_path: stages are due as early as what comes after them demands; off (an ablation), when the request is.
    """

    name: str
    stages: tuple[Stage, ...]
    output: int
    critical_path: bool = True

    @cached_property
    def first(self) -> tuple[Stage, ...]:
        """Stages that need nothing but the request."""
        return tuple(stage for stage in self.stages if not stage.waits_for)

    @cached_property
    def needs(self) -> tuple[int, ...]:
        """How many other stages each stage waits for."""
        return tuple(len(stage.waits_for) for stage in self.stages)

    @cached_property
    def answering(self) -> frozenset[int]:
        """Stages whose own tokens answer the request: the output, or what a free output passes on."""
        found, looking = set(), [self.output]
        while looking:
            stage = self.stages[looking.pop()]
            if stage.free:
                looking += [i for i in stage.inputs if i != REQUEST_INPUT]
            else:
                found.add(stage.index)
        return frozenset(found)

    @cached_property
    def single(self) -> bool | None:
        """Whether the pipeline is one of the single requests below, which take their input as it is: True if it
        generates up to the client's cap, False if it generates nothing, None for any other pipeline."""
        return _SINGLE.get(id(self.stages[0].op.body)) if len(self.stages) == 1 else None

    def on(self, pool: str) -> Pipeline:
        """The same single stage, done by ``pool``."""
        stage = self.stages[0]
        return Pipeline(f"{self.name}@{pool}", (replace(stage, op=replace(stage.op, pool=pool)),), self.output)

    def plan(self) -> str:
        """The execution plan as text: one line a stage, deterministic."""
        lines = [f"pipeline {self.name}"]
        for stage in self.stages:
            inputs = ", ".join("request" if i == REQUEST_INPUT else self.called(i) for i in stage.inputs)
            constants = "".join(f" {key}={value}" for key, value in stage.constants.items())
            guards = "".join(f" when {self.called(on)} {bounds(low, high)}" for on, low, high in stage.guards)
            where = "" if stage.free else f" on {stage.op.pool}"
            mark = "  -> response" if stage.index == self.output else ""
            lines.append(f"  {self.called(stage.index)}{where}({inputs}){constants}{guards}{mark}")
        return "\n".join(lines)

    def called(self, index: int) -> str:
        """How the plan calls a stage."""
        return self.stages[index].name


def bounds(least: int, most: int) -> str:
    """A guard's outcomes as text."""
    if least == most:
        return f"= {least}"
    return f">= {least}" if most >= OUTCOME_MAX else f"{least}..{most}"


def op(*, pool: str, joins: bool = False) -> Callable[[Callable[P, Work[T]]], Op[P, T]]:
    """Declare an op by its work, done by the replicas of ``pool``. joins: see :class:`Op`."""

    def declare(body: Callable[P, Work[T]]) -> Op[P, T]:
        return Op(body.__name__, pool, body, joins)

    return declare


@dataclass(slots=True)
class Trace:
    """A pipeline in the making."""

    name: str
    stages: list[Stage] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    """Of :func:`when`, outermost first."""

    spare: set[int] = field(default_factory=set)
    """Stages that are left out if nothing uses them."""

    kept: list[int] = field(default_factory=list)
    """Once traced: the stages that were not."""

    def add(self, op: Op[Any, Any], values: Sequence[Value[Any]], constants: Mapping[str, Any]) -> Value[Any]:
        """Append a stage; its symbolic result."""
        index = len(self.stages)
        if index == STAGES_MAX:
            raise ConfigError(f"pipeline {self.name}: more than {STAGES_MAX} stages; a loop repeats too often?")
        inputs = tuple(value.stage for value in values)
        if op.pool == NO_POOL and all(i == REQUEST_INPUT for i in inputs):
            raise ConfigError(f"op {op.name}: takes no time, so it needs the result of an op that does")
        self.stages.append(Stage(index, op, inputs, dict(constants), (), tuple(self.guards), f"{op.name}#{index}"))
        return Value(None, self, index)


def trace(name: str, body: Callable[[Value[Text]], Value[Any]]) -> Pipeline:
    """Run ``body`` once on a symbol and keep the graph of what it called."""
    tracing = Trace(name)
    result = body(Value(None, tracing))
    if not isinstance(result, Value) or result.stage == REQUEST_INPUT:
        raise ConfigError(f"pipeline {name}: the body must return the result of an op, got {result!r}")
    return traced(tracing, result.stage)


def traced(tracing: Trace, output: int) -> Pipeline:
    """The pipeline of what was traced; ``output`` is the stage that answers."""
    used = {output}
    for stage in reversed(tracing.stages):
        if stage.index in used:
            used.update(stage.waits_for)
    idle = [stage for stage in tracing.stages if stage.index not in used]
    wasted = [stage.name for stage in idle if stage.index not in tracing.spare]
    if wasted:
        raise UnusedResult(tracing.name, wasted)
    tracing.kept = sorted(used)
    stages = linked([tracing.stages[i] for i in tracing.kept])
    return Pipeline(tracing.name, stages, tracing.kept.index(output))


def linked(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """``stages``, in order, numbered anew, each with its followers."""
    number = {stage.index: new for new, stage in enumerate(stages)} | {REQUEST_INPUT: REQUEST_INPUT}
    followers: list[list[int]] = [[] for _ in stages]
    for stage in stages:
        for i in stage.waits_for:
            followers[number[i]].append(number[stage.index])
    return tuple(
        replace(
            stage,
            index=new,
            inputs=tuple(number[i] for i in stage.inputs),
            guards=tuple(guard._replace(on=number[guard.on]) for guard in stage.guards),
            followers=tuple(followers[new]),
        )
        for new, stage in enumerate(stages)
    )


# --- what depends on outcomes ------------------------------------------------------------------------------------------


@contextmanager
def when(decision: Value[Any], least: int, most: int | None = None) -> Iterator[None]:
    """Stages traced in this block run only if the outcome of ``decision`` is from ``least`` to ``most`` (None: just
    ``least``), both included."""
    tracing = decision._trace
    if tracing is None or decision.stage == REQUEST_INPUT:
        raise ConfigError("when: expected the result of an op of the pipeline being traced")
    most = least if most is None else most
    if not 0 <= least <= most:
        raise ConfigError(f"when: expected outcomes from 0, the least first, got {least} and {most}")
    tracing.guards.append(Guard(decision.stage, least, most))
    try:
        yield
    finally:
        tracing.guards.pop()


@op(pool=NO_POOL, joins=True)
def join(*values: Value[Any]) -> Work[Docs]:
    """All of those that were not skipped, together."""
    return Work(sum(value.tokens for value in values))


@op(pool=NO_POOL, joins=True)
def latest(*values: Value[T]) -> Work[T]:
    """The last of those that were not skipped: what a branch or a loop came to."""
    return Work(values[-1].tokens)


def repeat(state: Value[T], body: Callable[[Value[T]], tuple[Value[T], Value[Outcome]]], *, times: int) -> Value[T]:
    """``body`` on ``state``, and again on what it gave while its decision is 1 or more: ``times`` times at most."""
    if times < 1:
        raise ConfigError(f"repeat: expected times from 1, got {times}")
    tracing = cast(Trace, state._trace)
    outer = len(tracing.guards)
    states = []
    for _ in range(times):
        begun = len(tracing.stages)
        state, again = body(state)
        states.append(state)
        # Each turn is within the one before it: a turn that was not taken ends the loop.
        tracing.guards.append(Guard(again.stage, 1, OUTCOME_MAX))
    del tracing.guards[outer:]
    tracing.spare.update(range(begun, len(tracing.stages)))  # nobody asks whether to go on after the last turn
    return latest(*states)


def each(count: Value[Any], body: Callable[[int], Value[Any]], *, most: int) -> Value[Docs]:
    """``body(i)`` for each i below the outcome of ``count``, all at once, ``most`` at most; their results together."""
    if most < 1:
        raise ConfigError(f"each: expected most from 1, got {most}")
    results = []
    for i in range(most):
        with when(count, i + 1, OUTCOME_MAX):
            results.append(body(i))
    return join(*results)


# --- the pipelines of single requests --------------------------------------------------------------------------------


@op(pool="llm")
def chat(prompt: Value[Text]) -> Work[Text]:
    """Chat completion up to the client's cap."""
    return Work(prompt.tokens, None)


@op(pool="llm")
def generate(prompt: Value[Text]) -> Work[Text]:
    """Plain completion up to the client's cap."""
    return Work(prompt.tokens, None)


@op(pool="embed")
def embed(text: Value[Text]) -> Work[Vector]:
    """One embedding."""
    return Work(text.tokens)


_SINGLE = {id(chat.body): True, id(generate.body): True, id(embed.body): False}


def single_request_pipelines() -> dict[str, Pipeline]:
    """``chat``, ``generate`` and ``embed``: one stage each."""
    return {
        "chat": trace("chat", lambda text: chat(text)),
        "generate": trace("generate", lambda text: generate(text)),
        "embed": trace("embed", lambda text: embed(text)),
    }


def pipeline_of(pipelines: dict[str, Pipeline], name: str) -> Pipeline | None:
    """The pipeline called ``name``; None where it is unknown.

    ``chat@MODEL`` is the single-request pipeline ``chat`` on the pool MODEL, made when first asked for: a live system
    learns which models there are while it runs.
    """
    found = pipelines.get(name)
    base, _, pool = name.partition("@")
    if found is None and pool and base in pipelines and pipelines[base].single is not None:
        found = pipelines[name] = pipelines[base].on(pool)
    return found
