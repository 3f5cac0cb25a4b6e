"""What a calibration leaves: a profile, and beside it the settings of the engine it was taken of.

``my-engine.yaml`` is a profile like the shipped ones. Times outside the iterations (``ingress_s``, ``host.api_server_s``)
and the settings that the engine ran with (``max_num_seqs``, the size of its KV cache) are no part of a profile: they are
keys of ``cluster.devices[].llm`` (or ``embed``), and stand in ``my-engine.device.json`` with the profile's path. JSON is
YAML: it can be pasted below ``llm:``, and ``sage llm serve --llm-config "$(cat my-engine.device.json)"`` emulates the
engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import yaml

from sage_bench.calibrate.embedding import CalibratedEmbedding
from sage_bench.calibrate.engine import Facts
from sage_bench.calibrate.llm import REPEATS, Calibrated, LlmEngine, Tried
from sage_bench.calibrate.observation import Repeated
from sage_bench.core_speed import Reference
from sage_core.errors import OutputError
from sage_sim.profile import Check, Engine, Hardware, Memory, Model, Profile, Source, Valid

HEADER = "# Made by `sage calibrate`; keys: docs/profiles.md. Settings of the engine: the .device.json beside it.\n"

DOUBTFUL = 0.1
"""Scatter of repetitions, or error of the fit, from which on a condition is named."""


class Origin(NamedTuple):
    """How the profile came about. assumed: settings that the engine did not state and the user did not give. reference: of its
    core's speed, where that was watched."""

    name: str
    facts: Facts
    seed: int
    budget_s: float
    interface: str
    device: str | None
    assumed: Sequence[str]
    reference: Reference | None


class Figure(NamedTuple):
    """Of a latency under a held-out load, in per cent. error, error_p95: of the mean and the 95th percentile; by_request:
    mean of the errors of single requests; noise: of the mean, from one time to the next."""

    share: float
    latency: str
    requests: int
    error: float
    error_p95: float
    by_request: float
    noise: float


def figures(tried: Sequence[Tried]) -> list[Figure]:
    """Every load and latency. The twin is compared with all times together."""
    found = []
    for each in tried:
        for latency in ("ttft", "tpot", "e2e"):
            real = [getattr(of, latency) for of in each.measured]
            twin = [getattr(of, latency) for of in each.simulated]
            if np.isnan(real[0]).all():
                continue
            ours, theirs = np.nanmean(np.stack(twin), axis=0), np.nanmean(np.stack(real), axis=0)
            means = [float(np.nanmean(of)) for of in real]
            every_real, every_twin = np.concatenate(real), np.concatenate(twin)
            found.append(
                Figure(
                    each.share,
                    latency,
                    len(real[0]),
                    _off(float(np.nanmean(every_twin)), float(np.nanmean(every_real))),
                    _off(float(np.nanpercentile(every_twin, 95)), float(np.nanpercentile(every_real, 95))),
                    float(np.nanmean(np.abs(100 * (ours - theirs) / theirs))),
                    _off(max(means), min(means)),
                )
            )
    return found


def doubtful(observations: Sequence[Repeated], predicted_us: Sequence[float]) -> list[str]:
    """Conditions whose repetitions scatter, or that the fit misses, by more than :data:`DOUBTFUL`."""
    found = []
    for each, ours in zip(observations, predicted_us, strict=True):
        off = ours / each.median.time_us - 1
        if each.scatter > DOUBTFUL or abs(off) > DOUBTFUL:
            found.append(
                f"{each.median.condition.phase}, {each.median.condition.name}: {each.median.time_us / 1e3:.2f} ms, "
                f"repetitions scatter by {100 * each.scatter:.0f} %, fit {100 * off:+.0f} %"
            )
    return found


def llm_profile(found: Calibrated, origin: Origin) -> Profile:
    """The profile of an LLM engine."""
    limits, facts = found.limits, origin.facts
    prompts = [length for length in found.design.prompts if length <= limits.max_num_batched_tokens]
    works = [work for each in found.observations for _, work in each.median.works]
    decodes = [work for work in works if work.seqs]
    contexts = [work.kv_tokens // work.seqs for work in decodes]
    scatter = 100 * float(np.median([each.scatter for each in found.observations]))
    return Profile(
        name=origin.name,
        kind="llm",
        model=Model(facts.model, "unknown", 0, limits.positions),
        hardware=_hardware(origin),
        engine=Engine(facts.name, facts.version),
        time=found.fit.time,
        memory=_memory(origin, limits.kv_tokens),
        valid=Valid(
            (prompts[0], max(work.prefill_tokens for work in works)),
            (prompts[0], max(found.design.prompts)),
            (1, limits.max_num_seqs),
            (min(work.kv_tokens for work in decodes), max(work.kv_tokens for work in decodes)),
            (min(contexts), max(contexts)),
        ),
        source=_source(origin, found, scatter),
        errors=found.errors,
        checks=_checks(found.tried),
        assumptions=[
            *_assumptions(origin),
            f"overheads outside the iterations: {found.fit.ingress_us / 1e3:.3f} ms from the client to the engine's queue and "
            f"back, of which {100 * found.api_share:.0f} % one request after another (the API server); iterations are decided "
            f"{'while the one before runs' if found.asynchronous else 'when they start'}",
            *(f"doubtful: {each}" for each in doubtful(found.observations, found.fit.predicted_us.tolist())),
        ],
    )


def llm_device(found: Calibrated, engine: LlmEngine, profile: Path) -> dict[str, Any]:
    """What ``cluster.devices[].llm`` should say."""
    ingress_ns = round(found.fit.ingress_us * 1e3)
    api_server_ns = round(found.api_share * ingress_ns)
    return {
        "profile": str(profile),
        "max_num_seqs": found.limits.max_num_seqs,
        "max_num_batched_tokens": found.limits.max_num_batched_tokens,
        "block_size": engine.block_size,
        "kv_tokens": found.limits.kv_tokens,
        "max_model_len": found.limits.positions,
        "prefix_caching": engine.prefix_caching,
        "async_scheduling": found.asynchronous,
        "ingress_s": (ingress_ns - api_server_ns) / 1e9,
        "host": {"api_server_s": api_server_ns / 1e9},
    }


def embedding_profile(found: CalibratedEmbedding, origin: Origin) -> Profile:
    """The profile of an embedding engine."""
    works = [work for each in found.observations for _, work in each.median.works]
    scatter = 100 * float(np.median([each.scatter for each in found.observations]))
    return Profile(
        name=origin.name,
        kind="embedding",
        model=Model(origin.facts.model, "unknown", 0, found.positions),
        hardware=_hardware(origin),
        engine=Engine(origin.facts.name, origin.facts.version),
        time=found.fit.time,
        memory=Memory(0, 0, 0, 1.0),
        valid=Valid(
            (min(work.prefill_tokens for work in works), max(work.prefill_tokens for work in works)),
            (found.lengths[0], found.lengths[-1]),
        ),
        source=_source(origin, found, scatter),
        errors=found.errors,
        checks=_checks(found.tried),
        assumptions=[
            *_assumptions(origin),
            f"overheads outside the batches: {found.fit.ingress_us / 1e3:.3f} ms from the client to the engine and back",
            *(f"doubtful: {each}" for each in doubtful(found.observations, found.fit.predicted_us.tolist())),
        ],
    )


def embedding_device(found: CalibratedEmbedding, profile: Path) -> dict[str, Any]:
    """What ``cluster.devices[].embed`` should say."""
    return {
        "profile": str(profile),
        "max_batch_tasks": found.max_batch_tasks,
        "max_batch_tokens": found.max_batch_tokens,
        "padding": found.padding,
        "ingress_s": round(found.fit.ingress_us / 1e6, 9),
    }


def write(profile: Profile, device: dict[str, Any], out: Path) -> Path:
    """``out`` and the settings beside it, whose path is returned. OutputError: a file cannot be written."""
    text = HEADER + yaml.dump(
        msgspec.to_builtins(profile), Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=False
    )
    beside = out.with_suffix(".device.json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        beside.write_text(json.dumps(device, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--out: {out} cannot be written ({error.strerror or error})") from error
    return beside


# --- parts of a profile -------------------------------------------------------------------------------------------------


def _source(origin: Origin, found: Calibrated | CalibratedEmbedding, scatter_pct: float) -> Source:
    host = origin.facts.host
    where = "" if host is None else f" on {host.cores} cores of {host.cpu}"
    return Source(
        kind="measured",
        files=[],
        origin=[f"sage calibrate, live {origin.facts.name} {origin.facts.version}{where}"],
        licence="own measurement",
        date=datetime.now(UTC).date().isoformat(),
        method=f"{found.requests} requests in {found.seconds:.0f} s by {origin.interface}; {found.rounds} rounds of "
        f"{len(found.observations)} conditions, medians of repetitions (which scatter by {scatter_pct:.1f} %), one "
        f"non-negative least-squares fit; held-out loads {REPEATS} times each; seed {origin.seed}, budget {origin.budget_s:g} s",
    )


def _checks(tried: Sequence[Tried]) -> list[Check]:
    return [
        Check(
            f"held-out load at {100 * each.share:.0f} % of capacity: mean {each.latency.upper()}",
            each.requests,
            round(each.by_request, 2),
            round(each.error, 2),
            f"bias: error of the mean; MAPE: of single requests; p95 {each.error_p95:+.1f} %; between two times of the same "
            f"load the mean differs by {each.noise:.1f} %",
        )
        for each in figures(tried)
    ]


def _assumptions(origin: Origin) -> list[str]:
    unknown = "the model's precision and size are not told over HTTP; parameters 0 stands for not known"
    found = [*origin.assumed, unknown]
    if origin.reference is not None:
        found.append(
            f"times are work time of the engine's core: seconds in which the probe takes {origin.reference.us:.2f} us, its mean while "
            f"the conditions were measured; they go with its power of {origin.reference.power:g}, by which repetitions scatter least"
        )
    return found


def _hardware(origin: Origin) -> Hardware:
    host = origin.facts.host
    device = origin.device or ("unknown" if host is None else host.cpu)
    memory_gib = 1.0 if host is None else round(host.memory_bytes / 2**30, 3)
    if origin.reference is None:
        return Hardware(device, 1, memory_gib)
    return Hardware(device, 1, memory_gib, probe_us=round(origin.reference.us, 3), probe_power=origin.reference.power)


def _memory(origin: Origin, kv_tokens: int) -> Memory:
    """Such that the KV cache has the tokens that it has; weights are not known, and counted with what is not the cache."""
    kv_bytes = origin.facts.kv_bytes
    per_token = max(1, kv_bytes // kv_tokens) if kv_bytes else 1
    memory_gib = _hardware(origin).memory_gib
    assert memory_gib is not None
    share = (kv_tokens + 0.5) * per_token / (memory_gib * 2**30)
    return Memory(0, per_token, 0, min(1.0, share))


def _off(ours: float, theirs: float) -> float:
    return 100 * (ours - theirs) / theirs


class _Dumper(yaml.SafeDumper):
    """Block style, but ranges and rows of a table flow."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, all(isinstance(item, int | float) for item in sequence))
