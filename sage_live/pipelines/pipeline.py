"""A declared pipeline with everything that its stages need: functions, indexes. Loaded once, shared by its requests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sage_core.declared import AnyStage, Branch, Declared, Embed, Filter, Map, Placed, Rerank, Retrieve, Tool
from sage_core.errors import ConfigError
from sage_core.pipeline import Stage
from sage_core.units import PoolKind
from sage_live.pipelines.function_engine import Workers
from sage_live.retrieval.index import VectorIndex
from sage_live.tools import Tool as Function

Calling = Tool | Map | Filter | Branch
"""Stages that call a function."""


class LivePipeline:
    """Raises ConfigError for a function that is not there, or an index that was not given; DataError for one that
    cannot be read. Build inside the event loop that will call it. workers: of pools whose work is done here."""

    def __init__(
        self,
        declared: Declared,
        indexes: Mapping[str, Path | VectorIndex],
        workers: Mapping[str, Workers] | None = None,
    ) -> None:
        self.declared = declared
        self.pipeline = declared.pipeline
        self.name = declared.pipeline.name
        self.functions: dict[str, Function] = {}
        self.indexes: dict[str, VectorIndex] = {}
        self.workers: dict[str, Workers] = {}
        """Of the pools whose work is done here, by functions; in order of the stages."""
        self.engine_pools: dict[str, PoolKind] = {}
        """Pools of engines that it needs, and what these have to be."""
        self.placed: dict[str, tuple[Stage, Placed]] = {}
        """Stages as they were declared, by name; those that were fused are one stage of the graph."""
        for stage, placed in zip(self.pipeline.stages, declared.stages, strict=True):
            own = (workers or {}).get(stage.op.pool, Workers())
            here = False
            for each in placed:
                self.placed[each.name] = stage, each
                here |= self._load(each, indexes, own)
            if here:
                self.workers[stage.op.pool] = own
            elif not stage.free:
                kind = PoolKind.EMBEDDING if isinstance(placed[-1].declaration, Embed) else PoolKind.LLM
                if self.engine_pools.setdefault(stage.op.pool, kind) is not kind:
                    raise ConfigError(
                        f"pipeline {self.name}: stage {stage.name}: pool {stage.op.pool!r} is asked for embeddings and for "
                        "texts; no engine does both, give them pools of their own"
                    )
        both = self.workers.keys() & self.engine_pools.keys()
        if both:
            raise ConfigError(
                f"pipeline {self.name}: pool {min(both)!r} is that of functions and of engines; give them pools of their own"
            )

    def _load(self, placed: Placed, indexes: Mapping[str, Path | VectorIndex], workers: Workers) -> bool:
        """Whether the stage's work is done here, and by what."""
        each: AnyStage = placed.declaration  # type: ignore[assignment]
        if isinstance(each, Calling):
            if each.function is not None:
                returns = int if isinstance(each, Branch) else None
                self.functions[placed.name] = Function.load(
                    each.function,
                    name=placed.name,
                    timeout_s=each.timeout_s,
                    workers=workers.at_once,  # what waits, waits in the plane, where its time does not count
                    returns=returns,
                )
            return True
        if isinstance(each, Retrieve):
            if each.index not in self.indexes:
                given = indexes.get(each.index)
                if given is None:
                    raise ConfigError(
                        f"pipeline {self.name}: stage {placed.name} needs index {each.index!r}, and none was given; build "
                        f"one with `sage index build`, and say --index {each.index}=FOLDER (`sage run`: "
                        f"+driver.indexes.{each.index}=FOLDER)"
                    )
                self.indexes[each.index] = given if isinstance(given, VectorIndex) else VectorIndex.load(given)
            return True
        return isinstance(each, Rerank)
