"""What a client asked for, from three features: endpoint path, body shape, model name.

The endpoint says what is asked, and where it is unknown (a gateway mounted elsewhere, a batch file) the shape of the
body does; the model name decides when neither speaks, and contradicts them when the model cannot do what is asked. Two
features that disagree are the client's mistake: an error that names both, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from sage_core.errors import ConfigError
from sage_core.units import RequestKind

ENDPOINTS: Final[Mapping[str, RequestKind]] = {
    "chat/completions": RequestKind.LLM_CHAT,
    "completions": RequestKind.LLM_GENERATE,
    "embeddings": RequestKind.EMBEDDING,
}
"""Last components of a path, the longer ones first."""

SHAPES: Final[Mapping[str, RequestKind]] = {
    "messages": RequestKind.LLM_CHAT,
    "prompt": RequestKind.LLM_GENERATE,
    "input": RequestKind.EMBEDDING,
}
"""Body keys that say what is asked."""

EMBEDDING_NAME: Final = re.compile(r"embed|minilm|(^|[/_-])(bge|e5|gte)-", re.IGNORECASE)
"""Model names that mean an embedding model, where no registry says otherwise."""

KNOWN_MAX: Final = 1024
"""Combinations of features a classifier remembers."""


class ClassificationError(ConfigError):
    """The request contradicts itself, or says nothing about what it wants. The client's fault (HTTP 400)."""


class RequestClassifier:
    """Pure: endpoint, model and body in, :class:`RequestKind` out.

    models: what is known about served models, by exact name. ``EMBEDDING``, or either LLM kind for a model that
    generates. It overrides what :data:`EMBEDDING_NAME` would say.
    """

    def __init__(self, models: Mapping[str, RequestKind] | None = None) -> None:
        self._models = dict(models or {})
        self._known: dict[tuple[object, ...], RequestKind] = {}

    def classify(self, endpoint: str, model: str = "", body: Collection[str] = ()) -> RequestKind:
        """The kind of one request.

        endpoint: the path, with or without prefix and query; "" when there is none. model: its name, "" when absent.
        body: the body's top-level keys (a mapping will do). Raises :class:`ClassificationError`.
        """
        # A server sees few endpoints and models, again and again; a hostile client must not fill memory with others.
        features = (endpoint, model, *[key in body for key in SHAPES])
        kind = self._known.get(features)
        if kind is None:
            kind = self._classify(endpoint, model, body)
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[features] = kind
        return kind

    def _classify(self, endpoint: str, model: str, body: Collection[str]) -> RequestKind:
        asked = self._asked(endpoint, body)
        served = self._served(model)
        if asked is None and served is None:
            raise ClassificationError(
                f"cannot classify: endpoint {endpoint!r}, model {model!r} and body keys {sorted(body)} say nothing; "
                f"expected an endpoint ending in {', '.join(ENDPOINTS)}, or one of the keys {', '.join(SHAPES)}"
            )
        if asked is None:
            assert served is not None
            return served[0]
        kind, why = asked
        if served is not None and (kind is RequestKind.EMBEDDING) != (served[0] is RequestKind.EMBEDDING):
            raise ClassificationError(
                f"{why} asks for {_word(kind)}, but model {model!r} is {served[1]} as {_word(served[0])}; "
                "send it to the other endpoint, or register the model's kind"
            )
        return kind

    def _asked(self, endpoint: str, body: Collection[str]) -> tuple[RequestKind, str] | None:
        """What endpoint and body say together, and which of them said it."""
        shapes = [key for key in SHAPES if key in body]
        path = endpoint.partition("?")[0].strip("/")
        known = next((tail for tail in ENDPOINTS if path == tail or path.endswith(f"/{tail}")), None)
        if known is not None:
            wanted = ENDPOINTS[known]
            if shapes and all(SHAPES[key] is not wanted for key in shapes):
                raise ClassificationError(
                    f"endpoint {endpoint!r} asks for {_word(wanted)}, but the body has {shapes[0]!r}, "
                    f"which asks for {_word(SHAPES[shapes[0]])}; correct one of them"
                )
            return wanted, f"endpoint {endpoint!r}"
        if len(shapes) > 1:
            raise ClassificationError(
                f"endpoint {endpoint!r} is unknown and the body has both {shapes[0]!r} and {shapes[1]!r}; keep one"
            )
        return (SHAPES[shapes[0]], f"body key {shapes[0]!r}") if shapes else None

    def _served(self, model: str) -> tuple[RequestKind, str] | None:
        if model in self._models:
            return self._models[model], "registered"
        return (RequestKind.EMBEDDING, "named") if EMBEDDING_NAME.search(model) else None


def _word(kind: RequestKind) -> str:
    return {RequestKind.LLM_CHAT: "chat", RequestKind.LLM_GENERATE: "generation", RequestKind.EMBEDDING: "embedding"}[
        kind
    ]
