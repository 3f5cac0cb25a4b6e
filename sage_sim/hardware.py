"""Facts about devices, and what they draw: power by utilisation, list price.

The facts lie in ``hardware.yaml`` beside this file, each with its source; the keys are the device names of the profiles
(``profile.hardware.device``). What is not known is None, and so is everything computed from it: energy is never
guessed silently.

The power of one device::

    P = TDP * (idle + (prefill - idle) * share prefilling + (decode - idle) * share decoding)

with the shares of wall time; a mixed iteration counts as prefilling. Measured on A100s, power while decoding hardly
moves with the batch (0.40 to 0.46 of TDP from 1 to 16 sequences on eight of them), so one number a phase is enough.
What tensor parallelism does is not in the form: of A100s that decode together, two draw 0.69 of TDP each, eight 0.41.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from sage_core.errors import DataError

FACTS = Path(__file__).parent / "hardware.yaml"


class Power(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fractions of TDP: with a model loaded and nothing to do, while prefilling, while decoding.

    ``measured``: the busy fractions are of this device; otherwise they are taken over from another, as ``source`` says.
    """

    idle: float
    prefill: float
    decode: float
    measured: bool = False
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.idle <= min(self.prefill, self.decode) <= max(self.prefill, self.decode) <= 1:
            raise ValueError(
                f"expected 0 <= idle <= prefill, decode <= 1, got {self.idle}, {self.prefill}, {self.decode}"
            )


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """List price of one device, with the host it comes with, in US dollars per hour."""

    usd_per_hour: float
    sku: str
    date: str
    source: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.usd_per_hour) and self.usd_per_hour > 0):
            raise ValueError(f"usd_per_hour: expected a finite number above 0, got {self.usd_per_hour}")


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device. ``link_gb_s``: to its neighbours, one direction. None: not known (or not there, as FP8 on an A100)."""

    kind: Literal["gpu", "cpu"]
    memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None
    link_gb_s: float | None = None
    tdp_w: float | None = None
    source: str
    power: Power | None = None
    price: Price | None = None

    def __post_init__(self) -> None:
        for name in ("memory_gib", "bandwidth_gb_s", "bf16_tflops", "fp8_tflops", "link_gb_s", "tdp_w"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")

    @property
    def idle_w(self) -> float | None:
        """Watts with a model loaded and nothing to do."""
        return self.tdp_w * self.power.idle if self.tdp_w and self.power else None

    @property
    def prefill_w(self) -> float | None:
        """Watts while prefilling."""
        return self.tdp_w * self.power.prefill if self.tdp_w and self.power else None

    @property
    def decode_w(self) -> float | None:
        """Watts while decoding."""
        return self.tdp_w * self.power.decode if self.tdp_w and self.power else None


def facts(device: str) -> DeviceFacts | None:
    """What is known about ``device``; None when nothing is."""
    return device_facts().get(device)


@cache
def device_facts(path: Path = FACTS) -> dict[str, DeviceFacts]:
    """All devices of a facts file by name; DataError names the file and the key that is wrong."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), dict[str, DeviceFacts])
    except OSError as error:
        raise DataError(f"hardware facts {path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise DataError(f"hardware facts {path}: not valid YAML{line}") from error
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        raise DataError(f"hardware facts {path}: at {at.strip('`.') or 'the top level'}: {message}") from error
