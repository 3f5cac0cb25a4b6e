"""``/v1/management/*``: engines in and out of service, the policy, the queue, the configuration."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec

from sage_core.errors import ConfigError
from sage_core.units import PoolKind
from sage_live import errors
from sage_live.errors import ApiError
from sage_live.gateway.bodies import decode_engine, decode_policy
from sage_live.health import Watch
from sage_live.http.server import Request
from sage_live.http_engine import EngineSpec

if TYPE_CHECKING:
    from sage_live.gateway.app import Gateway

PREFIX: Final = "/v1/management/"

_encode = msgspec.json.Encoder().encode
_log = logging.getLogger(__name__)


class Management:
    """Answers for a gateway. Who may ask has been checked."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._service = gateway.service

    async def handle(self, request: Request) -> None:
        """One request below :data:`PREFIX`."""
        try:
            status, told = await self._answer(request)
        except ApiError as error:
            self._gateway.refuse(request, error)
        except Exception:  # this is a Task: nobody else would hear of it, least of all the client
            _log.exception("%s %s: the handler failed", request.method, request.path)
            self._gateway.refuse(request, errors.internal())
        else:
            request.respond(status, b"" if told is None else _encode(told))

    async def _answer(self, request: Request) -> tuple[int, Any]:
        method = "GET" if request.method == "HEAD" else request.method
        match request.path.removeprefix(PREFIX).split("/"):
            case ["engines"] if method == "GET":
                return 200, {"object": "list", "data": [_engine(watch) for watch in self._service.watches.values()]}
            case ["engines"] if method == "POST":
                return 201, self._add(request.body)
            case ["engines"]:
                raise errors.method_not_allowed(request.method, ["GET", "POST"])
            case ["engines", name] if method == "GET":
                return 200, _engine(self._watch(name))
            case ["engines", name] if method == "DELETE":
                self._watch(name)
                await self._service.remove_engine(name, drain="force=true" not in request.query.split("&"))
                return 204, None
            case ["engines", _]:
                raise errors.method_not_allowed(request.method, ["GET", "DELETE"])
            case ["engines", name, "drain"] if method == "POST":
                watch = self._watch(name)
                watch.drain()
                return 202, _engine(watch)
            case ["engines", name, "resume"] if method == "POST":
                watch = self._watch(name)
                watch.resume()
                return 202, _engine(watch)
            case ["engines", _, "drain" | "resume"]:
                raise errors.method_not_allowed(request.method, ["POST"])
            case ["policy"] if method == "GET":
                return 200, self._policy()
            case ["policy"] if method == "PUT":
                name = decode_policy(request.body).name
                if name not in self._gateway.policies:
                    known = ", ".join(self._gateway.policies)
                    raise errors.bad_request(f"name: unknown policy {name!r}; known: {known}.", param="name")
                self._service.set_policy(name)
                return 200, self._policy()
            case ["policy"]:
                raise errors.method_not_allowed(request.method, ["GET", "PUT"])
            case ["queue"] if method == "GET":
                return 200, self._queue()
            case ["config"] if method == "GET":
                return 200, self._gateway.settings
            case ["queue" | "config"]:
                raise errors.method_not_allowed(request.method, ["GET"])
            case _:
                raise errors.not_found(request.path)

    def _watch(self, name: str) -> Watch:
        watch = self._service.watches.get(name)
        if watch is None:
            raise errors.not_found(f"engine {name}")
        return watch

    def _add(self, body: bytes) -> dict[str, Any]:
        wanted = decode_engine(body)
        try:
            spec = EngineSpec(
                wanted.url,
                wanted.model,
                PoolKind.EMBEDDING if wanted.kind == "embedding" else PoolKind.LLM,
                wanted.adapter,
                wanted.name or "",
                tasks_max=wanted.tasks_max or (32 if wanted.kind == "embedding" else 256),
            )
            return _engine(self._service.add_engine(spec))
        except (ConfigError, ValueError) as error:
            if "in service already" in str(error):
                raise errors.conflict(str(error)) from None
            raise errors.bad_request(str(error)) from None

    def _policy(self) -> dict[str, Any]:
        return {"name": self._service.policy, "known": list(self._gateway.policies)}

    def _queue(self) -> dict[str, Any]:
        driver = self._service.driver
        counts = driver.plane.counts
        return {
            "queued": driver.plane.tasks_queued,
            "live": driver.live,
            "in_flight": sum(len(watch.engine.flights) for watch in self._service.watches.values()),
            "steps": driver.steps,
            "counts": {name: getattr(counts, name) for name in counts.__dataclass_fields__},
        }


def _engine(watch: Watch) -> dict[str, Any]:
    engine = watch.engine
    return {
        "name": engine.name,
        "url": engine.spec.url,
        "model": engine.spec.model,
        "kind": "embedding" if engine.spec.kind is PoolKind.EMBEDDING else "llm",
        "adapter": engine.spec.adapter,
        "state": watch.state.value,
        "why": watch.why,
        "replica": engine.replica if engine.replica >= 0 else None,
        "in_flight": len(engine.flights),
        "served": engine.served,
        "ejections": watch.ejections,
        "reported": dict(watch.reported),
    }
