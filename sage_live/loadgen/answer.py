"""Reading answers: when content came, how many pieces, what the server counted, and what was wrong.

Sans-I/O: bytes of a body come in with the instant of the read, facts are read off afterwards. Only what is measured is
decoded; msgspec skips the rest of each JSON value.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sage_live.loadgen.schema import Error


class _Usage(msgspec.Struct):
    prompt_tokens: int = -1
    completion_tokens: int = -1


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Answer(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    data: list[msgspec.Raw] = []
    usage: _Usage | None = None


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode


class Answer:
    """The body of one response, piece by piece. Counts are -1 where the server told none."""

    __slots__ = ("_rest", "chunks", "done", "error", "first_ns", "gaps", "input_tokens", "last_ns", "output_tokens")

    def __init__(self) -> None:
        self.gaps: list[int] = []
        self.begin()

    def begin(self) -> None:
        """For the next response."""
        self._rest = b""
        self.done = False
        self.error = Error.NONE
        self.chunks = 0
        self.first_ns = self.last_ns = self.input_tokens = self.output_tokens = -1
        self.gaps.clear()

    def piece(self, data: bytes) -> None:
        """A piece of a body that is JSON."""
        self._rest = self._rest + data if self._rest else data

    def stream(self, data: bytes, now: int) -> None:
        """A piece of a body that is server-sent events, read at ``now``."""
        if self._rest:
            data = self._rest + data
        events = data.split(b"\n\n")
        if b"\r" in data:  # some servers end lines the other way; within JSON it would be escaped
            events = data.replace(b"\r\n", b"\n").split(b"\n\n")
        self._rest = events.pop()
        for event in events:
            if event.startswith(b"data: {"):
                self._event(event[6:], now)
            else:
                self._other(event, now)

    def end(self, streamed: bool) -> Error:
        """The body is complete: what was wrong with it."""
        if self.error:
            return self.error
        if streamed:
            return Error.NONE if self.done else Error.TRUNCATED
        try:
            answer = _decode_answer(self._rest)
        except msgspec.MsgspecError:
            return Error.MALFORMED
        if answer.usage is not None:
            self._used(answer.usage)
        return Error.NONE if answer.choices or answer.data else Error.MALFORMED

    def _other(self, event: bytes, now: int) -> None:
        """An event with a comment, several fields, or the end."""
        data = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        if data == [b"[DONE]"]:
            self.done = True
        elif data:
            self._event(b"\n".join(data), now)

    def _event(self, data: bytes, now: int) -> None:
        try:
            event = _decode_event(data)
        except msgspec.MsgspecError:
            self.error = self.error or Error.MALFORMED
            return
        if event.usage is not None:
            self._used(event.usage)
        if event.error is not None:
            self.error = self.error or Error.EVENT
        for choice in event.choices:
            delta = choice.delta
            if (delta is not None and delta.content) or _has_content(choice):
                if self.chunks:
                    self.gaps.append(now - self.last_ns)
                else:
                    self.first_ns = now
                self.chunks += 1
                self.last_ns = now
                break

    def _used(self, usage: _Usage) -> None:
        self.input_tokens, self.output_tokens = usage.prompt_tokens, usage.completion_tokens


def _has_content(choice: _Choice) -> bool:
    """Whether an event marks a token. One that only opens the message (a role) or ends it does not; one with empty text
    in between does: a token that completes no character yet."""
    delta = choice.delta
    if delta is None:
        return bool(choice.text) or (choice.text is not None and choice.finish_reason is None)
    if delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls:
        return True
    return delta.content is not None and delta.role is None and choice.finish_reason is None
