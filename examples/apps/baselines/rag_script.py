"""RAG as a script against the engines' own APIs: embed, search, rerank, generate; retries, limits, time-outs by hand.

    python rag_script.py --index docs.index --embed-url http://127.0.0.1:8090 \
        --llm-url http://127.0.0.1:8001 --llm-model smollm2 "How is an engine ejected?"
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from openai import APIConnectionError, AsyncOpenAI, InternalServerError, OpenAIError, RateLimitError

from sage_core.errors import SageError
from sage_live.retrieval.index import Hit, VectorIndex
from sage_live.retrieval.rerank import rerank

EMBED_TIMEOUT_S = 10.0
LLM_TIMEOUT_S = 120.0
CONNECTIONS_PER_ENGINE = 16
ATTEMPTS = 3
BACKOFF_S = 0.5
PASSAGES_FOUND = 8
PASSAGES_KEPT = 3
ANSWER_TOKENS_MAX = 128
INSTRUCTION = "Answer from the passages. Name the sources that you used. If they do not say, say so."

T = TypeVar("T")


class Engines:
    """The engines of one kind, in turn; after a failure that may pass, the next one."""

    def __init__(self, urls: list[str], timeout_s: float) -> None:
        clients = [AsyncOpenAI(base_url=f"{url}/v1", api_key="-", timeout=timeout_s, max_retries=0) for url in urls]
        self.turns = itertools.cycle(clients)
        self.places = asyncio.Semaphore(CONNECTIONS_PER_ENGINE * len(urls))

    async def ask(self, call: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
        async with self.places:
            for attempt in itertools.count(1):
                try:
                    return await call(next(self.turns))
                except (APIConnectionError, InternalServerError, RateLimitError):
                    if attempt == ATTEMPTS:
                        raise
                await asyncio.sleep(BACKOFF_S * 2**attempt * random.random())
        raise AssertionError


async def answer(
    question: str, index: VectorIndex, embedders: Engines, llms: Engines, options: argparse.Namespace
) -> str:
    embedded = await embedders.ask(lambda engine: engine.embeddings.create(model=index.model, input=question))
    found = index.search(np.asarray(embedded.data[0].embedding, np.float32), PASSAGES_FOUND)
    hits = rerank(question, found, PASSAGES_KEPT)
    completion = await llms.ask(
        lambda engine: engine.chat.completions.create(
            model=options.llm_model,
            messages=[
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": prompt(question, hits)},
            ],
            max_tokens=ANSWER_TOKENS_MAX,
        )
    )
    sources = "\n".join(f"[{n}] {hit.chunk.source}, from character {hit.chunk.start}" for n, hit in enumerate(hits, 1))
    return f"{completion.choices[0].message.content}\n{sources}"


def prompt(question: str, hits: list[Hit]) -> str:
    passages = "\n\n".join(f"[{hit.chunk.source}] {hit.chunk.text}" for hit in hits)
    return f"{passages}\n\nQuestion: {question}\nAnswer:"


async def answers(options: argparse.Namespace) -> int:
    index = VectorIndex.load(options.index)
    embedders, llms = Engines(options.embed_url, EMBED_TIMEOUT_S), Engines(options.llm_url, LLM_TIMEOUT_S)
    given = await asyncio.gather(
        *(answer(question, index, embedders, llms, options) for question in options.question), return_exceptions=True
    )
    failed = 0
    for question, each in zip(options.question, given, strict=True):
        if isinstance(each, OpenAIError | SageError):
            failed += 1
            print(f"{question}\nfailed: {each}", file=sys.stderr)
        elif isinstance(each, BaseException):
            raise each
        else:
            print(f"{question}\n{each}\n")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Answer questions from an index, with sources.")
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--embed-url", action="append", required=True, help="of an engine; may be repeated")
    parser.add_argument("--llm-url", action="append", required=True, help="of an engine; may be repeated")
    parser.add_argument("--llm-model", required=True)
    parser.add_argument("question", nargs="+")
    if len(sys.argv) == 1:
        parser.print_help()
        return 0
    try:
        return asyncio.run(answers(parser.parse_args()))
    except SageError as error:  # the index
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
