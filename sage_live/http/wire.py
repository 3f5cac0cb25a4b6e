"""What both ends of HTTP/1.1 write the same way."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import TypeAlias

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


def header_lines(headers: Headers) -> bytes:
    """``name: value`` lines.

    Raises:
        ValueError: a name or a value has a line break in it, which would let its author write headers or a body.
    """
    if not headers:
        return b""
    lines = b"".join([b"%b: %b\r\n" % header for header in headers])
    count = len(headers)
    if lines.count(b"\n") != count or lines.count(b"\r") != count:
        raise ValueError("a header has a line break in it")
    return lines
