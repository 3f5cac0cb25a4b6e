"""How many tokens a server adds to a prompt: asked of the server itself, once a model, in one request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sage_core.errors import DataError
from sage_core.events import RequestArrived
from sage_core.load import Arrival
from sage_core.units import Nanos, RequestKind
from sage_live.loadgen.generator import generate
from sage_live.loadgen.options import Model, Options
from sage_live.loadgen.schema import FIELDS, Error

PROBE_WORDS = 32


async def measure_overhead(options: Options, pipeline: str, kind: RequestKind) -> int:
    """Tokens that the server counts beyond the words of a prompt of ``pipeline``. Its prompts must be exact.

    DataError: the server refused, or does not say how many tokens a prompt has.
    """
    model = options.models[pipeline]
    bare = Model(model.name, model.prompts.with_overhead(0))
    probe = replace(options, models={pipeline: bare}, stream=False, fixed_lengths=False, connections=1)
    measured = await generate(_Once(RequestArrived(0, pipeline, kind, "probe", 0, PROBE_WORDS, 1, 0)), probe)
    row = dict(zip(FIELDS, measured.rows[0].tolist(), strict=True))
    if row["error"] != Error.NONE or row["input_tokens"] < PROBE_WORDS:
        seen = f"status {row['status']}, {Error(row['error']).name.lower()}, prompt_tokens {row['input_tokens']}"
        raise DataError(
            f"{options.url}: model {model.name!r} did not say how many tokens a prompt of {PROBE_WORDS} words has ({seen}); "
            "check the model's name and that the tokenizer is its own"
        )
    return int(row["input_tokens"] - PROBE_WORDS)


class _Once:
    """A load of one request."""

    def __init__(self, request: RequestArrived) -> None:
        self._request = request

    def arrivals(self) -> Iterator[Arrival]:
        yield Arrival(Nanos(0), self._request, 1)

    def ended(self, now: Nanos, request: int) -> Arrival | None:
        return None
