"""The gateway's OpenAPI 3.1 document, served at ``/openapi.json``.

Bodies of requests are drawn from the structs that check them (``bodies.py``). Answers of engines pass the gateway as they
are, so their schemas say what every OpenAI-compatible engine sends and leave room for more.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from sage_live.errors import TYPES
from sage_live.gateway import bodies

Json = dict[str, Any]

_REASONS: Final = {
    400: "The body or a header is not what is documented; `param` names the field.",
    401: "No API key, or none that is known.",
    403: "The key may not do this.",
    404: "No such model, engine or path.",
    405: "Another method; `allow` lists those that work.",
    408: "The request did not arrive in time.",
    409: "An engine of this name is in service already.",
    413: "The body is larger than the gateway takes.",
    415: "The body is not `application/json`.",
    422: "The engine understood the request and refuses it.",
    429: "Over the tenant's limits, or not admitted; come back after `retry-after`.",
    431: "The headers are larger than the gateway takes.",
    500: "A defect of the gateway, or of the engine.",
    502: "The engine failed, and the request could not be tried elsewhere.",
    503: "Too many live requests, no healthy engine, or shutting down; come back after `retry-after`.",
    504: "The engine did not answer in time.",
}
_TRANSPORT: Final = (400, 408, 413, 431, 500)  # what the HTTP server itself may answer, to anything
_INFERENCE: Final = (400, 401, 404, 408, 413, 415, 422, 429, 431, 500, 502, 503, 504)
_MANAGEMENT: Final = (400, 401, 403, 405, 408, 413, 431, 500)


def document(version: str) -> Json:
    """The whole document. version: of the gateway."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "SAGE gateway",
            "version": version,
            "summary": "One control plane in front of LLM and embedding engines, behind OpenAI's API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}],
        "tags": [{"name": "inference"}, {"name": "observation"}, {"name": "management"}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "parameters": _PARAMETERS,
            "responses": {f"Error{status}": _error(status) for status in sorted(_REASONS)},
            "headers": _HEADERS,
            "schemas": _schemas(),
        },
    }


def _paths() -> Json:
    engine = [{"$ref": "#/components/parameters/engine"}]
    return {
        "/v1/chat/completions": {"post": _inference("createChatCompletion", "Chat", "ChatBody", "ChatCompletion")},
        "/v1/completions": {
            "post": _inference("createCompletion", "Completion of a text", "CompletionBody", "Completion")
        },
        "/v1/embeddings": {"post": _inference("createEmbedding", "Embedding of texts", "EmbeddingBody", "Embeddings")},
        "/v1/models": {"get": _get("listModels", "Models served", "ModelList", "inference", (401,))},
        "/v1/models/{model}": {
            "parameters": [{"$ref": "#/components/parameters/model"}],
            "get": _get("retrieveModel", "One model", "Model", "inference", (401, 404)),
        },
        "/health": {"get": _health()},
        "/metrics": {"get": _metrics()},
        "/openapi.json": {"get": _get("document", "This document", None, "observation")},
        "/v1/management/engines": {
            "get": _manage("listEngines", "Engines in service", "EngineList"),
            "post": _manage("addEngine", "Take an engine into service", "Engine", 201, (409, 415), "EngineBody"),
        },
        "/v1/management/engines/{name}": {
            "parameters": engine,
            "get": _manage("getEngine", "One engine", "Engine", 200, (404,)),
            "delete": {
                **_manage("removeEngine", "Take an engine out, once it has finished what it has", None, 204, (404,)),
                "parameters": [{"$ref": "#/components/parameters/force"}],
            },
        },
        "/v1/management/engines/{name}/drain": {
            "parameters": engine,
            "post": _manage("drainEngine", "Give an engine no more work", "Engine", 202, (404,)),
        },
        "/v1/management/engines/{name}/resume": {
            "parameters": engine,
            "post": _manage("resumeEngine", "Give a drained engine work again", "Engine", 202, (404,)),
        },
        "/v1/management/policy": {
            "get": _manage("getPolicy", "The active policy", "Policy"),
            "put": _manage("setPolicy", "Decide by another policy from now on", "Policy", 200, (415,), "PolicyBody"),
        },
        "/v1/management/queue": {"get": _manage("getQueue", "What waits and what runs", "Queue")},
        "/v1/management/config": {"get": _manage("getConfig", "The gateway's configuration", "Config")},
    }


def _inference(operation: str, summary: str, body: str, answer: str) -> Json:
    content = _json(answer)
    if body != "EmbeddingBody":
        text = (
            "With `stream: true`: `data: {chunk}` events, ended by `data: [DONE]`; an `error` event if it breaks off."
        )
        content |= {"text/event-stream": {"schema": {"type": "string", "description": text}}}
    names = ("request_id", "tenant", "priority", "ttft_ms", "e2e_ms", "input_tokens", "scheduled_ns", "traceparent")
    return {
        "operationId": operation,
        "summary": summary,
        "tags": ["inference"],
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in names],
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {"200": {**_answer(content), "headers": _ANSWER_HEADERS}} | _errors(_INFERENCE),
    }


def _get(operation: str, summary: str, answer: str | None, tag: str, errors: tuple[int, ...] = ()) -> Json:
    content = _json(answer) if answer else {"application/json": {"schema": {"type": "object"}}}
    responses = {"200": _answer(content)} | _errors((*_TRANSPORT, *errors))
    return {"operationId": operation, "summary": summary, "tags": [tag], "responses": responses}


def _manage(
    operation: str,
    summary: str,
    answer: str | None,
    status: int = 200,
    errors: tuple[int, ...] = (),
    body: str | None = None,
) -> Json:
    success = _answer(_json(answer)) if answer else {"description": "Done."}
    described: Json = {
        "operationId": operation,
        "summary": summary,
        "tags": ["management"],
        "responses": {str(status): success} | _errors((*_MANAGEMENT, *errors)),
    }
    if body is not None:
        described["requestBody"] = {"required": True, "content": _json(body)}
    return described


def _health() -> Json:
    described = _get("health", "Whether there is an engine to serve with", "Health", "observation")
    unwell = {"anyOf": [_ref("Health"), _ref("Error")]}
    text = "No engine is healthy, or the gateway is shutting down."
    described["responses"]["503"] = {"description": text, "content": {"application/json": {"schema": unwell}}}
    described["security"] = []
    return described


def _metrics() -> Json:
    described = _get("metrics", "Metrics, for Prometheus", None, "observation")
    described["responses"]["200"] = _answer({"text/plain": {"schema": {"type": "string"}}})
    described["security"] = []
    return described


def _error(status: int) -> Json:
    headers = {"retry-after": {"$ref": "#/components/headers/retry-after"}} if status in (429, 503) else {}
    return {"description": _REASONS[status], "content": _json("Error")} | ({"headers": headers} if headers else {})


def _errors(statuses: tuple[int, ...]) -> Json:
    return {str(status): {"$ref": f"#/components/responses/Error{status}"} for status in sorted(set(statuses))}


def _answer(content: Json) -> Json:
    return {"description": "Done.", "content": content}


def _json(schema: str) -> Json:
    return {"application/json": {"schema": _ref(schema)}}


def _ref(schema: str) -> Json:
    return {"$ref": f"#/components/schemas/{schema}"}


def _schemas() -> Json:
    structs = (
        bodies.ChatBody,
        bodies.CompletionBody,
        bodies.EmbeddingBody,
        bodies.EngineBody,
        bodies.PolicyBody,
    )
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    # msgspec knows one kind of list in a union, so its schema would allow the mixtures that the decoders refuse.
    schemas["CompletionBody"]["properties"]["prompt"] = _text_or_tokens(None)
    schemas["EmbeddingBody"]["properties"]["input"] = _text_or_tokens(bodies.INPUTS_MAX)
    return schemas | _ANSWERS


def _text_or_tokens(items_max: int | None) -> Json:
    token = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    tokens = {"type": "array", "items": token, "minItems": 1}
    bound = {"minItems": 1} if items_max is None else {"minItems": 1, "maxItems": items_max}
    texts = {"type": "array", "items": {"type": "string"}, **bound}
    return {"anyOf": [{"type": "string"}, texts, tokens, {"type": "array", "items": tokens, **bound}]}


def _header(name: str, schema: Json, text: str) -> Json:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


_WHOLE: Final = {"type": "integer", "minimum": 0}
_MILLISECONDS: Final = {"type": "number", "exclusiveMinimum": 0, "maximum": 1e9}

_PARAMETERS: Final[Json] = {
    "request_id": _header(
        "x-request-id", {"type": "string"}, "Comes back with the answer, and stands in logs and traces."
    ),
    "tenant": _header(
        "x-sage-tenant",
        {"type": "string", "pattern": "^[ -~]{1,128}$"},
        "Whom the request counts for; where API keys are used, the key says so and this is ignored.",
    ),
    "priority": _header(
        "x-sage-priority",
        {"type": "integer", "minimum": -1000, "maximum": 1000},
        "0 is interactive; larger is less urgent. A key may bound it.",
    ),
    "ttft_ms": _header("x-sage-ttft-ms", _MILLISECONDS, "Objective: the first token is due so long after arrival."),
    "e2e_ms": _header("x-sage-e2e-ms", _MILLISECONDS, "Objective: the whole answer is due so long after arrival."),
    "input_tokens": _header(
        "x-sage-input-tokens", {**_WHOLE, "maximum": 2**32}, "Length of the prompt, if the client has counted."
    ),
    "scheduled_ns": _header(
        "x-sage-scheduled-ns",
        {**_WHOLE, "maximum": 2**62},
        "When the request was due, on the machine's monotonic clock; for load generators, where the gateway trusts them.",
    ),
    "traceparent": _header("traceparent", {"type": "string"}, "W3C Trace Context; continued where traces are on."),
    "model": {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
        "description": "A model's name; slashes in it may stay as they are.",
    },
    "engine": {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
        "description": "An engine's name, from the list of engines.",
    },
    "force": {
        "name": "force",
        "in": "query",
        "required": False,
        "schema": {"type": "string", "enum": ["true", "false"]},
        "description": "Take it out at once; what it is working on is tried elsewhere or fails.",
    },
}

_HEADERS: Final[Json] = {
    "x-request-id": {"schema": {"type": "string"}, "description": "The client's, or one made by the gateway."},
    "x-sage-request": {
        "schema": {"type": "integer"},
        "description": "The request's number in the results of this run.",
    },
    "retry-after": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."},
}
_ANSWER_HEADERS: Final[Json] = {
    name: {"$ref": f"#/components/headers/{name}"} for name in ("x-request-id", "x-sage-request")
}

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer"}
_NAME_OR_NULL: Final = {"type": ["string", "null"]}


def _object(required: Json, optional: Json | None = None) -> Json:
    return {"type": "object", "required": sorted(required), "properties": required | (optional or {})}


def _list(item: Json) -> Json:
    return {"type": "array", "items": item}


_USAGE: Final = _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}, {"completion_tokens": _COUNT})
_GENERATED: Final[Json] = {"id": _TEXT, "created": _COUNT, "model": _TEXT}
_USAGE_OR_NULL: Final = {"usage": {"anyOf": [_ref("Usage"), {"type": "null"}]}}

_ANSWERS: Final[Json] = {
    "Error": _object(
        {
            "error": _object(
                {"message": _TEXT, "type": _TEXT},
                {"param": _NAME_OR_NULL, "code": {"type": ["string", "integer", "null"]}},
            )
        }
    ),
    "Usage": _USAGE,
    "ChatCompletion": _object(
        {
            **_GENERATED,
            "object": {"const": "chat.completion"},
            "choices": _list(
                _object({"index": _COUNT, "message": {"type": "object"}}, {"finish_reason": _NAME_OR_NULL})
            ),
        },
        _USAGE_OR_NULL,
    ),
    "Completion": _object(
        {
            **_GENERATED,
            "object": {"const": "text_completion"},
            "choices": _list(_object({"index": _COUNT, "text": _TEXT}, {"finish_reason": _NAME_OR_NULL})),
        },
        _USAGE_OR_NULL,
    ),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "model": _TEXT,
            "data": _list(
                _object(
                    {
                        "index": _COUNT,
                        "object": {"const": "embedding"},
                        "embedding": {
                            "anyOf": [
                                _list({"type": "number"}),
                                {"type": "string", "description": "base64 of little-endian float32"},
                            ]
                        },
                    }
                )
            ),
        },
        _USAGE_OR_NULL,
    ),
    "Model": _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": _TEXT,
            "kind": {"enum": ["llm", "embedding"]},
        }
    ),
    "ModelList": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Health": _object({"status": {"enum": ["ok", "no engine"]}, "engines": _COUNT, "healthy": _COUNT}),
    "Engine": _object(
        {
            "name": _TEXT,
            "url": _TEXT,
            "model": _TEXT,
            "kind": {"enum": ["llm", "embedding"]},
            "adapter": _TEXT,
            "state": {"enum": ["starting", "healthy", "ejected", "draining", "drained"]},
            "in_flight": _COUNT,
        },
        {
            "why": {**_NAME_OR_NULL, "description": "Why it is in this state."},
            "replica": {"type": ["integer", "null"], "description": "Its id in the control plane's log, now."},
            "served": _COUNT,
            "ejections": _COUNT,
            "reported": {"type": "object", "description": "What it said of itself when it was last asked."},
        },
    ),
    "EngineList": _object({"object": {"const": "list"}, "data": _list(_ref("Engine"))}),
    "Policy": _object({"name": _TEXT}, {"known": _list(_TEXT)}),
    "Queue": _object(
        {"queued": _COUNT, "live": _COUNT, "in_flight": _COUNT}, {"steps": _COUNT, "counts": {"type": "object"}}
    ),
    "Config": {"type": "object"},
}

assert set(_REASONS) <= set(TYPES)
