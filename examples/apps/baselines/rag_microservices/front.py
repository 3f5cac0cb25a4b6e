"""The front service: POST /ask {"question"} gives an answer and its sources."""

from __future__ import annotations

from typing import Any

from service import configuration, post, serve


def main() -> None:
    config = configuration()

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        question = request["question"]
        passages = post(config["retriever"], {"question": question})["passages"]
        answer = post(config["generator"], {"question": question, "passages": passages})["answer"]
        return {"answer": answer, "sources": [{"source": each["source"], "start": each["start"]} for each in passages]}

    serve(config, "/ask", ask)


if __name__ == "__main__":
    main()
