"""What a server puts up with before it refuses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Times are seconds and are checked once a second, so each may last up to a second longer."""

    connections_max: int = 4096
    """Above it a connection is answered 503 and closed."""
    head_bytes_max: int = 64 * 1024
    """Request line and headers; above it 431."""
    body_bytes_max: int = 16 * 1024 * 1024
    """Above it 413."""
    pipelined_max: int = 32
    """Requests of one connection that wait behind the one in progress; above it the connection is not read, and
    only then a disconnect goes unnoticed until the queue shortens."""
    head_s: float = 10.0
    """From the first byte of a request to the end of its headers; above it 408."""
    body_s: float = 10.0
    """What a body may take, on top of its size over ``body_bytes_per_s_min``; above it 408."""
    body_bytes_per_s_min: int = 16 * 1024
    idle_s: float = 75.0
    """A connection without a request."""
    stalled_s: float = 60.0
    """A client that takes no byte of what is written to it is taken for gone."""
    linger_s: float = 2.0
    """After a refusal: how long the client may go on sending before the connection is cut, so that it can read why."""
