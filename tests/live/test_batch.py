"""Embedding requests put together and their answer taken apart: each gets its own, in order, byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_live.batch import put_together, split_answer, take_apart
from sage_live.errors import ApiError
from sage_live.gateway.bodies import decode_embedding

TEXTS = st.text(max_size=12) | st.sampled_from(['"', "\\", '","', "], [", "\u2028", "🙂", "{}"])
IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
INPUTS = st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=4), IDS, st.lists(IDS, min_size=1, max_size=3))
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "encoding_format": st.sampled_from(["float", "base64"]),
        "dimensions": st.integers(1, 9),
        "user": st.text(max_size=4),
        "extra": st.dictionaries(st.text(max_size=3), st.none() | st.integers(), max_size=2),
    },
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    fields = {"model": "m", "input": draw(INPUTS)} | draw(OPTIONS)
    keys = draw(st.permutations(list(fields)))
    text = json.dumps(
        {key: fields[key] for key in keys}, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))
    )
    return text.encode()


def as_list(value: Any) -> list[Any]:
    """The inputs that OpenAI's ``input`` stands for."""
    return [value] if isinstance(value, str) or (value and isinstance(value[0], int)) else list(value)


@given(st.lists(bodies(), min_size=1, max_size=6))
def test_requests_of_one_key_become_one_and_each_gets_its_own_vectors(given_bodies: list[bytes]) -> None:
    by_key: dict[bytes, list[bytes]] = {}
    for body in given_bodies:
        by_key.setdefault(take_apart(body).key, []).append(body)
    for shared in by_key.values():
        parts = [take_apart(body) for body in shared]
        asked = [json.loads(body) for body in shared]
        together = json.loads(put_together(parts))
        assert together["input"] == [each for fields in asked for each in as_list(fields["input"])]
        for fields in asked:  # whatever else was said is said to the engine, and by all of them
            assert {k: v for k, v in together.items() if k != "input"} == {
                k: v for k, v in fields.items() if k not in ("input", "user")
            }
        # An engine whose vector of an input is the input itself.
        items = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(together["input"])]
        reply = {"object": "list", "data": items, "model": "m", "usage": {"prompt_tokens": 101, "total_tokens": 101}}
        for scrambled in (items, items[::-1]):
            answers = split_answer(json.dumps(reply | {"data": scrambled}).encode(), parts)
            for (answer, tokens), fields in zip(answers, asked, strict=True):
                decoded = json.loads(answer)
                assert [item["embedding"] for item in decoded["data"]] == as_list(fields["input"])
                assert [item["index"] for item in decoded["data"]] == list(range(len(decoded["data"])))
                assert decoded["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
                assert decoded["model"] == "m" and decoded["object"] == "list"
            assert sum(tokens for _, tokens in answers) == 101


def test_vectors_pass_as_they_were_written() -> None:
    parts = [take_apart(b'{"model":"m","input":"a"}'), take_apart(b'{"model":"m","input":["b"]}')]
    body = b'{"data":[{"index":0,"embedding":[ 0.10,1e-7 ]},{"index":1,"embedding":"AAAA\\/w=="}],"model":"m"}'
    (first, _), (second, _) = split_answer(body, parts)
    assert b'"embedding":[ 0.10,1e-7 ]' in first
    assert b'"embedding":"AAAA\\/w=="' in second


@pytest.mark.parametrize(
    "other",
    [{"model": "other"}, {"encoding_format": "base64"}, {"dimensions": 4}, {"input": [1, 2]}, {"truncate": True}],
)
def test_what_differs_is_not_put_together(other: dict[str, Any]) -> None:
    one = {"model": "m", "input": "a"}
    key = take_apart(json.dumps(one).encode()).key
    assert take_apart(json.dumps(one | other).encode()).key != key
    assert take_apart(json.dumps(one | {"user": "u", "input": ["b", "c"]}).encode()).key == key


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"not JSON",
        b'{"data":[]}',
        b'{"data":[{"embedding":[1]}]}',
        b'{"data":[{"index":0,"embedding":[1]},{"index":0,"embedding":[1]}]}',
        b'{"data":[{"index":1,"embedding":[1]},{"index":2,"embedding":[1]}]}',
        b'{"data":[{"index":0},{"index":1}]}',
        b'{"data":[{"index":0,"embedding":[1]},{"index":1,"embedding":[1]}],"model":"\xff"}',
    ],
)
def test_an_answer_that_is_not_one_vector_an_input_is_refused(answer: bytes) -> None:
    parts = [take_apart(b'{"model":"m","input":"a"}'), take_apart(b'{"model":"m","input":"b"}')]
    with pytest.raises(ValueError, match=r"vectors|expected"):
        split_answer(answer, parts)


JSON_BYTES = st.one_of(
    bodies(),
    st.binary(max_size=40),
    st.builds(
        lambda head, key, value: b'{"model":"m","input":' + head + b',"' + key + b'":' + value + b"}",
        st.sampled_from([b'"a"', b"[1]", b"[1.0]", b'["a"]', b"[[1]]", b'[" "]', b"[]", b"[[]]", b'"\\ud800"']),
        st.sampled_from([b"x", b"\\ud800", b"\\u0069nput", b"input", b"\\n", b"\xff", b"model"]),
        st.sampled_from([b"1", b'"\\ud800"', b"[" * 50 + b"]" * 50, b'{"a":{"\\ud800":1}}', b'"b"', b"1e999", b"\xff"]),
    ),
)


@given(JSON_BYTES)
def test_whatever_the_gateway_lets_in_can_be_taken_apart(body: bytes) -> None:
    try:
        asked = decode_embedding(body)
    except ApiError:
        return
    parts = take_apart(body)
    assert len(parts.inputs) == len(asked.inputs())
    json.loads(put_together([parts, parts]).decode())
