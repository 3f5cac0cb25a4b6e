"""The engine of a measured run: what the user states, what the file states, and what the profile is of.

The file's columns are the defaults of the settings that are not given; a setting that is given and differs from the
file is an error, because a replay of another engine validates nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from sage_bench.validate.measured import Arrivals, MeasuredRun
from sage_bench.validate.prefixes import NO_TRACE, find_prefix_trace
from sage_core.errors import ConfigError
from sage_sim.profile import Profile

DEFAULTS: Final = {"max_num_batched_tokens": 2048, "data_parallel": 1}
"""Of the settings that neither the user nor the file states. max_num_seqs and KV blocks have none: they decide too much."""

BLOCK_SIZE: Final = 16

NULL_BLOCKS: Final = 1
"""vLLM keeps so many of the blocks that it states for itself, and gives KV usage as a share of the others."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user states; None: as the file says. kv_blocks: as vLLM states them when it starts. prefix_trace: which
    blocks prompts share; None looks for one beside the file, ``NO_TRACE`` does not. engine: further keys of the configuration's ``llm`` engine."""

    profile: str
    max_num_seqs: int | None = None
    kv_blocks: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = BLOCK_SIZE
    data_parallel: int | None = None
    scheduling: Literal["fcfs", "priority"] = "fcfs"
    arrivals: Arrivals = "queued"
    prefix_trace: Path | None = None
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setup:
    """The engine to simulate. llm: the configuration of each replica; replicas: how many (data parallel); kv_blocks: those
    that requests can have."""

    llm: dict[str, Any]
    replicas: int
    kv_blocks: int
    block_size: int
    arrivals: Arrivals
    prefix_trace: Path | None


def resolve(asked: Asked, run: MeasuredRun, profile: Profile) -> tuple[Setup, list[str]]:
    """The setup, and notes on where file and profile are not certain to be of one engine.

    Raises :class:`ConfigError`: a setting is missing or contradicts the file, the profile is of another kind or degree of
    tensor parallelism, or a request does not fit the KV cache.
    """
    if profile.kind != "llm":
        raise ConfigError(f"--profile: {profile.name} is of kind {profile.kind}; a measured run needs an llm profile")
    if asked.block_size < 1:
        raise ConfigError(f"--block-size: expected at least 1, got {asked.block_size}")
    kv_tokens = run.settings.get("kv_tokens")
    of_file = {**run.settings, **({} if kv_tokens is None else {"kv_blocks": kv_tokens // asked.block_size})}
    max_num_seqs, kv_blocks, max_num_batched_tokens, replicas = (
        _setting(name, getattr(asked, name), of_file.get(name), run)
        for name in ("max_num_seqs", "kv_blocks", "max_num_batched_tokens", "data_parallel")
    )
    degree = run.settings.get("tensor_parallel")
    if degree is not None and degree != profile.hardware.count:
        raise ConfigError(
            f"--profile: {profile.name} is of {profile.hardware.count} x {profile.hardware.device}, but {run.path} was "
            f"measured with tensor_parallel {degree}; choose a profile of that degree"
        )
    if asked.scheduling == "priority" and run.priority is None:
        raise ConfigError(f"--scheduling: priority needs a column priority, which {run.path} does not have")
    kv_blocks -= NULL_BLOCKS
    _check_fit(run, kv_blocks, asked.block_size)
    llm: dict[str, Any] = {
        "profile": asked.profile,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "block_size": asked.block_size,
        "kv_tokens": kv_blocks * asked.block_size,
        "scheduling": asked.scheduling,
    }
    taken = sorted(llm.keys() & asked.engine.keys())
    if taken:
        raise ConfigError(f"--engine: {taken[0]} has an option of its own; leave it out here")
    notes = _doubts(run, profile)
    prefix_trace = None if asked.prefix_trace == NO_TRACE else asked.prefix_trace
    if asked.engine.get("prefix_caching", True) is not False:
        if asked.prefix_trace is None:
            prefix_trace = find_prefix_trace(run, asked.block_size)
        if prefix_trace is None:
            notes.append("prompts are taken to have nothing in common; --prefix-trace says what they share")
        elif asked.prefix_trace is None:
            notes.append(
                f"what prompts share is taken from {prefix_trace.name}, which lies beside the run and has its prompt and "
                "output lengths row by row; --prefix-trace none leaves it out"
            )
    elif prefix_trace is not None:
        raise ConfigError("--prefix-trace: needs the prefix cache, which --engine switches off; leave one of them out")
    llm |= asked.engine
    return Setup(llm, replicas, kv_blocks, asked.block_size, asked.arrivals, prefix_trace), notes


def _setting(name: str, given: int | None, of_file: int | None, run: MeasuredRun) -> int:
    option = f"--{name.replace('_', '-')}"
    if given is not None and given < 1:
        raise ConfigError(f"{option}: expected at least 1, got {given}")
    if given is not None and of_file is not None and given != of_file:
        raise ConfigError(
            f"{option}: {given} was given, but {run.path} was measured with {of_file}; leave the option out, or correct the file"
        )
    value = next((each for each in (given, of_file, DEFAULTS.get(name)) if each is not None), None)
    if value is None:
        raise ConfigError(f"{option}: needed, because {run.path} does not say it (vLLM prints it when it starts)")
    return value


def _check_fit(run: MeasuredRun, kv_blocks: int, block_size: int) -> None:
    # The last token is generated and never computed on, so it needs no slot.
    tokens = run.prompt_tokens + run.output_tokens - 1
    too_long = tokens > kv_blocks * block_size
    if too_long.any():
        row = int(too_long.argmax())
        raise ConfigError(
            f"--kv-blocks: the {kv_blocks} blocks of {block_size} that requests can have hold {kv_blocks * block_size:,} tokens; row {row} (from 0) of "
            f"{run.path} needs {tokens[row]:,} ({run.prompt_tokens[row]:,} prompt and {run.output_tokens[row]:,} output), and "
            f"{too_long.sum():,} of {len(run):,} rows do not fit; give the number that the engine printed when it started"
        )


def _doubts(run: MeasuredRun, profile: Profile) -> list[str]:
    notes = profile.warn_outside(prompt_tokens=int(run.prompt_tokens.max()))
    for name, theirs in (("gpu", profile.hardware.device), ("model", profile.model.name)):
        ours = run.names.get(name)
        if ours is not None and _bare(ours) not in _bare(theirs) and _bare(theirs) not in _bare(ours):
            notes.append(f"{run.path} was measured with {name} {ours}; profile {profile.name} is of {theirs}")
    version = run.names.get("vllm_version")
    if version is not None and version != profile.engine.version:
        notes.append(
            f"{run.path} was measured with vLLM {version}; profile {profile.name} is of "
            f"{profile.engine.name} {profile.engine.version}"
        )
    return notes


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())
