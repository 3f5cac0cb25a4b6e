"""Pipelines as data: what a YAML file declares, checked and traced to the same graph as one written in Python.

A declaration says of each stage both what the plane needs (pool, work, guards) and what a live system needs to do it
(prompt template, index, function); a simulated one reads neither prompt nor function, and draws the sizes of results
from what is declared of them. ``docs/pipelines.md`` lists every key.

Errors carry the path of the key, by which a reader of files finds the line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Final, NamedTuple, TypeAlias

import msgspec

from sage_core.errors import ConfigError
from sage_core.fusion import fused
from sage_core.pipeline import (
    NO_POOL,
    OUTCOME_MAX,
    REQUEST_INPUT,
    Guard,
    Op,
    Pipeline,
    Trace,
    UnusedResult,
    Value,
    Work,
    join,
    latest,
    op,
    traced,
    when,
)

REQUEST: Final = "request"
ITEM: Final = "item"
STATE: Final = "state"

TOKENS_PER_WORD: Final = 4 / 3
"""Of the fixed words of a prompt template, where ``prompt_tokens`` is not given. English with common tokenizers."""

_SIZES: Final = ("size", "output_tokens")
_SIZE_EXPECTED: Final = "expected a number of tokens, or one of fixed, uniform, lognormal"
_ONLY_IN: Final = {ITEM: "; there is one within each only", STATE: "; there is one within repeat only"}

_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")
_NAME: Final = re.compile(r"[A-Za-z_]\w*")

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
Tokens: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]
Chance: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
Timeout: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class DeclarationError(ConfigError):
    """What is wrong, and ``path``: keys from the top of the file to the place."""

    def __init__(self, path: Sequence[str], message: str) -> None:
        super().__init__(f"{'.'.join(path)}: {message}" if path else message)
        self.path = tuple(path)


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Uniform(_Strict, frozen=True):
    """Whole numbers from ``low`` to ``high``, equally likely."""

    low: Tokens
    high: Tokens


class Lognormal(_Strict, frozen=True):
    """Median and sigma of the logarithm, cut to ``low`` and ``high``."""

    median: Annotated[float, msgspec.Meta(gt=0)]
    sigma: Annotated[float, msgspec.Meta(ge=0, le=10)]
    low: Count = 1
    high: Count = 1 << 20


class Size(_Strict, frozen=True):
    """How large a result is, tokens: one of a fixed number, a range, or a median with a spread."""

    fixed: Tokens | None = None
    uniform: Uniform | None = None
    lognormal: Lognormal | None = None

    @property
    def typical(self) -> int:
        """The middle one."""
        if self.uniform is not None:
            return (self.uniform.low + self.uniform.high) // 2
        if (log := self.lognormal) is not None:
            return min(max(round(log.median), log.low), log.high)
        return self.fixed or 0


class StageDeclaration(_Strict, frozen=True, kw_only=True, tag_field="op"):
    """What all kinds of stages share. when: outcomes of branches at which it runs, one or [least, most]."""

    when: dict[str, int | list[int]] = {}
    pool: str | None = None

    POOL: ClassVar[str] = "cpu"
    GIVES: ClassVar[str] = "text"

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """(key, name of the value, what it may be) of each input."""
        return []


def _names(of: str | list[str]) -> list[str]:
    return [of] if isinstance(of, str) else of


_TEXTS: Final = ("text", "docs")
_ANY: Final = ("text", "docs", "vector", "outcome")


class Embed(StageDeclaration, frozen=True, kw_only=True, tag="embed"):
    """The vector of a text."""

    of: str = REQUEST
    POOL = "embed"
    GIVES = "vector"

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("of", self.of, _TEXTS)]


class Retrieve(StageDeclaration, frozen=True, kw_only=True, tag="retrieve"):
    """The ``k`` passages of ``index`` nearest to a vector. size: tokens of all of them together."""

    query: str
    index: str = "default"
    k: Count = 4
    size: Size
    POOL = "retrieve"
    GIVES = "docs"

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("query", self.query, ("vector",))]


class Rerank(StageDeclaration, frozen=True, kw_only=True, tag="rerank"):
    """The ``keep`` passages that fit the words of ``query`` best, best first. size: tokens of those together."""

    query: str = REQUEST
    passages: str
    keep: Count = 3
    size: Size
    POOL = "retrieve"
    GIVES = "docs"

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("query", self.query, ("text",)), ("passages", self.passages, ("docs",))]


class _Generates(StageDeclaration, frozen=True, kw_only=True):
    """prompt: a template; ``{name}`` is the request or the result of a stage. output_tokens: how many a simulated engine
    makes; null: as the load says. output_tokens_max: null: the client's cap."""

    prompt: str
    system: str | None = None
    prompt_tokens: Count | None = None
    output_tokens: Size | None = None
    output_tokens_max: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    POOL = "llm"

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("prompt", name, _TEXTS) for name in dict.fromkeys(_PLACEHOLDER.findall(self.prompt))]

    @property
    def fixed_tokens(self) -> int:
        """Tokens of what stands in every prompt."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        words = len(_PLACEHOLDER.sub(" ", self.prompt).split()) + len((self.system or "").split())
        return max(1, round(words * TOKENS_PER_WORD))


class Chat(_Generates, frozen=True, kw_only=True, tag="chat"):
    """An answer of a chat model; ``system`` is its system message."""


class Generate(_Generates, frozen=True, kw_only=True, tag="generate"):
    """A completion of the prompt as it is."""


class _Calls(StageDeclaration, frozen=True, kw_only=True):
    """A Python function, ``module:name``, of the values ``of``. timeout_s: after which the stage has failed."""

    of: str | list[str] = REQUEST
    function: str | None = None
    timeout_s: Timeout = 30.0

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("of", name, _ANY) for name in _names(self.of)]


class Tool(_Calls, frozen=True, kw_only=True, tag="tool"):
    """A tool: a function that may take its time, on workers of its own. size: of what it returns, null: as its input."""

    function: str
    size: Size | None = None
    POOL = "tool"


class Map(_Calls, frozen=True, kw_only=True, tag="map"):
    """A cheap function of values. size: of what it returns, null: as its input."""

    size: Size | None = None
    function: str


class Filter(_Calls, frozen=True, kw_only=True, tag="filter"):
    """Those passages for which the function is true. size: of what is left, null: all of it."""

    of: str
    size: Size | None = None
    function: str
    GIVES = "docs"

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("of", self.of, ("docs",))]


class Branch(_Calls, frozen=True, kw_only=True, tag="branch"):
    """A decision: a number from 0, by a function, or whether a text ``contains`` words (1) or not (0). chances: of each
    outcome in simulation."""

    contains: str | None = None
    chances: Annotated[list[Chance], msgspec.Meta(min_length=1, max_length=1000)]
    GIVES = "outcome"


class Join(StageDeclaration, frozen=True, kw_only=True, tag="join"):
    """Those of several results that are there, together."""

    of: list[str]
    GIVES = "docs"

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("of", name, _TEXTS) for name in self.of]


class Latest(StageDeclaration, frozen=True, kw_only=True, tag="latest"):
    """The last of several results that is there: what a branch came to."""

    of: list[str]

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("of", name, _TEXTS) for name in self.of]


class Repeat(StageDeclaration, frozen=True, kw_only=True, tag="repeat"):
    """``stages`` on ``{state}``, which is ``of`` at first and ``gives`` after each turn, while the branch ``again`` says 1 or
    more, ``times`` times at most."""

    of: str = REQUEST
    times: Annotated[int, msgspec.Meta(ge=1, le=100)]
    stages: dict[str, Any]
    gives: str
    again: str

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("of", self.of, _TEXTS)]


class Each(StageDeclaration, frozen=True, kw_only=True, tag="each"):
    """``stages`` on each ``{item}`` of ``of``, as many as the branch ``count`` says and ``most`` at most, all at once; what
    ``gives`` names, together."""

    of: str
    count: str
    most: Annotated[int, msgspec.Meta(ge=1, le=200)]
    stages: dict[str, Any]
    gives: str
    GIVES = "docs"

    def takes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("of", self.of, _TEXTS), ("count", self.count, ("outcome",))]


class Item(StageDeclaration, frozen=True, kw_only=True, tag="item"):
    """The ``number``-th item of a value; made by :class:`Each`, never declared."""

    of: str
    number: int


AnyStage: TypeAlias = (
    Embed | Retrieve | Rerank | Chat | Generate | Tool | Map | Filter | Branch | Join | Latest | Repeat | Each
)
OPS: Final[Mapping[str, type[StageDeclaration]]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (Embed, Retrieve, Rerank, Chat, Generate, Tool, Map, Filter, Branch, Join, Latest, Repeat, Each)
}


class PipelineDeclaration(_Strict, frozen=True):
    """A file: its name, its stages, and which of them answers. pools: other names for pools, such as those of served
    models. deadlines: stages are due by the predicted critical path
    after them, or when the request is. fuse: runs of cheap stages of one pool become one task."""

    name: str
    stages: dict[str, Any]
    output: str
    description: str = ""
    pools: dict[str, str] = {}
    deadlines: str = "critical_path"
    fuse: bool = True


class Placed(NamedTuple):
    """A declaration in one place of the graph. inputs: by the name that it uses, the name of the stage that has made it,
    or ``request``."""

    name: str
    declaration: StageDeclaration
    inputs: Mapping[str, str]


class Declared(NamedTuple):
    """A pipeline and, stage by stage, what was declared of it. A fused stage stands for several, in order."""

    pipeline: Pipeline
    stages: tuple[tuple[Placed, ...], ...]
    description: str


def declared(plain: Any) -> Declared:
    """The pipeline that ``plain`` (of a YAML file) declares. Raises DeclarationError."""
    top = _converted(plain, PipelineDeclaration, ())
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", top.name) or "@" in top.name:
        raise DeclarationError(("name",), f"expected letters, digits and . _ + -, got {top.name!r}")
    if top.deadlines not in ("critical_path", "request"):
        raise DeclarationError(("deadlines",), f"expected critical_path or request, got {top.deadlines!r}")
    known = sorted({kind.POOL for kind in OPS.values()})
    for pool, other in top.pools.items():
        if pool not in known:
            raise DeclarationError(
                ("pools", pool), f"no op has this pool{_near(pool, known)}; those of ops are {', '.join(known)}"
            )
        if not other:
            raise DeclarationError(("pools", pool), "expected the name of a pool, got nothing")
    if not top.stages:
        raise DeclarationError(("stages",), "expected at least one stage")
    tracer = _Tracer(top.name, top.pools)
    scope = tracer.block(top.stages, ("stages",), {REQUEST: (Value(None, tracer.trace), "text")})
    if top.output not in top.stages:
        raise DeclarationError(("output",), f"no stage is called {top.output!r}{_near(top.output, top.stages)}")
    try:
        pipeline = traced(tracer.trace, scope[top.output][0].stage)
    except UnusedResult as error:
        at = tracer.paths[error.stages[-1]]  # those before it may have been meant for it
        raise DeclarationError(at, "nothing uses its result; name it in another stage, or leave it out") from error
    pipeline = replace(pipeline, critical_path=top.deadlines == "critical_path")
    placed = [tracer.placed[old] for old in tracer.trace.kept]
    groups = [[number] for number in range(len(placed))]
    if top.fuse:
        pipeline, groups = fused(pipeline, [isinstance(each.declaration, Map | Filter | Branch) for each in placed])
    return Declared(pipeline, tuple(tuple(placed[number] for number in group) for group in groups), top.description)


Scope: TypeAlias = dict[str, tuple[Value[Any], str]]
"""By name: a value, and whether it is a text, passages, a vector or an outcome."""


class _Tracer:
    """Adds the stages of a declaration to a trace."""

    def __init__(self, name: str, pools: Mapping[str, str]) -> None:
        self.trace = Trace(name)
        self.placed: list[Placed] = []
        self.paths: dict[str, tuple[str, ...]] = {}
        """Where each stage is declared."""
        self._pools = pools

    def block(self, stages: Mapping[str, Any], path: tuple[str, ...], scope: Scope, prefix: str = "") -> Scope:
        """The scope within a block once all of its stages are added, in whatever order they stand."""
        scope = dict(scope)
        left: dict[str, StageDeclaration] = {}
        for name, plain in stages.items():
            at = (*path, str(name))
            if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (REQUEST, ITEM, STATE):
                raise DeclarationError(
                    at, f"expected a name (letters, digits, _) that is not {REQUEST}, {ITEM} or {STATE}, got {name!r}"
                )
            if name in scope:
                raise DeclarationError(at, "a stage outside of this block has that name; give it another")
            left[name] = _stage(plain, at)
        while left:
            ready = [name for name, each in left.items() if all(one in scope for one in _needs(each))]
            if not ready:
                self._stuck(left, path, scope)
            for name in ready:
                scope[name] = self._add(name, left.pop(name), (*path, name), scope, prefix)
        return scope

    def _stuck(self, left: Mapping[str, StageDeclaration], path: tuple[str, ...], scope: Scope) -> None:
        for name, each in left.items():
            for wanted in _needs(each):
                if wanted not in scope and wanted not in left:
                    key = next((key for key, one, _ in each.takes() if one == wanted), "when")
                    at = (*path, name) if isinstance(each, Repeat | Each) else (*path, name, key)
                    where = _ONLY_IN.get(wanted) or _near(wanted, [n for n in (*scope, *left) if n != name])
                    raise DeclarationError(at, f"no stage is called {wanted!r}{where}")
        circle = _circle(left)
        raise DeclarationError(
            (*path, circle[0]), f"stages wait for one another in a circle: {' -> '.join(circle)}; break it"
        )

    def _add(
        self, name: str, each: StageDeclaration, path: tuple[str, ...], scope: Scope, prefix: str
    ) -> tuple[Value[Any], str]:
        values = []
        for key, wanted, kinds in each.takes():
            value, kind = scope[wanted]
            if kind not in kinds:
                raise DeclarationError(
                    (*path, key), f"expected {' or '.join(kinds)}, but {wanted!r} is {_article(kind)} {kind}"
                )
            values.append(value)
        with ExitStack() as guards:
            for decision, bounds in each.when.items():
                value, kind = scope[decision]
                if kind != "outcome":
                    raise DeclarationError((*path, "when"), f"{decision!r} is {_article(kind)} {kind}, no branch")
                least, most = bounds if isinstance(bounds, list) and len(bounds) == 2 else (bounds, bounds)
                if not isinstance(least, int) or not isinstance(most, int):
                    raise DeclarationError((*path, "when"), f"expected an outcome or [least, most], got {bounds}")
                try:
                    guards.enter_context(when(value, least, most))
                except ConfigError as error:
                    raise DeclarationError((*path, "when"), str(error).removeprefix("when: ")) from error
            if isinstance(each, Repeat):
                return self._repeat(name, each, path, scope, prefix), "text"
            if isinstance(each, Each):
                return self._each(name, each, path, scope, prefix), "docs"
            names = [wanted for _, wanted, _ in each.takes()]
            return self._place(prefix + name, each, dict(zip(names, values, strict=True)), path), each.GIVES

    def _place(
        self,
        name: str,
        each: StageDeclaration,
        values: Mapping[str, Value[Any]],
        path: tuple[str, ...],
        **constants: int,
    ) -> Value[Any]:
        """Add one stage. values: its inputs, by the name that it uses. path: of what declares it."""
        if name in self.paths:
            other = ".".join(self.paths[name])
            raise DeclarationError(path, f"a stage called {name!r} is made of {other} too; give one another name")
        try:
            result = self._op(each)(*values.values(), **constants)
        except ConfigError as error:
            raise DeclarationError(path, str(error)) from error
        self.paths[name] = path
        self.trace.stages[result.stage] = replace(self.trace.stages[result.stage], name=name, typical=typical(each))
        self.placed.append(Placed(name, each, {wanted: self._maker(value) for wanted, value in values.items()}))
        return result

    def _op(self, each: StageDeclaration) -> Op[Any, Any]:
        if isinstance(each, Join):
            return join
        if isinstance(each, Latest):
            return latest
        if isinstance(each, Item):
            return _part
        pool = each.pool or self._pools.get(each.POOL, each.POOL)
        return Op(str(type(each).__struct_config__.tag), pool, _work_of(each))

    def _repeat(self, name: str, each: Repeat, path: tuple[str, ...], scope: Scope, prefix: str) -> Value[Any]:
        state, kind = scope[each.of]
        states: list[Value[Any]] = []
        outer = len(self.trace.guards)
        for turn in range(each.times):
            begun = len(self.trace.stages)
            inner = self.block(
                each.stages, (*path, "stages"), {**scope, STATE: (state, kind)}, f"{prefix}{name}{turn}_"
            )
            state, kind = _given(inner, each.stages, each.gives, (*path, "gives"), _TEXTS)
            again, _ = _given(inner, each.stages, each.again, (*path, "again"), ("outcome",))
            states.append(state)
            self.trace.guards.append(Guard(again.stage, 1, OUTCOME_MAX))
        del self.trace.guards[outer:]
        # Nobody asks whether to go on after the last turn.
        self.trace.spare.update(range(begun, len(self.trace.stages)))
        turns = {f"turn{turn}": value for turn, value in enumerate(states)}
        return self._place(prefix + name, Latest(of=list(turns)), turns, path)

    def _each(self, name: str, each: Each, path: tuple[str, ...], scope: Scope, prefix: str) -> Value[Any]:
        whole, count = scope[each.of][0], scope[each.count][0]
        results: list[Value[Any]] = []
        for number in range(each.most):
            with when(count, number + 1, OUTCOME_MAX):
                inside = f"{prefix}{name}{number}_"
                item = Item(of=each.of, number=number)
                part = self._place(inside + ITEM, item, {each.of: whole, each.count: count}, path, most=each.most)
                self.trace.spare.add(part.stage)  # several answers to the same need no parts
                inner = self.block(each.stages, (*path, "stages"), {**scope, ITEM: (part, "text")}, inside)
                results.append(_given(inner, each.stages, each.gives, (*path, "gives"), _TEXTS)[0])
        items = {f"item{number}": value for number, value in enumerate(results)}
        return self._place(prefix + name, Join(of=list(items)), items, path)

    def _maker(self, value: Value[Any]) -> str:
        return REQUEST if value.stage == REQUEST_INPUT else self.trace.stages[value.stage].name


@op(pool=NO_POOL)
def _part(whole: Value[Any], count: Value[Any], *, most: int) -> Work[Any]:
    """One of ``count`` about equal parts, of which there are ``most`` at most."""
    return Work(whole.tokens // max(min(count.tokens, most), 1))


def typical(each: StageDeclaration) -> int | None:
    """Size that the result is expected to have; None: as its work says."""
    if isinstance(each, Branch):
        return max(range(len(each.chances)), key=each.chances.__getitem__)
    if isinstance(each, _Generates):
        return None if each.output_tokens is None else each.output_tokens.typical
    size = getattr(each, "size", None)
    return None if size is None else int(size.typical)


def _work_of(each: StageDeclaration) -> Callable[..., Work[Any]]:
    if isinstance(each, _Generates):
        fixed, most = each.fixed_tokens, each.output_tokens_max
        return lambda *values: Work(fixed + sum(value.tokens for value in values), most)
    if isinstance(each, Retrieve):
        k = each.k
        return lambda query: Work(k)
    return lambda *values: Work(sum(value.tokens for value in values))


def _stage(plain: Any, path: tuple[str, ...]) -> StageDeclaration:
    if not isinstance(plain, dict) or "op" not in plain:
        raise DeclarationError(path, f"expected a stage with op: one of {', '.join(OPS)}")
    kind = OPS.get(plain["op"]) if isinstance(plain["op"], str) else None
    if kind is None:
        raise DeclarationError(
            (*path, "op"), f"unknown op {plain['op']!r}{_near(str(plain['op']), OPS)}; expected one of {', '.join(OPS)}"
        )
    sizes = {key: {"fixed": plain[key]} for key in _SIZES if type(plain.get(key)) is int}
    for key in _SIZES:
        if key in kind.__struct_fields__ and not isinstance(plain.get(key), int | dict | None):
            raise DeclarationError((*path, key), f"{_SIZE_EXPECTED}, got {plain[key]!r}")
    made: StageDeclaration = _converted({**plain, **sizes}, kind, path)
    for key in _SIZES:
        _check_size(getattr(made, key, None), (*path, key))
    if isinstance(made, Branch):
        if not sum(made.chances) > 0:
            raise DeclarationError((*path, "chances"), "expected at least one chance above 0")
        if made.function is not None and made.contains is not None:
            raise DeclarationError(path, "function and contains both decide; keep one")
    if isinstance(made, _Generates) and not made.takes():
        raise DeclarationError((*path, "prompt"), f"expected {{{REQUEST}}}, or a stage in braces, in it")
    if not made.takes():
        raise DeclarationError((*path, "of"), "expected at least one stage")
    return made


def _check_size(size: Size | None, path: tuple[str, ...]) -> None:
    if size is None:
        return
    if sum(each is not None for each in (size.fixed, size.uniform, size.lognormal)) != 1:
        raise DeclarationError(path, _SIZE_EXPECTED)
    spread = size.uniform or size.lognormal
    if spread is not None and spread.low > spread.high:
        raise DeclarationError(path, f"expected low up to high, got {spread.low} and {spread.high}")


def _converted(plain: Any, kind: Any, path: tuple[str, ...]) -> Any:
    if not isinstance(plain, dict):
        raise DeclarationError(path, f"expected keys and values, got {type(plain).__name__}")
    fields = [*kind.__struct_fields__, *(["op"] if path else [])]
    for key in plain:
        if key not in fields:
            raise DeclarationError(
                (*path, str(key)), f"unknown key {key!r}{_near(str(key), fields)}; known: {', '.join(fields)}"
            )
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `")
        if missing := re.match(r"Object missing required field `(.+)`", text):
            text = f"key {missing[1]!r} is missing"
        if where.startswith("key"):
            text = f"{text} as a key; write it in quotes"
        text = text.replace("`object`", "keys and values").replace("`array`", "a list").replace("`null`", "nothing")
        inside = re.findall(r"\w+", where.rpartition("$")[2])
        raise DeclarationError((*path, *inside), text[0].lower() + text[1:]) from error


def _needs(each: StageDeclaration) -> Iterator[str]:
    """Names that must be in scope; of a block, those that its stages take from outside too."""
    for _, name, _ in each.takes():
        yield name
    yield from each.when
    if isinstance(each, Repeat | Each):
        for plain in each.stages.values():
            if not isinstance(plain, dict):
                continue  # told when the block is added
            kind = OPS.get(str(plain.get("op")))
            if kind is not None:
                try:
                    inner = _stage(plain, ("stages",))
                except DeclarationError:
                    continue
                yield from (n for n in _needs(inner) if n not in each.stages and n not in (ITEM, STATE))


def _given(
    scope: Scope, stages: Mapping[str, Any], name: str, path: tuple[str, ...], kinds: Sequence[str]
) -> tuple[Value[Any], str]:
    """What a block gives: the result of one of its own ``stages``."""
    if name not in stages:
        raise DeclarationError(path, f"no stage of this block is called {name!r}{_near(name, stages)}")
    value, kind = scope[name]
    if kind not in kinds:
        raise DeclarationError(path, f"expected {' or '.join(kinds)}, but {name!r} is {_article(kind)} {kind}")
    return value, kind


def _circle(left: Mapping[str, StageDeclaration]) -> list[str]:
    """Names along a circle: every stage that is left waits for another that is left."""
    seen: list[str] = []
    name = next(iter(left))
    while name not in seen:
        seen.append(name)
        name = next(one for one in _needs(left[name]) if one in left)
    return [*seen[seen.index(name) :], name]


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [str(one) for one in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _article(kind: str) -> str:
    return "an" if kind[0] in "aeiou" else "a"
