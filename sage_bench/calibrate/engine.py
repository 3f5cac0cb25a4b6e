"""What a live engine says of itself: ``/version``, ``/v1/models`` and ``/metrics``, where it has them."""

from __future__ import annotations

import json
import os
import platform
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from sage_core.errors import ConfigError, EngineError

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Facts(NamedTuple):
    """What is known before anything is measured; None where the engine does not say.

    kv_tokens: capacity of the KV cache. positions: longest sequence. host: machine that it runs on, where that is ours.
    """

    name: str
    version: str
    model: str
    positions: int | None
    kv_tokens: int | None
    kv_bytes: int | None
    block_size: int | None
    prefix_caching: bool | None
    host: Host | None


class Host(NamedTuple):
    """A machine. cpu: as its maker calls it."""

    cpu: str
    cores: int
    memory_bytes: int


class Load(NamedTuple):
    """Requests in the engine, and how many it has answered; None where it does not say."""

    busy: int | None
    answered: int | None


def ask(url: str, model: str | None) -> Facts:
    """Facts of the engine at ``url``. ConfigError: it serves another model, or several. EngineError: nothing answers."""
    cards = _json(url, "/v1/models", needed=True).get("data") or []
    served = {str(card["id"]): card for card in cards if isinstance(card, dict) and "id" in card}
    if model is None and len(served) == 1:
        (model,) = served
    if model is None or (served and model not in served):
        raise ConfigError(f"--model: expected one of {', '.join(served) or '(the engine names none)'}, got {model!r}")
    told = _json(url, "/version")
    metrics = _metrics(url)
    cache = next((labels for name, labels, _ in metrics if name == "vllm:cache_config_info"), {})
    vllm = any(name.startswith("vllm:") for name, _, _ in metrics)
    block_size, blocks = _int(cache.get("block_size")), _int(cache.get("num_gpu_blocks"))
    kv_tokens = _int(cache.get("kv_cache_size_tokens"))
    if kv_tokens is None and block_size and blocks:
        kv_tokens = (blocks - 1) * block_size  # vLLM keeps one back
    caching = cache.get("enable_prefix_caching")
    return Facts(
        name=str(told.get("engine") or ("vllm" if vllm else "openai-compatible")),
        version=str(told.get("version") or "unknown"),
        model=model,
        positions=_int(served.get(model, {}).get("max_model_len")),
        kv_tokens=kv_tokens,
        kv_bytes=_int(cache.get("kv_cache_memory_bytes")),
        block_size=block_size,
        prefix_caching=None if caching is None else caching == "True",
        host=_host() if urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") else None,
    )


def load(url: str) -> Load:
    """What ``/metrics`` says of it now."""
    samples = _metrics(url)
    busy = [float(value) for name, _, value in samples if name in _BUSY]
    answered = [float(value) for name, _, value in samples if name == "vllm:request_success_total"]
    return Load(int(sum(busy)) if busy else None, int(sum(answered)) if answered else None)


_BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")


def _host() -> Host:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        cpu = named[1] if named else cpu
    return Host(cpu, os.cpu_count() or 1, psutil.virtual_memory().total)


def _json(url: str, path: str, *, needed: bool = False) -> dict[str, Any]:
    try:
        found = json.loads(_read(url, path))
    except (OSError, ValueError, urllib.error.URLError) as error:
        if needed:
            raise EngineError(f"engine {url}: {path} cannot be read ({error}); start the engine first") from error
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(url: str) -> list[tuple[str, Mapping[str, str], str]]:
    try:
        text = _read(url, "/metrics").decode("utf-8", "replace")
    except (OSError, urllib.error.URLError):
        return []
    return [(m["name"], dict(_LABEL.findall(m["labels"] or "")), m["value"]) for m in _SAMPLE.finditer(text)]


def _read(url: str, path: str) -> bytes:
    base = url.rstrip("/").removesuffix("/v1")
    with urllib.request.urlopen(base + path, timeout=10.0) as answer:
        data: bytes = answer.read()
    return data


def _int(text: object) -> int | None:
    return int(str(text)) if str(text).isdigit() else None
