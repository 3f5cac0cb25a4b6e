"""A request leaves nothing to the garbage collector: whatever it was made of goes when it ends.

Cycles would be collected with all that is live walked, in the middle of somebody's stream.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gateway_harness import (
    ANSWER,
    CHAT,
    DONE,
    EMBED,
    EMBEDDINGS,
    Client,
    chat,
    embed_spec,
    embedding,
    llm_spec,
    run,
    scripted,
    serving,
    sse,
    token,
)

from sage_live.call import Call
from sage_live.gateway.app import HttpAnswer
from sage_live.http.exchange import Exchange
from sage_live.http.request import Request

MADE = (Request, HttpAnswer, Call, Exchange)
"""Of each there is one a request, and it holds the rest."""


class Forgetful(list[Any]):
    """A scripted engine remembers every request; here it must not."""

    def append(self, request: Any) -> None:
        pass


def answer(request: Request) -> None:
    """What the engines say."""
    if request.path == EMBEDDINGS:
        vectors = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
        request.respond(200, json.dumps({"object": "list", "data": vectors, "model": EMBED}).encode())
    elif b'"stream"' in request.body:
        request.start(200)
        request.write(sse(token("a")))
        request.write(sse(token("b")))
        request.end(DONE)
    else:
        request.respond(200, ANSWER)


def test_a_request_leaves_no_cycles() -> None:
    async def main() -> Counter[str]:
        async with (
            scripted(answer) as engine,
            serving([llm_spec(engine.port), embed_spec(engine.port)]) as served,
        ):
            engine.requests = Forgetful()
            client = await Client.open(served.port)
            gc.collect()
            gc.disable()
            try:
                for _ in range(20):
                    for path, body in ((CHAT, chat()), (CHAT, chat(stream=True)), (EMBEDDINGS, embedding())):
                        client.send(path, body)
                        assert (await client.reply()).status == 200
                return Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, MADE))
            finally:
                gc.enable()

    left = run(main())
    # Those of a probe of an engine's health may be underway.
    assert max(left.values(), default=0) < 5, left
