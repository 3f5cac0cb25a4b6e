"""What a client may say in headers about how its request is to be treated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from sage_core.units import SECONDS_MAX
from sage_live import errors

TENANT: Final = b"x-sage-tenant"
PRIORITY: Final = b"x-sage-priority"
TTFT: Final = b"x-sage-ttft-ms"
E2E: Final = b"x-sage-e2e-ms"
INPUT_TOKENS: Final = b"x-sage-input-tokens"
OUTPUT_TOKENS: Final = b"x-sage-output-tokens-max"
SCHEDULED: Final = b"x-sage-scheduled-ns"

_ALL: Final = frozenset({TENANT, PRIORITY, TTFT, E2E, INPUT_TOKENS, OUTPUT_TOKENS, SCHEDULED})
_TENANT_BYTES_MAX: Final = 128
_PRIORITY_MAX: Final = 1000
_TOKENS_MAX: Final = 2**31 - 1


class Wishes(NamedTuple):
    """tenant: whom the request counts for, where no API key says so. priority: 0 is interactive, larger less urgent.
    ttft_s, e2e_s: the client's own objectives. input_tokens: the prompt's length, counted by the client.
    output_tokens_max: the cap to plan by, where ``max_tokens`` is not (a load generator that fixes lengths must not tell
    them to the policy). scheduled_ns: when the request was due on the machine's monotonic clock; honoured where the gateway was told to trust it."""

    tenant: str = "default"
    priority: int = 0
    ttft_s: float | None = None
    e2e_s: float | None = None
    input_tokens: int | None = None
    output_tokens_max: int | None = None
    scheduled_ns: int = 0


NO_WISH: Final = Wishes()


def wishes(headers: Mapping[bytes, bytes]) -> Wishes:
    """What ``headers`` (names in lower case) ask for. ApiError 400 naming the header that is wrong."""
    if _ALL.isdisjoint(headers):
        return NO_WISH
    get = headers.get
    return Wishes(
        "default" if (tenant := get(TENANT)) is None else _tenant(tenant),
        0 if (priority := get(PRIORITY)) is None else _whole(PRIORITY, priority, -_PRIORITY_MAX, _PRIORITY_MAX),
        None if (ttft := get(TTFT)) is None else _milliseconds(TTFT, ttft),
        None if (e2e := get(E2E)) is None else _milliseconds(E2E, e2e),
        None if (tokens := get(INPUT_TOKENS)) is None else _whole(INPUT_TOKENS, tokens, 1, _TOKENS_MAX),
        None if (most := get(OUTPUT_TOKENS)) is None else _whole(OUTPUT_TOKENS, most, 1, _TOKENS_MAX),
        0 if (scheduled := get(SCHEDULED)) is None else _whole(SCHEDULED, scheduled, 0, 2**62),
    )


def _tenant(value: bytes) -> str:
    text = value.decode("latin-1")
    if not 0 < len(value) <= _TENANT_BYTES_MAX or not text.isascii() or not text.isprintable():
        raise _wrong(TENANT, f"1 to {_TENANT_BYTES_MAX} printable ASCII characters")
    return text


def _whole(name: bytes, value: bytes, low: int, high: int) -> int:
    number = _number(int, value)
    if number is None or not low <= number <= high:
        raise _wrong(name, f"a whole number from {low} to {high}")
    return number


def _milliseconds(name: bytes, value: bytes) -> float:
    number = _number(float, value)
    if number is None or not 0 < number <= SECONDS_MAX:
        raise _wrong(name, "milliseconds above 0")
    return number / 1000


def _number(kind: Callable[[bytes], float], value: bytes) -> int | None:
    try:
        return kind(value)  # type: ignore[return-value]
    except ValueError:
        return None


def _wrong(name: bytes, expected: str) -> errors.ApiError:
    return errors.bad_request(f"Header {name.decode()}: expected {expected}.", param=name.decode(), code="bad_header")
