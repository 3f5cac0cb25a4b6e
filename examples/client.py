"""Chat, generate and embed through one client. Here it asks a simulated cluster, so it runs anywhere.

Against a real system only ``create`` changes: ``create("http://HOST:8888/v1")`` for a gateway, or
``create(engines=["http://HOST:8001", "http://HOST:8090,kind=embedding,adapter=sage"])`` for engines without one.
"""

from __future__ import annotations

import asyncio

from sage_bench.client import UnifiedInferenceClient
from sage_live.errors import ApiError


def main() -> None:
    """Every verb once, a stream, many requests at once, and an error."""
    with UnifiedInferenceClient.create(cluster="small", policy="hybrid") as client:
        print("served:", ", ".join(model.id for model in client.models()))

        answer = client.chat("What is a control plane?", max_tokens=12, tenant="docs")
        print("chat:", answer.text, "|", answer.usage)

        print("stream:", end="")
        for chunk in client.chat("And slower, please.", max_tokens=12, stream=True, ttft_s=0.5):
            print(chunk.text, end="", flush=True)
        print()

        print("generate:", client.generate("Once upon a time", max_tokens=8).text)

        vectors = client.embed(["a cat", "a dog", "a control plane"]).vectors
        print("embed:", vectors.shape, vectors.dtype)

        async def at_once() -> int:
            answers = await asyncio.gather(
                *(client.aio.chat(f"Question {number}", max_tokens=8, priority=1) for number in range(32))
            )
            return sum(answer.usage.completion_tokens for answer in answers if answer.usage is not None)

        print("32 at once:", asyncio.run(at_once()), "tokens")

        try:
            client.chat("hello", model="gpt")
        except ApiError as error:
            print(f"error {error.status} {error.code}: {error}")


if __name__ == "__main__":
    main()
