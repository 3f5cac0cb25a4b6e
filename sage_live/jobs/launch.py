"""How an engine of a job is started, wherever that will be."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import msgspec

from sage_live.processes import START_TIMEOUT_S


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Plain data, because it crosses machines.

    service: whose ports it gets (sage_core.ports). model: what clients ask for. adapter: how a gateway is to speak to it
    (sage_live.adapters). command: its words; one that is exactly ``{python}``, ``{host}`` or ``{port}`` is replaced where it
    runs. env: on top of what is there. health: the path that answers 200 once it serves. start_timeout_s: until then.
    """

    service: str
    model: str
    adapter: str = "vllm"
    command: tuple[str, ...]
    env: dict[str, str] = {}
    health: str = "/health"
    start_timeout_s: float = START_TIMEOUT_S

    def words(self, host: str, port: int) -> list[str]:
        """The command for this machine."""
        here = {"{python}": sys.executable, "{host}": host, "{port}": str(port)}
        return [here.get(word, word) for word in self.command]

    def environment(self, gpus: Sequence[int]) -> dict[str, str]:
        """``env``, and the GPUs that it may see; none where it was given none. They are counted among those that this process
        may use, where that is said."""
        ours = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
        seen = [ours[gpu] if gpu < len(ours) else str(gpu) for gpu in gpus]
        return {"CUDA_VISIBLE_DEVICES": ",".join(seen), **self.env}
