"""The native encoding and digest against msgspec and hashlib: a log does not tell who wrote it."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core import _native
from sage_core import events as e
from sage_core.errors import IllegalEvent

encode = msgspec.msgpack.Encoder().encode

edges = [0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63 - 1]
integers = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.sampled_from([*edges, *(-edge for edge in edges), -32, -33, -129, -32_769])
)
texts = st.one_of(st.text(max_size=40), st.integers(0, 70_000).map(lambda n: "x" * n))
reals = st.floats(allow_nan=False)

OF: dict[type, Any] = {int: integers, str: texts, float: reals, bool: st.booleans()}


def built(kind: type[e.Event]) -> st.SearchStrategy[e.Event]:
    hints = [field.type for field in msgspec.structs.fields(kind)]
    return st.tuples(*(OF[hint] for hint in hints)).map(lambda values: kind(*values))


KINDS = [
    kind for kind in vars(e).values() if isinstance(kind, type) and issubclass(kind, e.Event) and kind is not e.Event
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_event_is_written_as_msgspec_writes_it(kind: type[e.Event]) -> None:
    @given(st.lists(built(kind), max_size=20))
    def check(events: list[e.Event]) -> None:
        encoded = encode(events)
        assert _native.encode_again(encoded) == encoded

    check()


def test_many_events() -> None:
    for n in (15, 16, 65_535, 65_536):
        encoded = encode([e.ReplicaLeft(0)] * n)
        assert _native.encode_again(encoded) == encoded


@given(st.binary(max_size=400), st.integers(0, 3))
def test_digest(data: bytes, blocks: int) -> None:
    for text in (data, data + bytes(128 * blocks), bytes(128 * blocks)):
        assert _native.blake2b_16(text) == hashlib.blake2b(text, digest_size=16).digest()


@given(st.lists(st.one_of(*(built(kind) for kind in KINDS)), min_size=1, max_size=4), st.data())
def test_damaged_bytes_are_refused(events: list[e.Event], data: st.DataObject) -> None:
    encoded = encode(events)
    with pytest.raises(IllegalEvent, match="encoded events: expected"):
        _native.encode_again(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
    with pytest.raises(IllegalEvent, match="expected nothing after the last event"):
        _native.encode_again(encoded + b"\x00")


@pytest.mark.parametrize(
    "events",
    [
        [["RequestVanished", 1]],
        [["TaskFinished", 1]],
        [["TaskFinished", 1, 2, 3]],
        [["TaskFinished", 1.5, 2]],
        [["TaskFailed", 1, 2, True]],
        [["TaskFailed", 1, "why", 1]],
        [{"TaskFinished": 1}],
        [["TaskFinished", 2**63, 0]],
    ],
)
def test_what_is_no_event_is_refused(events: Any) -> None:
    with pytest.raises(IllegalEvent, match="encoded events: expected"):
        _native.encode_again(encode(events))
