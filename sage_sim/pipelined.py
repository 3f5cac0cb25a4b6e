"""Pipeline parallelism: the layers of one model over several stages, shown to the control plane as one replica.

vLLM keeps as many batches in flight as there are stages, so the running sequences fall into that many groups, of which
each stage works on another one at any time. The model, for p stages:

* A group's iteration passes through all stages one after another. It takes what the whole model takes for the group's
  batch on the devices of one stage, and p - 1 hops between stages.
* The groups do not wait for one another: stages are taken to be equally long and their batches alike. Where one group
  prefills while others decode, the others do wait in reality (pipeline bubbles), so this is a lower bound there.
* Sequences, KV blocks and arriving tasks are split evenly: a group has 1/p of ``max_num_seqs`` and of the blocks, and a
  task goes to the group with the fewest tokens given to it and not done, the first of equals. The token budget is that
  of each batch.

So a replica of p stages is p engines, each with the law of one stage's devices and a share of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sage_core.backend import ContentsOf, OutputTokens
from sage_core.commands import AnyCommand, Cancel, Dispatch, Task
from sage_core.errors import ConfigError, IllegalEvent
from sage_core.events import AnyEvent, ReplicaJoined, ReplicaReported, TaskFailed, TaskFinished
from sage_core.units import Nanos
from sage_sim.engine import LlmReplica, ReplicaUsage, SimulatedDevice
from sage_sim.engine_reference import Seen


class PipelinedDevice:
    """A BackendModel (sage_core.backend) of one LLM replica of ``stages`` stages.

    llm: the replica as a whole; its law is that of the whole model on the devices of one stage. hop_ns: from one stage to
    the next. Other arguments as for :class:`sage_sim.engine.SimulatedDevice`. Raises ConfigError.
    """

    def __init__(
        self,
        device: int,
        node: str,
        llm: LlmReplica,
        stages: int,
        hop_ns: int,
        output_tokens: OutputTokens,
        reference: bool = False,
        contents: ContentsOf | None = None,
    ) -> None:
        if stages < 1 or llm.kv_blocks < stages or llm.max_num_seqs < stages:
            raise ConfigError(
                f"pipeline_parallel of replica {llm.replica}: expected 1 to {min(llm.kv_blocks, llm.max_num_seqs)} (each stage "
                f"needs a sequence and a KV block), got {stages}"
            )
        law = replace(llm.time, overhead=llm.time.overhead + (stages - 1) * hop_ns * 1000)
        group = replace(llm, time=law, max_num_seqs=llm.max_num_seqs // stages, kv_blocks=llm.kv_blocks // stages)
        self._groups = [
            SimulatedDevice(device, node, group, None, output_tokens, reference, contents) for _ in range(stages)
        ]
        self._replica = llm.replica
        self._given = [0] * stages  # tokens of tasks not done, by group
        self._group_of: dict[int, tuple[int, int]] = {}  # task -> group, its tokens

    def joined(self) -> list[ReplicaJoined]:
        """What the replica says when it becomes healthy: the speed of a group, the room of all."""
        (one,) = self._groups[0].joined()
        stages = len(self._groups)
        whole = {name: getattr(one, name) * stages for name in ("tasks_max", "batch_tokens_max", "kv_tokens_max")}
        fields = {name: getattr(one, name) for name in one.__struct_fields__}
        return [ReplicaJoined(**{**fields, **whole})]

    def step(self, now: Nanos, commands: Sequence[AnyCommand]) -> list[AnyEvent]:
        """Advance to ``now``, apply ``commands``, return what the plane should know, in the order of the groups."""
        told = [event for group in self._groups for event in group.step(now, ())]
        for command in commands:
            if isinstance(command, Dispatch) and command.replica == self._replica:
                for task in command.tasks:
                    told += self._groups[self._give(task)].step(now, (Dispatch(self._replica, (task,)),))
            elif isinstance(command, Cancel) and command.replica == self._replica:
                if command.task in self._group_of:
                    told += self._groups[self._group_of[command.task][0]].step(now, (command,))
                    self._done(command.task)
            else:
                raise IllegalEvent(f"pipeline: {type(command).__name__} is not for replica {self._replica}")
        for event in told:
            if isinstance(event, TaskFinished | TaskFailed):
                self._done(event.task)
        return told

    @property
    def wakeup_at(self) -> Nanos:
        """Next instant at which something visible happens if no command comes; ``NEVER`` when idle."""
        return min(group.wakeup_at for group in self._groups)

    def report(self, now: Nanos) -> list[ReplicaReported]:
        """Load as the engine itself would publish it at ``now``."""
        reports = [report for group in self._groups for report in group.report(now)]
        running, waiting, free = (
            sum(getattr(report, name) for report in reports) for name in ("running", "waiting", "kv_blocks_free")
        )
        return [ReplicaReported(self._replica, running, waiting, free)]

    def usage(self, now: Nanos) -> list[ReplicaUsage]:
        """Sums over the groups: with p groups at work the replica is busy p seconds a second."""
        of = [usage for group in self._groups for usage in group.usage(now)]
        sums = {
            name: sum(getattr(usage, name) for usage in of)
            for name in ReplicaUsage._fields
            if name not in ("replica", "seen")
        }
        seen = Seen(*map(max, zip(*(usage.seen for usage in of), strict=True)))
        return [ReplicaUsage(self._replica, seen=seen, **sums)]

    def itl_samples(self) -> dict[int, int]:
        """Inter-token latencies, by bucket."""
        samples: dict[int, int] = {}
        for group in self._groups:
            for edge, count in group.itl_samples().items():
                samples[edge] = samples.get(edge, 0) + count
        return samples

    def startup_ns(self) -> int:
        """From start to healthy."""
        return self._groups[0].startup_ns()

    def _give(self, task: Task) -> int:
        group = min(range(len(self._given)), key=self._given.__getitem__)
        tokens = task.input_tokens + task.output_tokens_max
        self._given[group] += tokens
        self._group_of[task.task] = (group, tokens)
        return group

    def _done(self, task: int) -> None:
        group, tokens = self._group_of.pop(task)
        self._given[group] -= tokens
