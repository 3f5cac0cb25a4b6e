"""Which command starts an engine of a job: a real one, or one emulated from the job's profile."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sage_bench.config import EmbedConfig, LlmConfig
from sage_core.cluster import Cluster, Job
from sage_core.errors import ConfigError, DataError, EngineError
from sage_core.job_events import Start
from sage_core.plan import plan
from sage_live.jobs.launch import Launch
from sage_sim.profile import load_profile

_SAGE: Final = ("{python}", "-m", "sage_bench")
_WHERE: Final = ("--host", "{host}", "--port", "{port}")

WEIGHTS: Final = "weights"
"""The option of a job that is ours: a folder, or a name on the hub, where that is not the model's name."""

EMULATED_START_S: Final = 60.0


def check_jobs(cluster: Cluster) -> None:
    """ConfigError for the first job that could not be started, before any is."""
    if not cluster.jobs:
        raise ConfigError("jobs: none, so there is nothing to start; add one")
    for job in cluster.jobs:
        if job.service == "operator":
            raise ConfigError(
                f"job {job.name}: operators run inside the process that serves the pipeline, there is no service to "
                "start; leave it out here"
            )


def check_plan(cluster: Cluster, *, emulate: bool) -> None:
    """ConfigError where a replica has no place, or no profile for it: then nothing is to be started."""
    planned = plan(cluster)
    if planned.unplaced:
        told = "; ".join(
            f"job {each.job}: replica {each.replica} has no place: {each.why}" for each in planned.unplaced
        )
        raise ConfigError(f"{told}; nothing was started (`sage cluster plan` shows the rest)")
    jobs = {job.name: job for job in cluster.jobs}
    for each in planned.placed if emulate else ():
        profile = jobs[each.job].profile_by(each.place.needs)
        if profile is None:
            raise ConfigError(
                f"job {each.job}: profile: expected one (`sage profile list`) for what it gets on {each.place.node}, to "
                "emulate it"
            )
        try:
            load_profile(profile)
        except (ConfigError, DataError) as error:
            raise ConfigError(f"job {each.job}: profile: {error}; nothing was started") from error


def launch_of(job: Job, placed: Start) -> Launch:
    """A real engine: vLLM, or sentence-transformers on a GPU or CPUs, whichever it was given."""
    options = dict(job.options)
    weights = str(options.pop(WEIGHTS, job.model))
    if job.service == "llm":
        options.setdefault("served_model_name", job.model)
        if len(placed.gpus) > 1:
            options.setdefault("tensor_parallel_size", len(placed.gpus))
        command = (*_SAGE, "llm", "serve", weights, *_WHERE, "--", *option_words(options))
        return Launch(service="llm", model=job.model, command=command)
    options.setdefault("model", job.model)
    options.setdefault("device", "cuda" if placed.gpus else "cpu")
    command = (*_SAGE, "embed", "serve", weights, *_WHERE, *option_words(options))
    return Launch(service="embedding", model=job.model, adapter="sage", command=command)


def emulated_launch_of(job: Job, placed: Start) -> Launch:
    """An engine that takes as long as the job's profile says. EngineError where there is none for where it was placed."""
    profile = job.profile_by(placed.needs)
    if profile is None:
        raise EngineError(f"no profile for what it gets on {placed.node}; state one for each alternative of needs")
    options = {key: value for key, value in job.options.items() if key not in not_emulated(job)}
    if job.service == "llm":
        words = ("--emulate", profile, "--model", job.model, *option_words(options))
    else:
        config = json.dumps({"profile": profile, **options})
        words = ("--embed-config", config, "--embed-model", job.model)
    return Launch(
        service=job.service,
        model=job.model,
        command=(*_SAGE, "llm", "serve", *_WHERE, *words),
        start_timeout_s=EMULATED_START_S,
    )


def not_emulated(job: Job) -> list[str]:
    """Its options that an emulated engine does not have, as a simulated one: one file serves all three."""
    known = (LlmConfig if job.service == "llm" else EmbedConfig).__struct_fields__
    return [key for key in job.options if key not in known]


def gateway_launch(overrides: Sequence[str]) -> Launch:
    """``overrides`` choose policy and objectives, as for ``sage gateway start``. Its health is that it answers: without
    engines, which come later, ``/health`` says 503."""
    command = (*_SAGE, "gateway", "start", *_WHERE, *overrides)
    return Launch(service="gateway", model="", command=command, health="/v1/models", start_timeout_s=EMULATED_START_S)


def option_words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """``{"max_num_seqs": 64, "enforce_eager": true, "prefix_caching": false}`` as a command line."""
    words: list[str] = []
    for key, value in options.items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
    return tuple(words)
