"""The generator service: POST /generate {"question", "passages"} gives an answer."""

from __future__ import annotations

from typing import Any

from service import Engines, configuration, serve


def main() -> None:
    config = configuration()
    engines = Engines(config)

    def generate(request: dict[str, Any]) -> dict[str, Any]:
        passages = "\n\n".join(f"[{passage['source']}] {passage['text']}" for passage in request["passages"])
        completion = engines.ask(
            lambda engine: engine.chat.completions.create(
                model=config["model"],
                messages=[
                    {"role": "system", "content": config["instruction"]},
                    {"role": "user", "content": f"{passages}\n\nQuestion: {request['question']}\nAnswer:"},
                ],
                max_tokens=config["answer_tokens_max"],
            )
        )
        return {"answer": completion.choices[0].message.content}

    serve(config, "/generate", generate)


if __name__ == "__main__":
    main()
