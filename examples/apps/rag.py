"""Retrieval-augmented generation as one declared pipeline, from documents to an answer, and where its time went.

Runs by itself: engines are emulated in this process, so what they say is made up, and when they say it is what their
profiles predict. With real engines only `create` changes:

    UnifiedInferenceClient.create(engines=["http://127.0.0.1:8001,pool=llm", "http://127.0.0.1:8090,kind=embedding,pool=embed"], ...)

The same pipeline simulated: sage run experiment=rag
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sage_bench.client import UnifiedInferenceClient
from sage_bench.indexing import Build, build_index
from sage_bench.metrics.stage_spans import stage_spans
from sage_bench.results.reader import Run
from sage_live.retrieval.corpus import documents

DOCS = Path(__file__).resolve().parents[2] / "docs"
QUESTIONS = ("Which ports are used?", "What is goodput?", "How is a run replayed?", "When is an engine ejected?")


def main() -> None:
    """Build an index, ask four questions at once, show answers' sources and the stages' spans."""
    with tempfile.TemporaryDirectory() as name:
        folder, record = Path(name) / "index", Path(name) / "run"
        with UnifiedInferenceClient.create(cluster="pipelines") as client:
            index = build_index(documents(DOCS), client, Build(), folder=folder)
        print(f"index: {len(index)} chunks of {len(index.sources)} documents")

        pipeline = ["pipeline=rag", f"+driver.indexes.docs={folder}"]
        client = UnifiedInferenceClient.create(cluster="pipelines", overrides=pipeline, record=record)
        with client, ThreadPoolExecutor() as users:
            answers = list(users.map(lambda q: client.chat(q, model="rag", max_tokens=32), QUESTIONS))
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(
                f"{question}  {answer.usage.completion_tokens if answer.usage else 0} tokens from {', '.join(answer.sources)}"
            )

        spans = stage_spans(Run(record))
        means = spans.spans.groupby("name", sort=False)[["queue_ns", "service_ns"]].mean() / 1e6
        print(means.rename(columns={"queue_ns": "queue ms", "service_ns": "service ms"}).round(2).to_string())
        print(f"spans explain all but {100 * spans.unexplained:.2f} % of every request's latency")


if __name__ == "__main__":
    main()
