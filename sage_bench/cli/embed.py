"""``sage embed serve``: an embedding model by sentence-transformers behind OpenAI's API.

Imports nothing of the simulator, because it may run in another environment than the rest: torch is large.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from sage_bench.cli.leave import leave
from sage_core.errors import SageError
from sage_live.ports import choose_port
from sage_live.processes import python_with
from sage_live.servers.embedding import EmbeddingServer
from sage_live.servers.encoder import SentenceEncoder
from sage_live.servers.run import serve_until_stopped

app = typer.Typer(help="Embedding engines: serve one.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def embed() -> None:
    """Embedding engines: serve one."""


@app.command("serve")
def serve(
    model: Annotated[str, typer.Argument(help="A sentence-transformers model: a folder, or its name on the hub.")],
    name: Annotated[str | None, typer.Option("--model", help="Name to serve under; default: MODEL.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: SAGE_EMBEDDING_PORT, 8090.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0: its own choice.")] = 0,
    max_batch: Annotated[int, typer.Option(min=1, help="Most texts of a batch.")] = 32,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a batch, padding included.")] = 16384,
) -> None:
    """Serve an embedding model in the foreground until Ctrl-C."""
    python = python_with(
        "sentence_transformers", "`pip install sentence-transformers`, or `make install-live` in a checkout"
    )
    if python != sys.executable:
        os.execv(python, [python, "-m", "sage_bench.cli.embed", *sys.argv[sys.argv.index("serve") :]])
    encoder = SentenceEncoder(model, device, threads)

    async def start() -> list[EmbeddingServer]:
        server = await EmbeddingServer.start(
            encoder,
            name or model,
            host=host,
            port=choose_port("embedding") if port is None else port,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
        )
        print(f"http://{host}:{server.port} serves {name or model} on {device}", flush=True)
        return [server]

    serve_until_stopped(start)


if __name__ == "__main__":
    try:
        app(prog_name="sage embed")
    except SageError as error:
        leave(error)
