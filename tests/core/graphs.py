"""Random declared pipelines: branches, guards, fan-outs, loops and joins, in any order; for Hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

SIZES = st.one_of(st.integers(0, 60), st.builds(lambda low, more: {"uniform": {"low": low, "high": low + more}}, st.integers(0, 9), st.integers(0, 9)))  # fmt: skip


@st.composite
def declarations(draw: st.DrawFn, fuse: bool | None = None) -> dict[str, Any]:
    """A valid file as plain data. Its answer is a chat on whatever of the other results is not used elsewhere."""
    block = _Block(draw, {"request": "text"}, depth=0)
    for number in range(draw(st.integers(1, 6))):
        block.add(f"s{number}")
    loose = block.loose()
    stages = block.stages
    stages["all"] = {"op": "join", "of": loose}
    stages["answer"] = {"op": "chat", "prompt": "{all} {request}", "output_tokens": draw(SIZES)}
    names = draw(st.permutations(list(stages)))  # the order in a file means nothing
    return {
        "name": "random",
        "stages": {name: stages[name] for name in names},
        "output": "answer",
        "fuse": draw(st.booleans()) if fuse is None else fuse,
    }


class _Block:
    def __init__(self, draw: st.DrawFn, scope: dict[str, str], depth: int) -> None:
        self.draw = draw
        self.scope = dict(scope)
        self.depth = depth
        self.stages: dict[str, Any] = {}
        self.used: set[str] = set()

    def add(self, name: str) -> None:
        kinds = ["map", "map", "tool", "chat", "branch", "latest", "join"]
        if self.depth == 0:
            kinds += ["repeat", "each"]
        kind = self.draw(st.sampled_from(kinds))
        guard = self._guard()
        stage, gives = getattr(self, f"_{kind}")(name)
        self.stages[name] = {"op": kind, **stage, **guard}
        self.scope[name] = gives

    def loose(self) -> list[str]:
        """Texts that together use all that nothing else does."""
        texts = []
        for name in list(self.stages):
            if name in self.used:
                continue
            if self.scope[name] == "outcome":
                self.stages[f"{name}_told"] = {"op": "map", "of": name, "function": "m:f", "size": 3}
                self.scope[f"{name}_told"] = "text"
                name = f"{name}_told"
            texts.append(name)
        return texts

    def _guard(self) -> dict[str, Any]:
        decisions = [name for name, kind in self.scope.items() if kind == "outcome"]
        if not decisions or not self.draw(st.booleans()):
            return {}
        decision = self.draw(st.sampled_from(decisions))
        self.used.add(decision)
        least = self.draw(st.integers(0, 2))
        return {"when": {decision: self.draw(st.sampled_from([least, [least, least + 1]]))}}

    def _some(self, kinds: tuple[str, ...] = ("text", "docs"), most: int = 2) -> list[str]:
        known = [name for name, kind in self.scope.items() if kind in kinds]
        of = self.draw(st.lists(st.sampled_from(known), min_size=1, max_size=most, unique=True))
        self.used.update(of)
        return of

    def _made(self) -> list[str]:
        """Names of texts, at least one of which a stage has made."""
        of = self._some()
        if all(name in ("request", "item", "state") for name in of):
            maker = f"m{self.depth}_{len(self.stages)}"
            self.stages[maker] = {"op": "map", "of": of[0], "function": "m:f"}
            self.scope[maker] = "text"
            self.used.add(maker)
            of = [*of, maker]
        return of

    def _map(self, name: str) -> tuple[dict[str, Any], str]:
        size = self.draw(st.one_of(st.none(), SIZES))
        return {"of": self._some(("text", "docs", "outcome")), "function": "m:f", "size": size}, "text"

    def _tool(self, name: str) -> tuple[dict[str, Any], str]:
        return self._map(name)

    def _chat(self, name: str) -> tuple[dict[str, Any], str]:
        prompt = " and ".join(f"{{{one}}}" for one in self._some())
        return {"prompt": prompt, "output_tokens": self.draw(SIZES), "output_tokens_max": 40}, "text"

    def _branch(self, name: str) -> tuple[dict[str, Any], str]:
        chances = self.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
        return {"of": self._some(("text", "docs", "outcome"), 1), "contains": "x", "chances": chances}, "outcome"

    def _latest(self, name: str) -> tuple[dict[str, Any], str]:
        return {"of": self._made()}, "text"

    def _join(self, name: str) -> tuple[dict[str, Any], str]:
        return {"of": self._made()}, "docs"

    def _repeat(self, name: str) -> tuple[dict[str, Any], str]:
        of = self._some(most=1)[0]
        inner = self._inner({"state": "text"})
        inner.stages["more"] = {"op": "branch", "of": "state", "chances": [1, 1], "contains": "x"}
        inner.used.add("more")
        given = inner.finish("given")
        times = self.draw(st.integers(1, 3))
        return {"of": of, "times": times, "stages": inner.stages, "gives": given, "again": "more"}, "text"

    def _each(self, name: str) -> tuple[dict[str, Any], str]:
        of = self._some(most=1)[0]
        count = f"{name}_count"
        chances = self.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
        self.stages[count] = {"op": "branch", "of": of, "chances": chances, "contains": "x"}
        self.scope[count] = "outcome"
        self.used.add(count)
        inner = self._inner({"item": "text"})
        given = inner.finish("given")
        most = self.draw(st.integers(1, 3))
        return {"of": of, "count": count, "most": most, "stages": inner.stages, "gives": given}, "docs"

    def _inner(self, extra: dict[str, str]) -> _Block:
        inner = _Block(self.draw, {**self.scope, **extra}, self.depth + 1)
        for number in range(self.draw(st.integers(0, 2))):
            inner.add(f"b{number}")
        self.used |= inner.used  # of this block's stages
        return inner

    def finish(self, name: str) -> str:
        """Add a stage that uses everything loose; its name. It is a map: a skipped input skips it."""
        loose = self.loose()
        own = [each for each in ("state", "item") if each in self.scope]
        self.stages[f"{name}_all"] = {"op": "map", "of": [*own, *loose[:1]], "function": "m:f"}
        self.scope[f"{name}_all"] = "text"
        rest = [*loose[1:], f"{name}_all"]
        self.stages[name] = {"op": "latest", "of": rest}
        self.scope[name] = "text"
        return name
