"""What became of one request, as its log line and its trace tell it. No prompt, no key."""

from __future__ import annotations

import msgspec


class RequestRecord(msgspec.Struct, frozen=True):
    """One request that is over. Instants are nanoseconds of the driver's clock; None did not happen."""

    request_id: str  # the client's, or ours
    operation: str  # gen_ai.operation.name
    model: str
    tenant: str
    outcome: str  # responded, rejected, cancelled, failed; refused where it never got to the control plane
    status: int  # what the client got; 499 if it left before
    arrived_ns: int
    ended_ns: int
    dispatched_ns: int | None = None  # to the engine that answered
    first_token_ns: int | None = None  # None where nothing was streamed
    request: int | None = None  # its number in the results of this run
    engine: str | None = None
    stream: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    code: str | None = None  # of the error the gateway answered with
