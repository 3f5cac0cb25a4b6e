"""Cuts in JSON and events: whatever is cut, a decoder sees the same as before, but for what was meant."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_live.wire import done_usage, number_after, with_field, without_usage

KEYS = st.sampled_from(["model", "stream", "stream_options", "x", 'quo"te', "ü", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=5)


@given(OBJECTS, st.sampled_from(["model", "stream_options", "priority"]), VALUES, st.booleans(), st.booleans())
def test_a_field_is_set_and_nothing_else_changes(
    fields: dict[str, object], key: str, value: object, ascii_only: bool, spaced: bool
) -> None:
    body = json.dumps(fields, ensure_ascii=ascii_only, indent=1 if spaced else None).encode()
    if spaced:
        body = b" \n" + body + b"\n "
    assert json.loads(with_field(body, key.encode(), value)) == fields | {key: value}


def test_the_common_case_is_one_copy_with_the_field_at_the_end() -> None:
    assert with_field(b'{"a": [1.50]}', b"b", 2) == b'{"a": [1.50],"b":2}'
    assert with_field(b"{ }", b"b", 2) == b'{"b":2}'


def test_a_key_that_was_hidden_behind_escapes_counts_for_nothing() -> None:
    body = with_field(b'{"\\u0070riority":-9,"a":1}', b"priority", 3)
    assert json.loads(body) == {"priority": 3, "a": 1}  # the last of two equal keys is the one that counts


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"usage":{"prompt_tokens":12}}', 12),
        (b'{"usage":{"prompt_tokens":  12 }}', 12),
        (b'{"content":"\\"prompt_tokens\\":99","usage":{"prompt_tokens":3,"x":{}}}', 3),
        (b'{"usage":{"prompt_tokens":null}}', 0),
        (b'{"usage":{"prompt_tokens":', 0),
        (b"{}", 0),
        (b'{"usage":{"prompt_tokens":-5}}', 0),
        (b'{"usage":{"prompt_tokens":' + b"9" * 500 + b"}}", 0),
    ],
)
def test_a_number_is_found_without_decoding(body: bytes, expected: int) -> None:
    assert number_after(body, b'"prompt_tokens":') == expected


def event(fields: dict[str, object], compact: bool = False) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":") if compact else None).encode() + b"\n\n"


USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


@pytest.mark.parametrize("compact", [False, True])
def test_usage_is_read_and_its_event_taken_out(compact: bool) -> None:
    text = event({"choices": [{"delta": {"content": 'of "usage": {} and "choices":[]'}}]}, compact)
    data = text + event({"choices": [], "usage": USAGE}, compact) + b"data: [DONE]\n\n"
    assert done_usage(data) == (5, 7)
    assert without_usage(data) == text + b"data: [DONE]\n\n"
    assert done_usage(text + b"data: [DONE]\n\n") is None


def test_usage_beside_text_stays() -> None:
    """What engines send with ``continuous_usage_stats``, or with ``"usage": null``."""
    for usage in (USAGE, None):
        data = event({"choices": [{"delta": {"content": "a"}}], "usage": usage})
        assert without_usage(data) == data
