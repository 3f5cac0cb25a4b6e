"""A model on its devices, fitted: from steps to the profile's sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from profile_fit.architecture import GIB, Architecture, Device, Precision
from profile_fit.fit import Limits, Phases, check_bounds, fit_model
from profile_fit.steps import Floats
from sage_sim.profile import (
    Check,
    Engine,
    FitError,
    Hardware,
    Memory,
    Model,
    Phase,
    Profile,
    Source,
    TimeModel,
    Valid,
)

UTILIZATION = 0.9


@dataclass(frozen=True)
class Setup:
    """A model on its devices."""

    arch: Architecture
    device: Device
    precision: Precision
    tp: int

    @property
    def limits(self) -> Limits:
        """What the hardware needs at least."""
        return Limits.of(self.arch, self.device, self.precision, self.tp)

    @property
    def kv_tokens_max(self) -> int:
        """Cached tokens that fit at ``UTILIZATION``."""
        return self.memory().kv_tokens(self.hardware(), UTILIZATION)

    def model(self) -> Model:
        """As the profile states it."""
        return Model(self.arch.name, self.precision.name, self.arch.parameters, self.arch.positions)

    def hardware(self) -> Hardware:
        """As the profile states it."""
        return Hardware(self.device.name, self.tp, self.device.memory_gib, self.device.tdp_w)

    def memory(self) -> Memory:
        """Sizes from the architecture.

        Reserve of a device: 1 GiB for context and graphs; activations of the largest step (MLP gate, up and product,
        four hidden states; 8,192 tokens on GPUs of 70 GiB and more, else 2,048, as vLLM's defaults are); and the
        logits of 256 sequences in FP32, twice.
        """
        tokens = 8192 if self.device.memory_gib >= 70 else 2048
        activations = tokens * (3 * self.arch.intermediate // self.tp + 4 * self.arch.hidden) * 2
        logits = 256 * self.arch.vocab * 4 * 2 if self.arch.decoder else 0
        return Memory(
            weights_bytes=self.arch.parameters * self.precision.weight_bytes,
            kv_bytes_per_token=self.arch.kv_bytes_per_token(self.precision.kv_bytes),
            reserve_bytes=GIB + activations + logits,
            gpu_memory_utilization=UTILIZATION,
        )


@dataclass(frozen=True)
class Fitted:
    """Coefficients with what is known about them."""

    time: TimeModel
    errors: dict[Phase, FitError]
    valid: Valid
    bound_share: float

    @classmethod
    def of(cls, name: str, setup: Setup, phases: Phases) -> Fitted:
        """Fit ``phases``; BoundError when the result beats the hardware at any fitted or held-out point."""
        time, errors = fit_model(name, phases, setup.limits)
        share = max(check_bounds(time, steps, setup.limits) for steps in phases.present().values())
        return cls(
            time,
            errors,
            Valid(
                prefill_tokens=span(phases.prefill.tokens),
                prompt_tokens=phases.prompts,
                decode_seqs=span(phases.decode.seqs) if len(phases.decode) else None,
                decode_kv_tokens=span(phases.decode.kv) if len(phases.decode) else None,
            ),
            round(share, 3),
        )


def assemble(
    name: str,
    kind: Literal["llm", "embedding"],
    setup: Setup,
    engine: Engine,
    fitted: Fitted,
    source: Source,
    compared: list[Check],
    assumptions: list[str],
) -> Profile:
    """The profile file's contents."""
    return Profile(
        name=name,
        kind=kind,
        model=setup.model(),
        hardware=setup.hardware(),
        engine=engine,
        time=fitted.time,
        memory=setup.memory(),
        valid=fitted.valid,
        source=source,
        errors=fitted.errors,
        bound_share=fitted.bound_share,
        checks=compared,
        assumptions=assumptions,
    )


def span(values: Floats) -> tuple[int, int]:
    """Smallest and largest."""
    return int(values.min()), int(values.max())
