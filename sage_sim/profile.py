"""A profile: how long one engine iteration takes for one model on one kind of device, and how well that is known.

A profile is a YAML file of times at knots with their provenance: where the numbers come from, the error on points the
fit has not seen, the range it was fitted on, comparisons with independent measurements, and what is assumed. The shipped
ones lie in ``sage_sim/profiles`` and are made by ``tools/fit_profiles.py``; a path loads a user's own. What the times
mean is in :mod:`sage_sim.iteration`.

Rules kept:

* Units stand in the keys (``per_pair_ns``); the conversion to the engine's integer picoseconds happens once, here.
* A broken file is one error that names the file and the key. Unknown keys are errors: a typo may not pass silently.
* Nothing is extrapolated silently: ``warn_outside`` says when a configuration or a run leaves the fitted range.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
import yaml

from sage_core.errors import ConfigError, DataError
from sage_sim.iteration import IterationTime

PROFILES = Path(__file__).parent / "profiles"

Phase: TypeAlias = Literal["decode", "prefill", "mixed"]

Range: TypeAlias = tuple[int, int]
"""Smallest and largest value the fit has seen, both included."""


def profile_names() -> list[str]:
    """The shipped profiles, sorted."""
    return sorted(path.name.removesuffix(".yaml") for path in PROFILES.glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by name, or any profile file by path (anything ending in ``.yaml`` or ``.yml``).

    ConfigError: no shipped profile has that name. DataError: the file is missing, not YAML, or a key is wrong.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        return _read(Path(text))
    if text not in profile_names():
        raise ConfigError(
            f"profile: no shipped profile is called {text!r}; known: {', '.join(profile_names())}; "
            "or give the path of a .yaml file"
        )
    return _read(PROFILES / f"{text}.yaml")


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times at rising knots, linear between them. The last segment, which goes on, may not fall."""

    at: list[int]
    us: list[float]

    def __post_init__(self) -> None:
        _check_knots("at", self.at)
        _check_times("us", [self.us], 1, len(self.at))
        if self.us[-1] < self.us[-2:][0]:
            raise ValueError("us: the last time is below the one before it, and the line goes on")


class Attention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Attention of decoding sequences over all layers: for each number of sequences, a row over the mean context.

    decode_us: nothing else is in the iteration. mixed_us: beside a prefill, in whose kernel it then runs.
    mixed_per_seq_token_ns: per decoding sequence and token of the mean chunk, on top of mixed_us.
    """

    seqs: list[int]
    context: list[int]
    decode_us: list[list[float]]
    mixed_us: list[list[float]]
    mixed_per_seq_token_ns: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seqs", "context"):
            _check_knots(name, getattr(self, name))
        for name in ("decode_us", "mixed_us"):
            rows = getattr(self, name)
            _check_times(name, rows, len(self.seqs), len(self.context))
            if any(low > high for row in (*rows, *zip(*rows, strict=True)) for low, high in pairwise(row)):
                raise ValueError(f"{name}: expected times that never fall from one knot to the next")
        _check_numbers(self, ("mixed_per_seq_token_ns",))


class Prefill(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Attention of new prompt tokens over all layers: ``base`` by their number, plus the larger of pairs and context."""

    base: Curve
    per_pair_ns: float
    per_context_token_ns: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self, ("per_pair_ns", "per_context_token_ns"))


class TimeModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The parts of an iteration, each over all layers. ``head`` and ``attention``: None for an embedding model.

    token: whatever works token by token, by the tokens in the iteration. head: LM head and sampler, by sequences.
    """

    token: Curve
    head: Curve | None = None
    prefill: Prefill
    attention: Attention | None = None
    overhead_us: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self, ("overhead_us",))
        if min(self.token.us) <= 0:
            raise ValueError("token.us: expected more than 0: no iteration takes no time")

    def law(self) -> IterationTime:
        """In integer picoseconds, as the engine takes it."""
        none = Curve([1], [0.0])
        head, attention = self.head or none, self.attention or Attention([1], [1], [[0.0]], [[0.0]])
        return IterationTime(
            token_knots=tuple(self.token.at),
            token_ps=_row_ps(self.token.us),
            head_knots=tuple(head.at),
            head_ps=_row_ps(head.us),
            attention_seqs=tuple(attention.seqs),
            attention_context=tuple(attention.context),
            decode_ps=tuple(ps for row in attention.decode_us for ps in _row_ps(row)),
            mixed_ps=tuple(ps for row in attention.mixed_us for ps in _row_ps(row)),
            mixed_token=_ns_to_ps(attention.mixed_per_seq_token_ns),
            prefill_knots=tuple(self.prefill.base.at),
            prefill_ps=_row_ps(self.prefill.base.us),
            prefill_pair=_ns_to_ps(self.prefill.per_pair_ns),
            prefill_context=_ns_to_ps(self.prefill.per_context_token_ns),
            overhead=_us_to_ps(self.overhead_us),
        )


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The network: ``parameters`` and ``positions`` (longest context) from its architecture."""

    name: str
    precision: str
    parameters: int
    positions: int


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``count`` equal devices run the model together (tensor parallel). Memory and TDP are of one; None: not known.

    probe_us: the times hold while a probe on the engine's core takes that long (:mod:`sage_bench.core_speed`), and where it takes
    x times as long they are x ** probe_power times as long; of a core of a shared machine alone.
    """

    device: str
    count: int
    memory_gib: float | None = None
    tdp_w: float | None = None
    probe_us: Annotated[float, msgspec.Meta(gt=0)] | None = None
    probe_power: Annotated[float, msgspec.Meta(ge=0)] = 1.0


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model occupies. Weights and KV are totals over all devices, the reserve is per device."""

    weights_bytes: int
    kv_bytes_per_token: int
    reserve_bytes: int
    gpu_memory_utilization: float

    def kv_tokens(self, hardware: Hardware, utilization: float) -> int:
        """floor((devices * (utilization * memory - reserve) - weights) / KV bytes per token); negative: no room.

        The reserve stands for the CUDA context, captured graphs and the activations of the largest step.
        """
        if not self.kv_bytes_per_token or hardware.memory_gib is None:
            return 0
        usable = utilization * hardware.memory_gib * 2**30 - self.reserve_bytes
        return math.floor((hardware.count * usable - self.weights_bytes) / self.kv_bytes_per_token)


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The serving engine whose times these are. Vintage matters as much as the device: never mix versions."""

    name: str
    version: str


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the times come from. ``measured``: whole iterations timed; ``composed``: summed from timed kernels;
    ``roofline``: derived from data sheets, no measurement of this model on this device."""

    kind: Literal["measured", "composed", "roofline"]
    files: list[str]
    origin: list[str]
    licence: str
    date: str
    method: str


class FitError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Error on ``held_out`` iterations of conditions left out of the fit, in per cent of the true time.

    The file itself holds the fit on all conditions; the error is that of the same fit on the ``train`` others.
    """

    train: int
    held_out: int
    mape_pct: float
    ape_pct_p95: float
    bias_pct: float


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Comparison with ``points`` measurements of another origin: profile over measurement."""

    against: str
    points: int
    mape_pct: float
    bias_pct: float
    note: str


class Valid(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the fit has seen; ranges of a phase that was not fitted are None.

    prefill_tokens: new prompt tokens of an iteration. prompt_tokens: of one prompt, cached context included.
    decode_seqs, decode_kv_tokens: sequences of an iteration and their context in all; decode_context: of one sequence.
    """

    prefill_tokens: Range
    prompt_tokens: Range
    decode_seqs: Range | None = None
    decode_kv_tokens: Range | None = None
    decode_context: Range | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One profile file. ``bound_share``: largest share of the device's FLOP or bandwidth limit the fit claims."""

    name: str
    kind: Literal["llm", "embedding"]
    model: Model
    hardware: Hardware
    engine: Engine
    time: TimeModel
    memory: Memory
    valid: Valid
    source: Source
    errors: dict[Phase, FitError]
    bound_share: float | None = None
    checks: list[Check]
    assumptions: list[str]

    def __post_init__(self) -> None:
        parts = {"head": self.time.head, "attention": self.time.attention}
        if self.kind == "embedding" and any(parts.values()):
            raise ValueError("an embedding profile has no time.head and no time.attention; leave them out")
        if self.kind == "llm":
            for name, part in parts.items():
                if part is None:
                    raise ValueError(f"time.{name}: an llm profile needs it")
            for name, value in (
                ("memory.kv_bytes_per_token", self.memory.kv_bytes_per_token),
                ("hardware.memory_gib", self.hardware.memory_gib or 0),
            ):
                if value <= 0:
                    raise ValueError(f"{name}: an llm profile needs a number above 0")

    def iteration_time(self) -> IterationTime:
        """The law, as the engine takes it."""
        return self.time.law()

    @property
    def kv_tokens_max(self) -> int:
        """Tokens the KV cache holds at the profile's ``gpu_memory_utilization``; 0 for an embedding model."""
        return self.kv_tokens()

    def kv_tokens(self, gpu_memory_utilization: float | None = None, *, stages: int = 1) -> int:
        """The same at another utilization, or over ``stages`` times the devices (pipeline parallelism).

        :meth:`Memory.kv_tokens` has the formula. ConfigError when the utilization is not in (0, 1] or the weights alone do not fit.
        """
        if gpu_memory_utilization is None:
            gpu_memory_utilization = self.memory.gpu_memory_utilization
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization: expected above 0 and at most 1, got {gpu_memory_utilization}")
        hardware = msgspec.structs.replace(self.hardware, count=self.hardware.count * stages)
        tokens = self.memory.kv_tokens(hardware, gpu_memory_utilization)
        if self.kind == "llm" and tokens <= 0:
            raise ConfigError(
                f"gpu_memory_utilization: at {gpu_memory_utilization} the weights of {self.model.name} "
                f"({self.memory.weights_bytes / 2**30:.1f} GiB) leave no room for a KV cache on "
                f"{hardware.count} x {hardware.device}; raise it or use more devices"
            )
        return tokens

    def warn_outside(
        self,
        *,
        seqs: int | None = None,
        kv_tokens: int | None = None,
        context: int | None = None,
        prefill_tokens: int | None = None,
        prompt_tokens: int | None = None,
    ) -> list[str]:
        """One message for each value that the fit has not seen; empty when all lie inside. None is not checked.

        Asked twice: with what is configured, before a run, and with the largest values that the run met, after it.
        """
        asked = {
            "decode_seqs": seqs,
            "decode_kv_tokens": kv_tokens,
            "decode_context": context,
            "prefill_tokens": prefill_tokens,
            "prompt_tokens": prompt_tokens,
        }
        messages = []
        for name, value in asked.items():
            seen: Range | None = getattr(self.valid, name)
            if value is None or (seen is not None and seen[0] <= value <= seen[1]):
                continue
            where = "was not fitted" if seen is None else f"was fitted for {seen[0]} to {seen[1]}"
            messages.append(f"profile {self.name}: {name} = {value} is extrapolated; the profile {where}")
        return messages


def _read(path: Path) -> Profile:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(
            f"profile {path}: cannot be read ({reason}); give a profile name or the path of a file"
        ) from error
    try:
        return msgspec.convert(yaml.load(text, _LOADER), Profile)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise DataError(f"profile {path}: not valid YAML{line} ({getattr(error, 'problem', None) or error})") from error
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        key = at.strip("`.") or "the top level"
        raise DataError(f"profile {path}: at {key}: {message}; see docs/profiles.md for the schema") from error


def _check_knots(name: str, knots: list[int]) -> None:
    if not knots or knots[0] < 0 or any(low >= high for low, high in pairwise(knots)):
        raise ValueError(f"{name}: expected whole numbers from 0 that rise, got {knots}")


def _check_times(name: str, rows: list[list[float]], count: int, width: int) -> None:
    if len(rows) != count or any(len(row) != width for row in rows):
        shape = f"{width} times" if count == 1 else f"{count} rows of {width} times"
        raise ValueError(f"{name}: expected {shape}, one for each knot")
    if not all(math.isfinite(time) and time >= 0 for row in rows for time in row):
        raise ValueError(f"{name}: expected finite numbers from 0")


def _check_numbers(struct: msgspec.Struct, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(struct, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number from 0, got {value}")


def _row_ps(row: list[float]) -> tuple[int, ...]:
    return tuple(_us_to_ps(time) for time in row)


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # many times faster where libyaml is there


def _us_to_ps(value: float) -> int:
    return round(value * 1_000_000)


def _ns_to_ps(value: float) -> int:
    return round(value * 1_000)
