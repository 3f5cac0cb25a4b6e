"""Server-sent events, cut out of whatever pieces the network made of them."""

from __future__ import annotations


class Events:
    """WHATWG HTML, 9.2.6, as far as OpenAI's API uses it: the data of each event; names, ids and comments are dropped."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are complete by now."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:  # never inside JSON, where it is escaped
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        return [payload for event in events if (payload := _payload(event))]

    def end(self) -> list[bytes]:
        """No more comes: an event that was not closed by a blank line counts."""
        rest, self._rest = self._rest, b""
        payload = _payload(rest.rstrip())
        return [payload] if payload else []


def _payload(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)
