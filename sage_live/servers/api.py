"""What every engine server of ours does with a request before it knows what is asked: routes, and errors as OpenAI's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec

from sage_live.errors import TYPES, ApiError, method_not_allowed, not_found
from sage_live.http.server import Request

Endpoint: TypeAlias = Callable[[Request], None]


class Api:
    """A handler for :class:`sage_live.http.server.HttpServer`. ``routes``: path to method to endpoint; an endpoint raises
    ApiError to refuse."""

    def __init__(self, routes: Mapping[str, Mapping[str, Endpoint]]) -> None:
        self._routes = routes

    def __call__(self, request: Request) -> None:
        try:
            methods = self._routes.get(request.path)
            if methods is None:
                raise not_found(request.path)
            endpoint = methods.get(request.method)
            if endpoint is None:
                raise method_not_allowed(request.method, [*methods])
            endpoint(request)
        except ApiError as error:
            refuse(request, error)


def refuse(request: Request, error: ApiError) -> None:
    """Answer with the error, if there is anybody to answer."""
    if not request.started:
        request.respond(error.status, error.body(), headers=error.headers())


def error_body(status: int, message: str) -> bytes:
    """For errors below the API: malformed HTTP, bodies too large."""
    return ApiError(status if status in TYPES else 400, message).body()


def models_list(models: Mapping[str, int | None], created: int) -> bytes:
    """The answer to ``GET /v1/models``; models by name with ``max_model_len`` as vLLM states it (None: not stated)."""
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "sage", "root": name, "max_model_len": length}
        for name, length in models.items()
    ]
    return msgspec.json.encode({"object": "list", "data": data})
