"""The retriever service: POST /search {"question"} gives passages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from service import Engines, configuration, serve

from sage_live.retrieval.index import VectorIndex
from sage_live.retrieval.rerank import rerank


def main() -> None:
    config = configuration()
    index = VectorIndex.load(Path(config["index"]))
    engines = Engines(config)

    def search(request: dict[str, Any]) -> dict[str, Any]:
        question = request["question"]
        embedded = engines.ask(lambda engine: engine.embeddings.create(model=index.model, input=question))
        found = index.search(np.asarray(embedded.data[0].embedding, np.float32), config["found"])
        hits = rerank(question, found, config["kept"])
        return {
            "passages": [{"text": hit.chunk.text, "source": hit.chunk.source, "start": hit.chunk.start} for hit in hits]
        }

    serve(config, "/search", search)


if __name__ == "__main__":
    main()
