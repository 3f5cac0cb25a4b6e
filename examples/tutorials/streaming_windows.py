"""A stream of documents, embedded as they come and summed up by windows of time, between bounded queues.

The engines are emulated in this process, so it runs anywhere; against a gateway only ``create`` changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from sage_bench.client import UnifiedInferenceClient
from sage_live.flow import Count, Flow, Inlet, Mean, Quantile, Window, tumbling

TEXT = "the queue of a replica is what a policy sees of it and a window is what a stream leaves behind"


@dataclass(frozen=True)
class Document:
    written_at: int
    """Nanoseconds."""
    topic: str
    text: str


@dataclass(frozen=True)
class Embedded:
    document: Document
    latency_s: float
    norm: float


async def documents(count: int) -> AsyncIterator[Document]:
    """One every 10 ms of their own time; every fourth is heard of 25 ms late."""
    for n in range(count):
        written_at = n * 10_000_000 - (25_000_000 if n % 4 == 0 else 0)
        yield Document(max(0, written_at), "even" if n % 2 == 0 else "odd", TEXT[: 20 + n % 80])


async def main() -> None:
    """First a source that waits, then one that cannot."""
    with UnifiedInferenceClient.create(cluster="small") as client:

        async def embed(document: Document) -> Embedded:
            began = time.monotonic()
            vectors = (await client.aio.embed(document.text)).vectors
            return Embedded(document, time.monotonic() - began, float(np.linalg.norm(vectors[0])))

        def show(window: Window) -> None:
            told = window.values
            print(
                f"{window.start / 1e9:4.1f} s {window.key:4}  {told['documents']:3.0f} documents, embedded in "
                f"{told['mean_s'] * 1e3:5.1f} ms, p95 {told['p95_s'] * 1e3:5.1f} ms"
            )

        flow = (
            Flow.of(documents(200))
            .map(embed, parallelism=16)  # at most 16 requests in flight, results in order
            .window(
                tumbling(0.5),
                time_of=lambda each: each.document.written_at,
                key=lambda each: each.document.topic,
                lateness_s=0.03,
                aggregates={
                    "documents": Count(),
                    "mean_s": Mean(lambda each: each.latency_s),
                    "p95_s": Quantile(0.95, lambda each: each.latency_s),
                },
            )
        )
        report = await flow.to(show).run()
        for stage in report.stages:
            print(
                f"{stage.name:10} in {stage.items_in:4}  out {stage.items_out:4}  late {stage.late}  "
                f"queue {stage.queue_depth_max}/{stage.queue_limit}  busy {stage.busy_ns / 1e9:.2f} s"
            )

        # A producer that cannot wait is told no when the first queue is full, and can count that.
        inlet: Inlet[Document] = Inlet("reject")
        stored: list[Embedded] = []
        run = asyncio.create_task(Flow.of(inlet).map(embed, parallelism=4, queue_limit=8).to(stored.append).run())
        told = [await inlet.put(document) async for document in documents(100)]
        inlet.close()
        source = (await run).stages[0]
        assert (source.items_out, source.rejected) == (told.count(True), told.count(False)) and len(
            stored
        ) == told.count(True)
        print(
            f"a burst of {len(told)}: {source.items_out} let in, {source.rejected} rejected, none lost without a word"
        )


if __name__ == "__main__":
    asyncio.run(main())
