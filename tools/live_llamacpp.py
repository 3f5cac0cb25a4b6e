"""llama.cpp's HTTP server over one GGUF: ``llama-server``, from the build that the package ``xllamacpp`` carries.

Runs in the virtual environment of the live engines; it binds to 127.0.0.1 and serves until it is killed:
``.sage/live/bin/python tools/live_llamacpp.py model.gguf --alias smollm2-135m --port 8001``.
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp  # type: ignore[import-not-found]

SLOTS = 4
"""Requests decoded at once; llama.cpp shares the context among its slots."""

CONTEXT_TOKENS = 2048 * SLOTS


def main() -> None:
    """Serve as the arguments say."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("gguf")
    arguments.add_argument("--alias", required=True, help="the model name that requests use")
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--embeddings", action="store_true", help="serve embeddings instead of text")
    given = arguments.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = given.gguf
    params.model_alias = {given.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = given.port
    params.n_ctx = CONTEXT_TOKENS
    params.n_parallel = SLOTS
    params.cpuparams.n_threads = given.threads
    params.cpuparams_batch.n_threads = given.threads
    params.endpoint_metrics = True
    if given.embeddings:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(params)
    print(f"llama.cpp {xllamacpp.__version__} on {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
