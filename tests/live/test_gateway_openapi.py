"""The OpenAPI document is valid, complete, and agrees with the decoders that check requests for real."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from sage_live.errors import TYPES, ApiError
from sage_live.gateway import bodies
from sage_live.gateway.openapi import document

DOCUMENT = document("1.2.3")


def _operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield method, path, operation


def test_it_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    assert DOCUMENT["info"]["version"] == "1.2.3"


def test_it_has_every_endpoint_and_the_page_lists_the_same() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
    listed = set(re.findall(r"^\| `(GET|POST|PUT|DELETE) (/[^`?]*)", page, re.MULTILINE))
    assert {(method.upper(), path) for method, path, _ in _operations()} == listed


def test_every_reference_resolves_and_everything_is_used() -> None:
    text = msgspec.json.encode(DOCUMENT).decode()
    used = set(re.findall(r'"#/components/(\w+)/([^"]+)"', text))
    defined = {(kind, name) for kind, items in DOCUMENT["components"].items() for name in items}
    assert used <= defined
    assert {pair for pair in defined - used if pair[0] != "securitySchemes"} == set()


def test_every_operation_documents_its_errors() -> None:
    ids = [operation["operationId"] for _, _, operation in _operations()]
    assert len(set(ids)) == len(ids)
    for method, path, operation in _operations():
        failures = {int(status) for status in operation["responses"] if status >= "400"}
        assert {400, 500} <= failures <= set(TYPES), (method, path)
        if "requestBody" in operation:
            assert {413, 415} <= failures, (method, path)
        if path.startswith("/v1/"):
            assert 401 in failures, (method, path)


_Cases = list[tuple[dict[str, Any], bool]]
_TURN = {"role": "user", "content": "hi"}
_CHAT: _Cases = [
    ({}, True),
    ({"stream": True, "stream_options": {"include_usage": True, "x": 1}, "temperature": "?"}, True),
    ({"stream": None, "max_tokens": None, "n": None, "user": None, "stream_options": None}, True),
    (
        {"messages": [{"role": "user"}, {"role": "tool", "content": [{"type": "text"}], "tool_call_id": "x"}]},
        True,
    ),
    ({"max_tokens": 1}, True),
    ({"max_tokens": 0}, False),
    ({"max_completion_tokens": -1}, False),
    ({"max_tokens": 2**31}, False),
    ({"max_tokens": "5"}, False),
    ({"max_tokens": 1.5}, False),
    ({"max_tokens": True}, False),
    ({"n": 129}, False),
    ({"stream": "yes"}, False),
    ({"stream": 1}, False),
    ({"stream_options": []}, False),
    ({"model": ""}, False),
    ({"model": "m" * 257}, False),
    ({"model": None}, False),
    ({"messages": []}, False),
    ({"messages": "hi"}, False),
    ({"messages": ["hi"]}, False),
    ({"messages": [{"content": "hi"}]}, False),
    ({"messages": [{"role": 1}]}, False),
    ({"user": 1}, False),
]
_EMBEDDING: _Cases = [
    ({"encoding_format": "base64", "dimensions": 64}, True),
    ({"encoding_format": "hex"}, False),
    ({"dimensions": 0}, False),
]
_ENGINE: _Cases = [
    ({}, True),
    ({"kind": "embedding", "adapter": "tei", "name": "a-1", "tasks_max": 8}, True),
    ({"url": "127.0.0.1:8001"}, False),
    ({"url": "http://x/\r\nevil: 1"}, False),
    ({"kind": "other"}, False),
    ({"name": "a b"}, False),
    ({"name": "a\n"}, False),
    ({"url": "http://x\n"}, False),
    ({"typo": 1}, False),
]
_CASES: list[tuple[str, Callable[[bytes], object], dict[str, Any], bool]] = [
    *[("ChatBody", bodies.decode_chat, {"model": "m", "messages": [_TURN], **more}, good) for more, good in _CHAT],
    *[
        ("CompletionBody", bodies.decode_completion, {"model": "m", "prompt": prompt}, good)
        for prompt, good in [
            ("", True),
            ("text", True),
            (["a", "b"], True),
            ([1, 2], True),
            ([[1], [2, 3]], True),
            (["a", 1], False),
            ([1, [1]], False),
            ([], False),
            ([[]], False),
            ([-1], False),
            (None, False),
            (1, False),
            ({"text": "a"}, False),
        ]
    ],
    ("CompletionBody", bodies.decode_completion, {"model": "m", "prompt": "a", "max_tokens": 0}, True),
    ("CompletionBody", bodies.decode_completion, {"model": "m"}, False),
    *[
        ("EmbeddingBody", bodies.decode_embedding, {"model": "m", "input": value}, good)
        for value, good in [
            ("text", True),
            (["a"] * bodies.INPUTS_MAX, True),
            (["a"] * (bodies.INPUTS_MAX + 1), False),
            ([1] * (bodies.INPUTS_MAX + 1), True),  # one input of that many tokens
            ([[1]] * (bodies.INPUTS_MAX + 1), False),
            (["a", [1]], False),
            ([], False),
        ]
    ],
    *[
        ("EmbeddingBody", bodies.decode_embedding, {"model": "m", "input": "a", **more}, good)
        for more, good in _EMBEDDING
    ],
    *[
        ("EngineBody", bodies.decode_engine, {"url": "http://127.0.0.1:8001", "model": "m", **more}, good)
        for more, good in _ENGINE
    ],
    ("PolicyBody", bodies.decode_policy, {"name": "hybrid"}, True),
    ("PolicyBody", bodies.decode_policy, {"name": ""}, False),
    ("PolicyBody", bodies.decode_policy, {"policy": "hybrid"}, False),
]


@pytest.mark.parametrize(("schema", "decode", "body", "good"), _CASES)
def test_document_and_decoder_agree(
    schema: str, decode: Callable[[bytes], object], body: dict[str, Any], good: bool
) -> None:
    validator = OAS31Validator({"$ref": f"#/components/schemas/{schema}", **DOCUMENT})
    assert validator.is_valid(body) is good
    raw = msgspec.json.encode(body)
    if good:
        decode(raw)
    else:
        with pytest.raises(ApiError) as refused:
            decode(raw)
        assert refused.value.status == 400 and refused.value.code == "invalid_value"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b'{"model": "m"} {}', "trailing|messages"),
        (b'{"model": "m", "messages": [{"role": "u", "content": "\xff"}]}', "utf-8"),
        (b'{"model": "\\ud800", "messages": [{"role": "u"}]}', "surrogate"),
        (b'{"model": "m", "messages": [{"role": "u", "content": ' + b"[" * 200_000 + b"]" * 200_000 + b"}]}", "deep"),
        (b'{"model": "m", "messages": [{"role": "u"}], "x": ' + b"[" * 200_000, "deep"),
        (b'{"model": "m", "messages": [{"role": "u"}], "temperature": NaN}', "malformed"),
        (b"\xef\xbb\xbf{}", "malformed"),
        (b"\x00", "malformed"),
    ],
)
def test_what_is_not_json_is_the_clients_error(raw: bytes, said: str) -> None:
    with pytest.raises(ApiError, match=said) as refused:
        bodies.decode_chat(raw)
    assert refused.value.status == 400


def test_an_error_names_the_field() -> None:
    with pytest.raises(ApiError) as refused:
        bodies.decode_chat(b'{"model": "m", "messages": [{"role": "u"}, {"role": 1}]}')
    assert refused.value.param == "messages[1].role"
    with pytest.raises(ApiError) as refused:
        bodies.decode_chat(b'{"model": "m", "messages": [{}]}')
    assert refused.value.param == "messages[0].role"
    with pytest.raises(ApiError) as refused:
        bodies.decode_policy(b'{"name": "a", "typo": 1}')
    assert refused.value.param == "typo"


@pytest.mark.parametrize(
    ("value", "inputs"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])]
)
def test_an_array_of_tokens_is_one_input(value: object, inputs: list[object]) -> None:
    body = bodies.decode_embedding(msgspec.json.encode({"model": "m", "input": value}))
    assert body.inputs() == inputs
