"""A profile: how long one engine step takes for one model on one kind of device, and how well that is known.

A profile is a YAML file of fitted coefficients with their provenance: where the numbers come from, the error on points
the fit has not seen, the range it was fitted on, comparisons with independent measurements, and what is assumed. The
shipped ones lie in ``sage_sim/profiles`` and are made by ``tools/fit_profiles.py``; a path loads a user's own.

Rules kept:

* Units stand in the keys (``decode_base_us``); the conversion to the engine's integer picoseconds happens once, here.
* A broken file is one error that names the file and the key. Unknown keys are errors: a typo may not pass silently.
* Nothing is extrapolated silently: ``warn_outside`` says when a configuration leaves the fitted range.

The step model, with P new prompt tokens, A = sum over prompts of p (context + p/2), and KV = sum of cached tokens::

    decode    decode_base + decode_per_seq * seqs + decode_per_kv_token * KV
    prefill   max(prefill_floor, prefill_base + prefill_per_token * P + prefill_per_token2 * A)
    mixed     prefill + (decode_per_seq * seqs + decode_per_kv_token * KV) * mixed_permille / 1000
    embedding the prefill form over the batch's tokens

and ``overhead`` is added to each.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

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


class TimeModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The coefficients in human units: us for fixed and per-item terms, ns per cached token and per token pair."""

    decode_base_us: float = 0.0
    decode_per_seq_us: float = 0.0
    decode_per_kv_token_ns: float = 0.0
    prefill_floor_us: float
    prefill_base_us: float
    prefill_per_token_us: float
    prefill_per_token2_ns: float
    mixed_permille: int = 1000
    overhead_us: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number from 0, got {value}")

    def decode_us(self, seqs: ArrayLike, kv: ArrayLike) -> NDArray[np.float64]:
        """Decode steps of ``seqs`` sequences over ``kv`` cached tokens in all, without overhead; broadcasts."""
        return self.decode_base_us + self._beside_us(seqs, kv)

    def prefill_us(self, tokens: ArrayLike, pairs: ArrayLike) -> NDArray[np.float64]:
        """Prefill steps (or embedding batches) of ``tokens`` P and ``pairs`` A, without overhead; broadcasts."""
        line = self.prefill_base_us + self.prefill_per_token_us * np.asarray(tokens, dtype=np.float64)
        line = line + self.prefill_per_token2_ns * np.asarray(pairs, dtype=np.float64) / 1e3
        return np.maximum(self.prefill_floor_us, line)

    def step_us(self, tokens: ArrayLike, pairs: ArrayLike, seqs: ArrayLike, kv: ArrayLike) -> NDArray[np.float64]:
        """Any step, overhead included: mixed where there are both prompt tokens and decoding sequences."""
        mixed = self.prefill_us(tokens, pairs) + self._beside_us(seqs, kv) * self.mixed_permille / 1000
        return np.where(np.asarray(tokens) > 0, mixed, self.decode_us(seqs, kv)) + self.overhead_us

    def _beside_us(self, seqs: ArrayLike, kv: ArrayLike) -> NDArray[np.float64]:
        per_kv = self.decode_per_kv_token_ns * np.asarray(kv, dtype=np.float64) / 1e3
        return np.asarray(self.decode_per_seq_us * np.asarray(seqs, dtype=np.float64) + per_kv)


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The network: ``parameters`` and ``positions`` (longest context) from its architecture."""

    name: str
    precision: str
    parameters: int
    positions: int


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``count`` equal devices run the model together (tensor parallel). Memory and TDP are of one; None: not known."""

    device: str
    count: int
    memory_gib: float | None = None
    tdp_w: float | None = None


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
    """Where the times come from. ``measured``: whole steps timed; ``composed``: summed from timed kernels."""

    kind: Literal["measured", "composed"]
    files: list[str]
    origin: list[str]
    licence: str
    date: str
    method: str


class FitError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Error of the fit on ``held_out`` points of conditions it was not fitted on, in per cent of the true time."""

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
    """What the fit has seen; ranges of a phase that was not fitted are None."""

    prefill_tokens: Range
    prompt_tokens: Range
    decode_seqs: Range | None = None
    decode_kv_tokens: Range | None = None


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
        if self.time.prefill_per_token_us <= 0:
            raise ValueError("time.prefill_per_token_us: expected more than 0")
        if self.kind == "embedding" and self.time.decode_us(1, 1) > 0:
            raise ValueError("an embedding profile has no decode_* times; leave them out")
        if self.kind == "llm":
            for name, value in (
                ("time.decode_base_us", self.time.decode_base_us),
                ("memory.kv_bytes_per_token", self.memory.kv_bytes_per_token),
                ("hardware.memory_gib", self.hardware.memory_gib or 0),
            ):
                if value <= 0:
                    raise ValueError(f"{name}: an llm profile needs a number above 0")

    def iteration_time(self) -> IterationTime:
        """The coefficients in integer picoseconds, as the engine takes them."""
        time = self.time
        return IterationTime(
            # An embedding engine never decodes; the engine still asks for a base of at least 1 ps.
            decode_base=max(1, _us_to_ps(time.decode_base_us)),
            decode_seq=_us_to_ps(time.decode_per_seq_us),
            decode_kv=_ns_to_ps(time.decode_per_kv_token_ns),
            prefill_floor=_us_to_ps(time.prefill_floor_us),
            prefill_base=_us_to_ps(time.prefill_base_us),
            prefill_token=_us_to_ps(time.prefill_per_token_us),
            prefill_attn=_ns_to_ps(time.prefill_per_token2_ns),
            mixed_permille=time.mixed_permille,
            overhead=_us_to_ps(time.overhead_us),
        )

    @property
    def kv_tokens_max(self) -> int:
        """Tokens the KV cache holds at the profile's ``gpu_memory_utilization``; 0 for an embedding model."""
        return self.kv_tokens(self.memory.gpu_memory_utilization)

    def kv_tokens(self, gpu_memory_utilization: float) -> int:
        """The same at another utilization (:meth:`Memory.kv_tokens` has the formula).

        ConfigError when the utilization is not in (0, 1] or the weights alone do not fit.
        """
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization: expected above 0 and at most 1, got {gpu_memory_utilization}")
        tokens = self.memory.kv_tokens(self.hardware, gpu_memory_utilization)
        if self.kind == "llm" and tokens <= 0:
            raise ConfigError(
                f"gpu_memory_utilization: at {gpu_memory_utilization} the weights of {self.model.name} "
                f"({self.memory.weights_bytes / 2**30:.1f} GiB) leave no room for a KV cache on "
                f"{self.hardware.count} x {self.hardware.device}; raise it or use more devices"
            )
        return tokens

    def warn_outside(
        self,
        *,
        seqs: int | None = None,
        kv_tokens: int | None = None,
        prefill_tokens: int | None = None,
        prompt_tokens: int | None = None,
    ) -> list[str]:
        """One message for each value that the fit has not seen; empty when all lie inside. None is not checked."""
        asked = {
            "decode_seqs": seqs,
            "decode_kv_tokens": kv_tokens,
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
        return msgspec.convert(yaml.safe_load(text), Profile)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise DataError(f"profile {path}: not valid YAML{line} ({getattr(error, 'problem', None) or error})") from error
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        key = at.strip("`.") or "the top level"
        raise DataError(f"profile {path}: at {key}: {message}; see docs/profiles.md for the schema") from error


def _us_to_ps(value: float) -> int:
    return round(value * 1_000_000)


def _ns_to_ps(value: float) -> int:
    return round(value * 1_000)
