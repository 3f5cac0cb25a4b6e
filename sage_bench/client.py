"""The one client: the same verbs against a gateway, against engines without one, and against a simulated cluster.

    with UnifiedInferenceClient.create("http://127.0.0.1:8888/v1") as client:
        print(client.chat("What is the capital of France?").text)

Where there is no gateway the control plane runs in this process, under the policy that is asked for, and can be recorded
and replayed like a gateway's. A simulated cluster is emulated in real time: what its engines say is made up, when they
say it is what their profiles predict. docs/client.md has the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from sage_core.errors import ConfigError
from sage_core.ports import SagePorts, override
from sage_live.client.aio import AsyncVerbs
from sage_live.client.asking import Transport
from sage_live.client.http import HttpTransport
from sage_live.client.loop import Session
from sage_live.client.verbs import Verbs

if TYPE_CHECKING:
    from sage_bench.own_plane import Chosen
    from sage_bench.serving import EngineConfig

API_KEY: Final = "SAGE_API_KEY"
"""Environment variable with the key for a gateway, where ``create`` is given none."""


class UnifiedInferenceClient(Verbs):
    """Chat, generate and embed. Made by :meth:`create`; close it, or use it in a ``with`` statement."""

    def __init__(self) -> None:
        raise TypeError("use UnifiedInferenceClient.create(...), which says what to talk to")

    @classmethod
    def create(
        cls,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        engines: Sequence[EngineConfig | str] | None = None,
        cluster: str | None = None,
        policy: Chosen | None = None,
        slo: Chosen | None = None,
        overrides: Sequence[str] = (),
        record: Path | str | None = None,
        timeout_s: float = 600.0,
        retries: int = 0,
        wait_s: float = 10.0,
    ) -> Self:
        """A client of exactly one of these; of the gateway on this machine's default port if none is given:

        base_url: a gateway's, or another OpenAI-compatible server's, with ``/v1``. api_key: for it; else
        ``SAGE_API_KEY`` from the environment.
        engines: ``URL[,key=value]...`` as on the command line (`sage gateway start --engine`), or EngineConfig.
        cluster: a choice of the group ``cluster``, whose engines are emulated in this process.

        policy, slo, overrides, record and wait_s are for the latter two, which have a control plane of their own:
        overrides are of a run's configuration as for `sage run`; record: a folder for log and rows, complete once the
        client is closed; wait_s: what engines may take to come up.

        timeout_s: from a call to its answer, or between two pieces of a stream. retries: how often a call comes back
        after an answer (429, 503) that says so; 0, so that nothing is hidden from who measures.

        Raises ConfigError and DataError for wrong arguments, EngineError for engines that cannot be reached. A gateway is
        not asked anything yet.
        """
        if sum(each is not None for each in (base_url, engines, cluster)) > 1:
            raise ConfigError("create: expected one of base_url, engines and cluster")
        if engines is None and cluster is None:
            if policy is not None or slo is not None or overrides or record is not None:
                raise ConfigError(
                    "create: policy, slo, overrides and record are the gateway's business; give them to it"
                )
            url = _local_gateway() if base_url is None else base_url
            key = os.environ.get(API_KEY) if api_key is None else api_key

            async def make() -> Transport:
                return HttpTransport(url, key)

        else:
            if api_key is not None:
                raise ConfigError("create: api_key is for a gateway; an engine's is named by its api_key_env")
            from sage_bench.own_plane import own_plane  # most clients need none of what it takes

            plane = own_plane(engines, cluster, policy, slo, overrides, wait_s)
            folder = None if record is None else Path(record)

            async def make() -> Transport:
                return await plane.transport(folder, wait_s, timeout_s)

        client = cls.__new__(cls)
        Verbs.__init__(client, Session(make, timeout_s=timeout_s, retries=retries))
        client._aio = AsyncVerbs(client._session)
        return client

    _aio: AsyncVerbs

    @property
    def aio(self) -> AsyncVerbs:
        """The same verbs for coroutines, on the same connections and the same control plane."""
        return self._aio

    def close(self) -> None:
        """Fail what is underway, end what was started for this client. Closing again does nothing."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _local_gateway() -> str:
    return f"http://127.0.0.1:{override('gateway', os.environ) or SagePorts.GATEWAY_DEFAULT:d}/v1"
