"""Pipelines: a Python function over typed values, traced once to a static graph of stages.

An op's body states the *work* from the sizes of its inputs, never from contents. Calling an op on symbols while tracing
adds a stage; a wrongly wired pipeline is a type error to mypy and a :class:`ConfigError` here. Everything that takes
time names the pool that does it.

    @op(pool="embed")
    def embed(text: Value[Text]) -> Work[Vector]:
        return Work(input_tokens=text.tokens)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar, cast

import msgspec

from sage_core.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

REQUEST_INPUT = -1
"""Index of the pipeline's input among the values of a run."""


class Text:
    """Tokens: a prompt or a completion."""


class Vector:
    """An embedding."""


class Docs:
    """Retrieved passages; ``tokens`` is their length in all."""


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


@dataclass(frozen=True, slots=True)
class Stage:
    """One op in one place of a pipeline. ``inputs``: stage indices, :data:`REQUEST_INPUT` for the request itself."""

    index: int
    op: Op[Any, Any]
    inputs: tuple[int, ...]
    constants: Mapping[str, Any]
    followers: tuple[int, ...] = ()

    def work(self, values: Mapping[int, int]) -> Work[Any]:
        """The work, given the tokens of each input."""
        work = self.op.body(*[Value(values[i]) for i in self.inputs], **self.constants)
        if not isinstance(work, Work) or work.input_tokens < 0 or (work.output_tokens_max or 0) < 0:
            raise ConfigError(f"op {self.op.name}: expected Work with token counts from 0, got {work!r}")
        return work


@dataclass(frozen=True)
class Pipeline:
    """A static graph in topological order; ``output`` is the stage whose result answers the request."""

    name: str
    stages: tuple[Stage, ...]
    output: int

    @cached_property
    def first(self) -> tuple[Stage, ...]:
        """Stages that need nothing but the request."""
        return tuple(stage for stage in self.stages if not _needs(stage))

    @cached_property
    def needs(self) -> tuple[int, ...]:
        """How many other stages each stage waits for."""
        return tuple(_needs(stage) for stage in self.stages)

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
            inputs = ", ".join(
                "request" if i == REQUEST_INPUT else f"{self.stages[i].op.name}#{i}" for i in stage.inputs
            )
            constants = "".join(f" {key}={value}" for key, value in stage.constants.items())
            mark = "  -> response" if stage.index == self.output else ""
            lines.append(f"  {stage.op.name}#{stage.index} on {stage.op.pool}({inputs}){constants}{mark}")
        return "\n".join(lines)


def op(*, pool: str) -> Callable[[Callable[P, Work[T]]], Op[P, T]]:
    """Declare an op by its work, done by the replicas of ``pool``."""

    def declare(body: Callable[P, Work[T]]) -> Op[P, T]:
        return Op(body.__name__, pool, body)

    return declare


@dataclass(slots=True)
class Trace:
    """A pipeline in the making."""

    stages: list[Stage] = field(default_factory=list)

    def add(self, op: Op[Any, Any], values: Sequence[Value[Any]], constants: Mapping[str, Any]) -> Value[Any]:
        """Append a stage; its symbolic result."""
        index = len(self.stages)
        self.stages.append(Stage(index, op, tuple(value.stage for value in values), dict(constants)))
        return Value(None, self, index)


def trace(name: str, body: Callable[[Value[Text]], Value[Any]]) -> Pipeline:
    """Run ``body`` once on a symbol and keep the graph of what it called."""
    tracing = Trace()
    result = body(Value(None, tracing))
    if not isinstance(result, Value) or result.stage == REQUEST_INPUT:
        raise ConfigError(f"pipeline {name}: the body must return the result of an op, got {result!r}")
    used = {result.stage}
    for stage in reversed(tracing.stages):
        if stage.index in used:
            used.update(stage.inputs)
    idle = [stage.op.name for stage in tracing.stages if stage.index not in used]
    if idle:
        raise ConfigError(f"pipeline {name}: nothing uses the result of {', '.join(idle)}")
    stages = tuple(
        Stage(
            stage.index,
            stage.op,
            stage.inputs,
            stage.constants,
            tuple(sorted({other.index for other in tracing.stages if stage.index in other.inputs})),
        )
        for stage in tracing.stages
    )
    return Pipeline(name, stages, result.stage)


def _needs(stage: Stage) -> int:
    return sum(1 for i in set(stage.inputs) if i != REQUEST_INPUT)


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
