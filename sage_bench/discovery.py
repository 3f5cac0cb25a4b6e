"""What an engine says of itself before it is put in service."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from sage_core.errors import ConfigError, EngineError
from sage_live.http.client import endpoint
from sage_live.http_engine import EngineSpec

VERSION_S = 2.0
"""What an engine may take to say which it is."""


def check_url(name: str, url: str) -> None:
    """ConfigError that begins with ``name`` where ``url`` is none that an engine can be reached at."""
    try:
        endpoint(url)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def models_of(url: str, *, wait_s: float = 0.0, api_key: str | None = None) -> list[str]:
    """Names from the ``/v1/models`` of an engine, which may take ``wait_s`` to come up. EngineError naming the URL."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/models", headers=headers)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5.0) as answer:
                return _names(json.load(answer))
        except (OSError, ValueError, urllib.error.URLError) as error:
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"engine {url}: /v1/models cannot be read ({error}); start the engine first, or name its model"
                ) from error
        time.sleep(0.2)


def model_of(url: str, *, wait_s: float = 0.0, api_key: str | None = None) -> str:
    """The one model of an engine. ConfigError where it has none or several."""
    names = models_of(url, wait_s=wait_s, api_key=api_key)
    if len(names) != 1:
        raise ConfigError(f"engine {url}: serves {', '.join(names) or 'no model'}; say which with model=NAME")
    return names[0]


async def versions_of(specs: Sequence[EngineSpec]) -> dict[str, str]:
    """By URL: what each engine says it is, "unknown" where it does not; all are asked at once."""
    found = await asyncio.gather(*(asyncio.to_thread(_version, spec) for spec in specs))
    return {spec.url: version for spec, version in zip(specs, found, strict=True)}


def _version(spec: EngineSpec) -> str:
    headers = {} if spec.api_key is None else {"Authorization": f"Bearer {spec.api_key}"}
    request = urllib.request.Request(f"{spec.url.rstrip('/')}/version", headers=headers)
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        with urllib.request.urlopen(request, timeout=VERSION_S) as answer:
            told = json.load(answer)
        if isinstance(told, dict):
            return str(told.get("version", "unknown"))
    return "unknown"


def _names(told: Any) -> list[str]:
    if not isinstance(told, dict) or not isinstance(told.get("data"), list):
        raise ValueError("not OpenAI's list of models")
    return [str(card["id"]) for card in told["data"] if isinstance(card, dict) and "id" in card]
