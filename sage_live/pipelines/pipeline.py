"""A declared pipeline with everything that its stages need: functions, indexes. Loaded once, shared by its requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from sage_core.declared import AnyStage, Branch, Declared, Filter, Map, Placed, Rerank, Retrieve, Tool
from sage_core.errors import ConfigError
from sage_live.retrieval.index import VectorIndex
from sage_live.tools import Tool as Function

Calling = Tool | Map | Filter | Branch
"""Stages that call a function."""


class LivePipeline:
    """Raises ConfigError for a function that is not there, or an index that was not given; DataError for one that
    cannot be read. Build inside the event loop that will call it."""

    def __init__(self, declared: Declared, indexes: Mapping[str, Path | VectorIndex]) -> None:
        self.declared = declared
        self.pipeline = declared.pipeline
        self.name = declared.pipeline.name
        self.functions: dict[str, Function] = {}
        self.indexes: dict[str, VectorIndex] = {}
        self.pools: dict[str, None] = {}
        """Whose work is done here, by functions; in order of the stages."""
        for stage, placed in zip(self.pipeline.stages, declared.stages, strict=True):
            for each in placed:
                if self._load(each, indexes):
                    self.pools[stage.op.pool] = None

    def _load(self, placed: Placed, indexes: Mapping[str, Path | VectorIndex]) -> bool:
        """Whether the stage's work is done here, and by what."""
        each: AnyStage = placed.declaration  # type: ignore[assignment]
        if isinstance(each, Calling):
            if each.function is not None:
                returns = int if isinstance(each, Branch) else None
                self.functions[placed.name] = Function.load(
                    each.function, name=placed.name, timeout_s=each.timeout_s, returns=returns
                )
            return True
        if isinstance(each, Retrieve):
            if each.index not in self.indexes:
                given = indexes.get(each.index)
                if given is None:
                    raise ConfigError(
                        f"pipeline {self.name}: stage {placed.name} needs index {each.index!r}, and none was given; build "
                        f"one with `sage index build`, and say --index {each.index}=FOLDER"
                    )
                self.indexes[each.index] = given if isinstance(given, VectorIndex) else VectorIndex.load(given)
            return True
        return isinstance(each, Rerank)

    def engine_pools(self) -> Iterator[str]:
        """Pools of engines that it needs."""
        return iter(
            dict.fromkeys(s.op.pool for s in self.pipeline.stages if not s.free and s.op.pool not in self.pools)
        )
