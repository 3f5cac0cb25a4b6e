"""What a client asks a pipeline, out of the body of its chat request."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from sage_core.units import RequestKind
from sage_live import errors
from sage_live.call import Call

REFUSED: Final = ("tools", "response_format", "logprobs", "functions")
"""What a pipeline would have to leave out, and its client would miss."""


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class _Body(msgspec.Struct):
    messages: list[_Message]


_decode_messages = msgspec.json.Decoder(_Body).decode


def question(call: Call) -> str:
    """The text of the messages, one after another. ApiError (400) for what a pipeline cannot be asked."""
    if call.kind is not RequestKind.LLM_CHAT:
        raise errors.bad_request(f"{call.model} is a pipeline: ask it at /v1/chat/completions.", param="model")
    fields: dict[str, Any] = msgspec.json.decode(call.body)
    for key in REFUSED:
        if fields.get(key):
            raise errors.bad_request(f"{call.model} is a pipeline, which knows no {key}; leave it out.", param=key)
    if fields.get("n") not in (None, 1):
        raise errors.bad_request(f"{call.model} is a pipeline, which gives one answer; leave n out.", param="n")
    try:
        messages = _decode_messages(call.body).messages
    except msgspec.ValidationError as error:
        raise errors.bad_request(f"messages: {error}.", param="messages", code="invalid_value") from None
    texts = []
    for message in messages:
        for part in message.content if isinstance(message.content, list) else [_Part("text", message.content)]:
            if part.type != "text":
                raise errors.bad_request(f"{call.model} is a pipeline, which takes text only.", param="messages")
            texts.append(part.text or "")
    asked = "\n".join(texts)
    if not asked.strip():
        raise errors.bad_request(
            f"{call.model} is a pipeline: ask it something; the messages have no text.", param="messages"
        )
    return asked
