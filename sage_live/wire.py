"""Small cuts in JSON and server-sent events that the data path makes without decoding what it passes on.

A key in quotes cannot be found inside a JSON string: there its quotes are escaped.
"""

from __future__ import annotations

from typing import Final

import msgspec

COUNT_MAX: Final = 2**31 - 1
"""Tokens that an engine may claim; more is a defect of the engine, and as good as no word at all."""

_encode = msgspec.json.Encoder().encode


def with_field(body: bytes, key: bytes, value: object) -> bytes:
    """``body``, a JSON object, with ``key`` set to ``value``."""
    if b'"' + key + b'"' in body:  # there, or in something nested: only decoding can tell
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        fields[key.decode()] = msgspec.Raw(_encode(value))
        return _encode(fields)
    # At the end: where a client hid the same key behind escapes, the last one counts.
    start = body[: body.rindex(b"}")].rstrip()
    comma = b"" if start.endswith(b"{") else b","
    return b'%b%b"%b":%b}' % (start, comma, key, _encode(value))


def number_after(body: bytes, key: bytes) -> int:
    """The whole number after the last ``key`` (with its quotes and colon); 0 if there is none up to ``COUNT_MAX``."""
    at = body.rfind(key)
    if at < 0:
        return 0
    digits = body[at + len(key) : at + len(key) + 24].lstrip()
    end = 0
    while end < len(digits) and 48 <= digits[end] <= 57:
        end += 1
    number = int(digits[:end]) if end else 0
    return number if number <= COUNT_MAX else 0


def done_usage(data: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens from the event of ``data`` that carries the stream's usage."""
    completion = number_after(data, b'"completion_tokens":')
    prompt = number_after(data, b'"prompt_tokens":')
    return (prompt, completion) if prompt or completion else None


def without_usage(data: bytes) -> bytes:
    """Whole events but the one that has only usage: ``choices`` is empty in it."""
    kept = [
        event
        for event in data.split(b"\n\n")
        if not (b'"usage"' in event and b'"choices":[]' in event.replace(b" ", b""))
    ]
    return b"\n\n".join(kept)
