"""One GPU for an LLM engine and an embedding engine by NVIDIA MPS, each with a fixed share of the multiprocessors.

Both run at once, each as slow as its share makes it (``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE``). The model, for an engine
with a share s of the multiprocessors:

* Work bound by computation takes 1 / s of its time alone. That is prefill attention, and the part of the work token by
  token that grows with the tokens, at its rate at the largest knot.
* Work bound by memory bandwidth needs only some multiprocessors to saturate the memory, a share b of them: it takes
  max(1, b / s) of its time alone. That is decode attention, and whatever work token by token takes more than its
  computation.
* The CPU's overhead stays.

What the two take from each other besides multiprocessors (memory bandwidth, L2 cache) is not in it, so it is a lower
bound where both are bound by bandwidth; time slicing (an LLM and an embedding engine in one
:class:`sage_sim.engine.SimulatedDevice`) is the other extreme. b is a property of the device: there is no default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from sage_core.commands import AnyCommand, Cancel, Dispatch
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent, ReplicaJoined, ReplicaReported
from sage_core.units import Nanos
from sage_sim.engine import ReplicaUsage, SimulatedDevice
from sage_sim.iteration import IterationTime


def shared(law: IterationTime, share: float, saturation: float) -> IterationTime:
    """The law of an engine that has ``share`` of the multiprocessors, of which ``saturation`` saturate the memory.

    Both above 0 and at most 1. Raises ConfigError.
    """
    for name, value in (("share", share), ("saturation", saturation)):
        if not 0 < value <= 1:
            raise ConfigError(f"MPS: {name}: expected above 0 and at most 1, got {value!r}")
    computing = 1 / Fraction(share)
    reading = max(Fraction(1), Fraction(saturation) / Fraction(share))

    def by_token(knots: Sequence[int], times: Sequence[int]) -> tuple[int, ...]:
        rate = Fraction(times[-1], max(1, knots[-1]))
        return tuple(
            round(max(time * reading, min(Fraction(time), knot * rate) * computing))
            for knot, time in zip(knots, times, strict=True)
        )

    def scaled(times: Sequence[int], by: Fraction) -> tuple[int, ...]:
        return tuple(round(time * by) for time in times)

    return replace(
        law,
        token_ps=by_token(law.token_knots, law.token_ps),
        head_ps=by_token(law.head_knots, law.head_ps),
        decode_ps=scaled(law.decode_ps, reading),
        mixed_ps=scaled(law.mixed_ps, computing),
        mixed_token=round(law.mixed_token * computing),
        prefill_ps=scaled(law.prefill_ps, computing),
        prefill_pair=round(law.prefill_pair * computing),
        prefill_context=round(law.prefill_context * computing),
    )


class MpsDevice:
    """A BackendModel (sage_core.backend): engines that run side by side on one device, none waiting for another.

    engines: their laws are those of :func:`shared`, and their shares add up to 1 at most, which is the caller's to see
    to. They bear the same device number. What happens at one instant is told in their order.
    """

    def __init__(self, engines: Sequence[SimulatedDevice]) -> None:
        self._engines = list(engines)
        self._engine_of: dict[int, SimulatedDevice] = {}
        for engine in self._engines:
            for replica in engine.replicas:
                if replica is not None and self._engine_of.setdefault(replica, engine) is not engine:
                    raise ConfigError(f"MPS: two replicas of one device have the id {replica}")

    def joined(self) -> list[ReplicaJoined]:
        """What each replica says when it becomes healthy."""
        return [joined for engine in self._engines for joined in engine.joined()]

    def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[AnyEvent]:
        """Advance to ``now``, apply ``commands``, return what the plane should know, in the order it happened."""
        told = [event for engine in self._engines for event in engine.step(now, ())]
        for command in commands:
            if not isinstance(command, Dispatch | Cancel) or command.replica not in self._engine_of:
                raise IllegalEvent(f"MPS: {type(command).__name__} is not for a replica of this device")
            told += self._engine_of[command.replica].step(now, [command])
        return told

    @property
    def wakeup_at(self) -> Nanos:
        """Next instant at which something visible happens if no command comes; ``NEVER`` when idle."""
        return min(engine.wakeup_at for engine in self._engines)

    def report(self, now: Nanos) -> list[ReplicaReported]:
        """Load as the engines themselves would publish it at ``now``."""
        return [report for engine in self._engines for report in engine.report(now)]

    def usage(self, now: Nanos) -> list[ReplicaUsage]:
        """What each replica has done up to ``now``. Busy times overlap."""
        return [usage for engine in self._engines for usage in engine.usage(now)]

    def itl_samples(self) -> dict[int, int]:
        """Inter-token latencies of the LLM engine (of all, where there are several), by bucket."""
        samples: dict[int, int] = {}
        for engine in self._engines:
            for edge, count in engine.itl_samples().items():
                samples[edge] = samples.get(edge, 0) + count
        return samples

    def startup_ns(self) -> int:
        """From start to healthy, all of them."""
        return max(engine.startup_ns() for engine in self._engines)

    def crash(self, now: Nanos) -> None:
        """Drop everything; nothing is told. The driver says that the replicas left."""
        for engine in self._engines:
            engine.crash(now)
