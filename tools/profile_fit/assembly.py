"""A model on its devices, fitted: from kernel times or whole iterations to the profile's sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from profile_fit.architecture import GIB, Architecture, Device, Precision
from profile_fit.fit import Limits, Parts, check_bounds, fit_iterations, fit_parts, fitting
from profile_fit.steps import Floats, Steps
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
    """Times with what is known about them."""

    time: TimeModel
    errors: dict[Phase, FitError]
    valid: Valid
    bound_share: float

    @classmethod
    def of(cls, name: str, setup: Setup, parts: Parts) -> Fitted:
        """Fit kernel times; BoundError when the result beats the hardware at any point."""
        encoder = parts.head is None
        kv_tokens_max = 2**62 if encoder else setup.kv_tokens_max
        time, errors = fit_parts(name, parts, kv_tokens_max)
        iterations = [parts.iterations(fitting(steps, kv_tokens_max)) for steps in parts.phases().values()]
        return cls._checked(setup, time, errors, iterations, parts.prompts, embedding=encoder)

    @classmethod
    def of_iterations(cls, name: str, setup: Setup, decode: Steps, prefill: Steps) -> Fitted:
        """Fit whole iterations, of which no prompt had cached context; BoundError as above."""
        time, errors = fit_iterations(name, decode, prefill, setup.limits)
        prompts = span(prefill.tokens / prefill.chunks)
        return cls._checked(setup, time, errors, [decode, prefill], prompts, embedding=False)

    @classmethod
    def _checked(
        cls,
        setup: Setup,
        time: TimeModel,
        errors: dict[Phase, FitError],
        iterations: list[Steps],
        prompts: tuple[int, int],
        *,
        embedding: bool,
    ) -> Fitted:
        law = time.law()
        share = max(check_bounds(law, steps, setup.limits, embedding=embedding) for steps in iterations)
        decoding = [steps for steps in iterations if len(steps) and not steps.tokens.any()]
        new = [steps.tokens for steps in iterations if len(steps) and steps.tokens.any()]
        valid = Valid(
            prefill_tokens=span(np.concatenate(new)),
            prompt_tokens=prompts,
            decode_seqs=span(decoding[0].seqs) if decoding else None,
            decode_kv_tokens=span(decoding[0].kv) if decoding else None,
            decode_context=span(decoding[0].kv / decoding[0].seqs) if decoding else None,
        )
        return cls(time, errors, valid, round(share, 3))


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
