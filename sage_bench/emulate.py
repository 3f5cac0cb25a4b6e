"""From an engine's configuration to what an emulated server needs: the model it runs, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sage_bench.compose import check_device_memory, embed_replica_of, llm_replica_of
from sage_bench.config import DeviceConfig, EmbedConfig, LlmConfig
from sage_core.backend import ContentsOf, OutputTokens
from sage_core.errors import ConfigError
from sage_live.servers.emulated import ServedEmbedding, ServedLlm
from sage_live.servers.emulated_metrics import KvCache
from sage_live.servers.realtime import MakeModel, Model
from sage_sim.engine import EmbedReplica, LlmReplica, SimulatedDevice
from sage_sim.profile import Profile, load_profile

DIMENSIONS: Final = 384
"""Of the vectors of an emulated embedding engine; profiles do not state them."""


@dataclass(frozen=True, slots=True)
class Emulation:
    """What :meth:`sage_live.servers.emulated.EmulatedServer.start` takes."""

    make: MakeModel
    llm: ServedLlm | None
    embedding: ServedEmbedding | None


def emulation(
    llm: LlmConfig | None,
    embed: EmbedConfig | None,
    *,
    model: str | None = None,
    embed_model: str | None = None,
    dimensions: int = DIMENSIONS,
) -> Emulation:
    """One device with an LLM engine, an embedding engine, or both, as ``sage run`` would simulate it.

    model, embed_model: names to serve under; None: the profile's model. Raises ConfigError and DataError as ``sage run``
    does, and for pipeline parallelism, whose model cannot say what happens between two events.
    """
    if llm is not None and llm.pipeline_parallel > 1:
        raise ConfigError(f"pipeline_parallel: an emulated server has 1 stage, got {llm.pipeline_parallel}")
    profiles = {engine.profile: load_profile(engine.profile) for engine in (llm, embed) if engine is not None}
    check_device_memory(DeviceConfig(node="here", llm=llm, embed=embed), profiles)
    llm_replica: LlmReplica | None = None
    embed_replica: EmbedReplica | None = None
    served: ServedLlm | None = None
    embedding: ServedEmbedding | None = None
    if llm is not None:
        profile = _of_kind(profiles[llm.profile], "llm")
        llm_replica = llm_replica_of(llm, 0, profile, profile.iteration_time())
        cache = KvCache(llm_replica.kv_blocks, llm_replica.block_size, llm_replica.prefix_caching)
        served = ServedLlm(model or profile.model.name, llm_replica.tokens_max, cache, llm_replica.priority_queue)
    if embed is not None:
        profile = _of_kind(profiles[embed.profile], "embedding")
        embed_replica = embed_replica_of(embed, 1, profile.iteration_time())
        embedding = ServedEmbedding(embed_model or profile.model.name, profile.model.positions, dimensions)

    def make(output_tokens: OutputTokens, contents: ContentsOf) -> Model:
        return SimulatedDevice(0, "here", llm_replica, embed_replica, output_tokens, contents=contents)

    return Emulation(make, served, embedding)


def _of_kind(profile: Profile, wanted: str) -> Profile:
    if profile.kind != wanted:
        raise ConfigError(f"profile {profile.name}: is of kind {profile.kind}, expected {wanted}")
    return profile
