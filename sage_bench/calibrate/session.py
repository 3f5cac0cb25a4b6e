"""``sage calibrate``, without its command line: :func:`calibrate_engine`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import uvloop

from sage_bench.calibrate import embedding, llm
from sage_bench.calibrate.design import Limits
from sage_bench.calibrate.engine import Facts, ask, load
from sage_bench.calibrate.files import (
    Figure,
    Origin,
    doubtful,
    embedding_device,
    embedding_profile,
    figures,
    llm_device,
    llm_profile,
    write,
)
from sage_bench.calibrate.shots import PIPELINE, Range
from sage_bench.core_speed import SAMPLES, watching
from sage_core.errors import ConfigError
from sage_core.rng import Streams
from sage_core.units import RequestKind
from sage_live.loadgen.options import Model, Options
from sage_live.loadgen.overhead import measure_overhead
from sage_live.loadgen.prompts import Prompts, of_token_ids, with_tokenizer
from sage_sim.iteration import KNOT_MAX
from sage_sim.profile import Profile

TOKEN_IDS: Final = range(256, 4352)
"""Of prompts made without a tokenizer: words and pieces of words in any vocabulary; special tokens lie elsewhere."""

POSITIONS: Final = 4096
KV_TOKENS: Final = 65536
BLOCK_SIZE: Final = 16

_INTERFACES: Final = {
    "chat": (RequestKind.LLM_CHAT, "/v1/chat/completions"),
    "text": (RequestKind.LLM_GENERATE, "/v1/completions"),
    "embedding": (RequestKind.EMBEDDING, "/v1/embeddings"),
}

SCATTER_MAX: Final = 0.03
"""Of the middle condition, relative: beyond it the error of a mean latency cannot be told within a few per cent."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asks for; None: as the engine says, else as assumed. budget_s: about how long it may take.
    prompt_max: longest prompt measured. prompts: what an LLM engine is sent, chats or texts of exactly so many tokens, which
    need the tokenizer, or token ids; None: chats if there is a tokenizer, else token ids.
    watch_core: the core of this machine on which the engine runs; the profile is in its work time
    (:mod:`sage_bench.core_speed`). None: in seconds."""

    url: str
    model: str | None = None
    kind: Literal["llm", "embedding"] = "llm"
    tokenizer: Path | None = None
    budget_s: float = 120.0
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_tokens: int | None = None
    prompt_max: int | None = None
    max_batch_tasks: int = 32
    max_batch_tokens: int = 16384
    padding: bool = True
    device: str | None = None
    seed: int = 0
    watch_core: int | None = None
    prompts: Literal["chat", "text", "ids"] | None = None


class Report(NamedTuple):
    """What came out. device: settings beside the profile, and ``beside`` their file. notes: what to know of it."""

    profile: Profile
    device: dict[str, Any]
    beside: Path
    figures: list[Figure]
    scatter_pct: float
    doubtful: list[str]
    notes: list[str]
    requests: int
    seconds: float


def calibrate_engine(wanted: Wanted, out: Path, say: Callable[[str], None] = lambda _: None) -> Report:
    """Measure the engine, write ``out`` and the settings beside it. ``say`` hears of progress.

    ConfigError: settings that do not go together, or an engine that is not idle. DataError: it does not answer as asked.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out: expected the name of a .yaml file, got {out}")
    facts = ask(wanted.url, wanted.model)
    before = load(wanted.url)
    if before.busy:
        raise ConfigError(f"engine {wanted.url}: {before.busy} requests are in it; calibrate when it has nothing to do")
    with ExitStack() as watched:
        samples = None
        if wanted.watch_core is not None:
            samples = Path(watched.enter_context(tempfile.TemporaryDirectory(prefix="sage-calibrate-"))) / SAMPLES
            watched.enter_context(watching(wanted.watch_core, samples))
        report = uvloop.run(_calibrated(wanted, facts, out, say, samples))
    after = load(wanted.url)
    if before.answered is not None and after.answered is not None:
        others = after.answered - before.answered - report.requests
        if others > 0:
            note = f"the engine answered {others} requests of others meanwhile; what was measured contains them"
            report.notes.append(note)
    return report


class Interleaved:
    """A calibration of an LLM engine whose rounds are as far apart as the caller likes, with other work for the engine between
    them: a machine that is faster at some times than at others is then measured at all of them. Its core is watched
    (``wanted.watch_core``, which has to be given) during the rounds alone. It tries no held-out loads."""

    def __init__(self, wanted: Wanted, say: Callable[[str], None] = lambda _: None) -> None:
        assert wanted.watch_core is not None
        self._wanted, self._core, self._say = wanted, wanted.watch_core, say

    def __enter__(self) -> Interleaved:
        with ExitStack() as entered:
            folder = entered.enter_context(tempfile.TemporaryDirectory(prefix="sage-calibrate-"))
            self._probes = Path(folder) / SAMPLES
            self._facts = ask(self._wanted.url, self._wanted.model)
            self._aim = uvloop.run(_aimed(self._wanted, self._facts, self._probes))
            self._calibration, self._engine = _calibration(self._wanted, self._facts, self._aim, self._say)
            with watching(self._core, self._probes):
                uvloop.run(self._calibration.look())
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    def round(self) -> None:
        """Every condition once."""
        with watching(self._core, self._probes):
            uvloop.run(self._calibration.round())

    def solved(self, out: Path) -> Report:
        """The profile by all rounds so far, written to ``out``."""
        found = uvloop.run(self._calibration.solved(loads=False))
        return _llm_report(self._wanted, self._facts, self._aim, found, self._engine, out)


class _Aim(NamedTuple):
    """interface: of the engine, in words. prompt_min: fewest tokens that a prompt has."""

    at: Range
    interface: str
    prompt_min: int
    notes: list[str]


async def _calibrated(
    wanted: Wanted, facts: Facts, out: Path, say: Callable[[str], None], watched: Path | None
) -> Report:
    aim = await _aimed(wanted, facts, watched)
    if wanted.kind == "llm":
        calibration, engine = _calibration(wanted, facts, aim, say)
        return _llm_report(wanted, facts, aim, await llm.calibrate(calibration, wanted.budget_s), engine, out)
    batching = embedding.Batching(
        wanted.max_batch_tasks,
        wanted.max_batch_tokens,
        min(facts.positions or POSITIONS, wanted.prompt_max or POSITIONS),
        wanted.padding,
        aim.prompt_min,
    )
    found = await embedding.calibrate(aim.at, batching, wanted.budget_s, Streams(wanted.seed), say)
    profile = embedding_profile(found, _origin(wanted, facts, out, aim))
    return _report(profile, embedding_device(found, out), found, out, aim.notes)


def _calibration(
    wanted: Wanted, facts: Facts, aim: _Aim, say: Callable[[str], None]
) -> tuple[llm.Calibration, llm.LlmEngine]:
    limits, engine, assumed = _limits(wanted, facts, aim.prompt_min)
    aim.notes.extend(assumed)
    return llm.Calibration(aim.at, limits, engine, wanted.budget_s, Streams(wanted.seed), say), engine


def _llm_report(
    wanted: Wanted, facts: Facts, aim: _Aim, found: llm.Calibrated, engine: llm.LlmEngine, out: Path
) -> Report:
    profile = llm_profile(found, _origin(wanted, facts, out, aim))
    return _report(profile, llm_device(found, engine, out), found, out, list(aim.notes))


async def _aimed(wanted: Wanted, facts: Facts, watched: Path | None) -> _Aim:
    # Words of its own for each calibration: the same again would be answered from the engine's prefix cache.
    words = time.time_ns()
    notes: list[str] = []
    sent: str = wanted.prompts or ("chat" if wanted.tokenizer else "ids")
    if wanted.kind == "embedding":
        if wanted.prompts not in (None, "text"):
            raise ConfigError(f"--prompts: an embedding engine is sent texts, got {wanted.prompts}")
        sent = "embedding"
    if sent == "ids":
        kind, interface = RequestKind.LLM_GENERATE, "/v1/completions with token ids"
        prompts = (
            of_token_ids(wanted.tokenizer, seed=words)
            if wanted.tokenizer
            else Prompts([str(number) for number in TOKEN_IDS], seed=words, token_ids=True)
        )
        notes.append("prompts are token ids, so the time of chat templates and tokenisation is not in the profile")
    elif wanted.tokenizer is None:
        raise ConfigError(
            "--tokenizer: needed, so that texts have exact lengths; give the model's folder or tokenizer.json"
        )
    else:
        kind, interface = _INTERFACES[sent]
        prompts = with_tokenizer(wanted.tokenizer, seed=words)
        if sent == "text":
            notes.append("prompts are texts, so the time of chat templates is not in the profile")
    options = Options(
        wanted.url, {PIPELINE: Model(facts.model, prompts)}, fixed_lengths=True, chunk_times=True, timeout_s=120.0
    )
    if sent != "ids":
        prompts = prompts.with_overhead(await measure_overhead(options, PIPELINE, kind))
        options = replace(options, models={PIPELINE: Model(facts.model, prompts)})
    at = Range(options, kind, watched)
    at.fired = int(sent != "ids")  # the one that told the template's tokens
    return _Aim(at, interface, prompts.overhead + 1, notes)


def _limits(wanted: Wanted, facts: Facts, prompt_min: int) -> tuple[Limits, llm.LlmEngine, list[str]]:
    assumed = []

    def setting(name: str, given: int | None, told: int | None, otherwise: int) -> int:
        if given is not None or told is not None:
            return given if given is not None else told or 0
        assumed.append(f"{name} {otherwise} is assumed; the engine does not say, and it was not given")
        return otherwise

    block_size = facts.block_size or BLOCK_SIZE
    limits = Limits(
        setting("max_num_seqs", wanted.max_num_seqs, None, 256),
        setting("max_num_batched_tokens", wanted.max_num_batched_tokens, None, 2048),
        setting("max_model_len", None, facts.positions, POSITIONS),
        setting("kv_tokens", wanted.kv_tokens, facts.kv_tokens, KV_TOKENS),
        prompt_min,
        wanted.prompt_max or KNOT_MAX,
    )
    if limits.max_num_batched_tokens < limits.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens: expected at least max_num_seqs = {limits.max_num_seqs}, got "
            f"{limits.max_num_batched_tokens}"
        )
    caching = True if facts.prefix_caching is None else facts.prefix_caching
    return limits, llm.LlmEngine(block_size, caching), assumed


def _origin(wanted: Wanted, facts: Facts, out: Path, aim: _Aim) -> Origin:
    return Origin(
        out.stem, facts, wanted.seed, wanted.budget_s, aim.interface, wanted.device, list(aim.notes), aim.at.reference
    )


def _report(
    profile: Profile,
    device: dict[str, Any],
    found: llm.Calibrated | embedding.CalibratedEmbedding,
    out: Path,
    notes: list[str],
) -> Report:
    beside = write(profile, device, out)
    scatter = sorted(each.scatter for each in found.observations)
    if scatter[len(scatter) // 2] > SCATTER_MAX:
        notes.append(
            "repetitions scatter too much for a profile to be trusted; measure again on a machine with nothing else to do"
        )
    return Report(
        profile,
        device,
        beside,
        figures(found.tried),
        100 * scatter[len(scatter) // 2],
        doubtful(found.observations, found.fit.predicted_us.tolist()),
        notes,
        found.requests,
        found.seconds,
    )
