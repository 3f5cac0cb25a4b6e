"""Embedding requests of different clients as one request upstream, and its answer as theirs again.

Inputs and vectors are passed on as they were written: nothing is decoded but the frames around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

Raw = msgspec.Raw

_encode = msgspec.json.Encoder(order="sorted").encode
_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_list = msgspec.json.Decoder(list[Raw]).decode


class Parts(NamedTuple):
    """An embedding request taken apart. ``key``: what must be equal for two to share a batch (model, format, dimensions,
    whatever else was said, and whether inputs are texts or tokens). ``inputs``: one JSON value each."""

    key: bytes
    inputs: list[bytes]


class _Item(msgspec.Struct):
    embedding: Raw
    index: int = -1


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Reply(msgspec.Struct):
    data: list[_Item]
    model: str = ""
    usage: _Usage = msgspec.field(default_factory=_Usage)


_decode_reply = msgspec.json.Decoder(_Reply).decode


def take_apart(body: bytes) -> Parts:
    """A body that the gateway has checked."""
    fields = _decode_fields(body)
    given = bytes(fields.pop("input")).strip()
    fields.pop("user", None)
    tokens = False
    if given.startswith(b'"'):
        inputs = [given]
    else:
        listed = [bytes(each).strip() for each in _decode_list(given)]
        tokens = not listed[0].startswith(b'"')
        inputs = [given] if tokens and not listed[0].startswith(b"[") else listed
    return Parts(_encode([fields, tokens]), inputs)


def put_together(parts: Sequence[Parts]) -> bytes:
    """One body with the inputs of all, in order. Their keys are equal."""
    fields = msgspec.json.decode(parts[0].key, type=tuple[dict[str, Raw], bool])[0]
    fields["input"] = Raw(b"[" + b",".join([each for part in parts for each in part.inputs]) + b"]")
    return _encode(fields)


def split_answer(body: bytes, parts: Sequence[Parts]) -> list[tuple[bytes, int]]:
    """Each request's own answer and its prompt tokens: the engine counts them for all together, so they are shared out
    by the length of the inputs. ValueError where the answer is not one vector an input."""
    try:
        reply = _decode_reply(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected OpenAI's embedding answer: {error}") from error
    wanted = sum(len(part.inputs) for part in parts)
    items = reply.data
    if len(items) != wanted:
        raise ValueError(f"{len(items)} vectors for {wanted} inputs")
    if any(item.index != number for number, item in enumerate(items)):
        items.sort(key=lambda item: item.index)
        if [item.index for item in items] != list(range(wanted)):
            raise ValueError("the indices of its vectors are not those of the inputs")
    model = _encode(reply.model)
    shares = _shares(reply.usage.prompt_tokens, [sum(map(len, part.inputs)) for part in parts])
    answers = []
    first = 0
    for part, tokens in zip(parts, shares, strict=True):
        own = items[first : first + len(part.inputs)]
        first += len(own)
        data = b",".join(
            [
                b'{"object":"embedding","index":%d,"embedding":%b}' % (number, bytes(item.embedding))
                for number, item in enumerate(own)
            ]
        )
        answers.append(
            (
                b'{"object":"list","data":[%b],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}'
                % (data, model, tokens, tokens),
                tokens,
            )
        )
    return answers


def _shares(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` in whole parts in proportion to ``sizes``; the parts add up."""
    whole = sum(sizes) or 1
    shares, before, given = [], 0, 0
    for size in sizes:
        before += size
        until = round(total * before / whole)
        shares.append(until - given)
        given = until
    return shares
