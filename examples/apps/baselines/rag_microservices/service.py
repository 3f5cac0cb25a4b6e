"""What the three services share: configuration, JSON over HTTP, engines with retries, a bound on requests at once."""

from __future__ import annotations

import itertools
import json
import random
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import yaml
from openai import APIConnectionError, InternalServerError, OpenAI, OpenAIError, RateLimitError

from sage_core.errors import SageError

T = TypeVar("T")
Handler = Callable[[dict[str, Any]], dict[str, Any]]


class UpstreamError(Exception):
    """Another service failed, or did not answer."""


def configuration() -> dict[str, Any]:
    """The file that the command line names, with its ``key=value`` over it."""
    if len(sys.argv) < 2:
        print(f"usage: {sys.argv[0]} CONFIG.yaml [key=value ...]")
        sys.exit(0)
    with open(sys.argv[1], encoding="utf-8") as file:
        config: dict[str, Any] = yaml.safe_load(file)
    for override in sys.argv[2:]:
        key, _, value = override.partition("=")
        if key not in config:
            sys.exit(f"{key}: no such key in {sys.argv[1]}; expected one of {', '.join(config)}")
        config[key] = yaml.safe_load(value)
    return config


def serve(config: dict[str, Any], path: str, handle: Handler) -> None:
    """POST a JSON object to ``path``, get one back, until SIGINT or SIGTERM."""
    places = threading.BoundedSemaphore(config["requests_max"])

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # connections that wait to be accepted; the default of 5 loses bursts

    class Http(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one segment, or the second waits for a delayed acknowledgement of the first

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.path != path:
                self.answer(404, {"error": f"no such path; POST {path}"})
            elif not places.acquire(timeout=config["queue_s"]):
                self.answer(503, {"error": "too many requests at once"})
            else:
                try:
                    self.answer(200, handle(json.loads(body)))
                except (OpenAIError, SageError, UpstreamError) as error:
                    self.answer(502, {"error": str(error)})
                except (ValueError, KeyError) as error:
                    self.answer(400, {"error": f"not the request that is expected: {error!r}"})
                finally:
                    places.release()

        def do_GET(self) -> None:
            self.answer(200 if self.path == "/health" else 404, {})

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            if config["log"]:
                super().log_message(format, *arguments)

    server = Server((config["host"], config["port"]), Http)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"http://{config['host']}:{server.server_port}{path}", flush=True)
    with server:
        server.serve_forever()


class Engines:
    """The engines of one kind, in turn; after a failure that may pass, the next one."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.attempts, self.backoff_s = config["attempts"], config["backoff_s"]
        timeout_s = config["timeout_s"]
        self.clients = [
            OpenAI(base_url=f"{url}/v1", api_key="-", timeout=timeout_s, max_retries=0) for url in config["engines"]
        ]
        self.turns = itertools.count()

    def ask(self, call: Callable[[OpenAI], T]) -> T:
        for attempt in itertools.count(1):
            try:
                return call(self.clients[next(self.turns) % len(self.clients)])
            except (APIConnectionError, InternalServerError, RateLimitError):
                if attempt == self.attempts:
                    raise
            time.sleep(self.backoff_s * 2**attempt * random.random())
        raise AssertionError


def post(config: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """What the service ``config`` answers. Raises UpstreamError."""
    request = urllib.request.Request(
        config["url"], json.dumps(content).encode(), {"content-type": "application/json"}, method="POST"
    )
    for attempt in itertools.count(1):
        try:
            with urllib.request.urlopen(request, timeout=config["timeout_s"]) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            with error:
                told = f"{config['url']}: {error.code} {error.read().decode(errors='replace')}"
            if error.code < 500 or attempt == config["attempts"]:
                raise UpstreamError(told) from error
        except (OSError, ValueError) as error:
            if attempt == config["attempts"]:
                raise UpstreamError(f"{config['url']}: {error}") from error
        time.sleep(config["backoff_s"] * 2**attempt * random.random())
    raise AssertionError
