"""One client's request on its way: what was asked, where the answer goes, what has become of it so far.

Payloads live here and only here: the control plane sees ids and sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from sage_core.units import RequestKind
from sage_live.errors import ApiError

if TYPE_CHECKING:
    from sage_core._native import StreamRelay
    from sage_live.pipelines.run import PipelineRun


class Answer(Protocol):
    """Where an answer goes: an HTTP client of the gateway, or a caller in this process.

    Either :meth:`complete`, or :meth:`begin`, pieces, :meth:`finish`; or :meth:`fail` at any time before the end.
    """

    def complete(self, status: int, body: bytes, content_type: bytes) -> None:
        """The whole answer."""

    def begin(self, content_type: bytes) -> None:
        """A stream (status 200) begins."""

    def piece(self, data: bytes) -> None:
        """Whole server-sent events."""

    def finish(self, data: bytes) -> None:
        """The stream is complete with ``data``, its last events; may be empty."""

    def fail(self, error: ApiError) -> None:
        """There is no answer, or no more of it."""


class Flow(Protocol):
    """Where a stream comes from."""

    def pause(self) -> None:
        """Send no more for now."""

    def resume(self) -> None:
        """Go on."""


class Call:
    """``path`` and ``body`` are what an engine is sent.

    Instants are nanoseconds of the driver's clock, -1 where it has not happened.
    """

    __slots__ = (
        "answer",
        "arrived_ns",
        "begun",
        "body",
        "deadline_ns",
        "dispatched_ns",
        "engine",
        "error",
        "exact",
        "first_token_ns",
        "flow",
        "given_up",
        "idle",
        "input_tokens",
        "kind",
        "model",
        "output_tokens",
        "path",
        "prompt_tokens",
        "relay",
        "reply",
        "reply_type",
        "request",
        "run",
        "stream",
        "tail",
        "tenant",
        "traceparent",
        "usage_asked",
        "verdict",
    )

    def __init__(
        self,
        answer: Answer,
        kind: RequestKind,
        model: str,
        path: str,
        body: bytes,
        *,
        tenant: str = "default",
        stream: bool = False,
        usage_asked: bool = False,
    ) -> None:
        self.answer = answer
        self.kind = kind
        self.model = model
        self.path = path
        self.body = body
        self.tenant = tenant
        self.stream = stream
        self.usage_asked = usage_asked
        self.traceparent: bytes | None = None
        """Sent to the engine (W3C Trace Context), where the request is traced."""
        self.request = -1
        self.run: PipelineRun | None = None
        """Of a request for a declared pipeline: its stages, each of which is a call of its own."""
        self.flow: Flow | None = None
        """Of a stream: the engine's end, which can be told to wait."""
        self.relay: Callable[[], StreamRelay | None] | None = None
        """Of a stream that began: makes what writes its chunks as the engine frames them (sage_live.http.request.Request.relay).
        None where the answer wants whole events through :meth:`Answer.piece`."""
        self.begun = False
        """Whether any of the stream has left."""
        self.tail = b""
        """Of a stream: the last of it, which goes with its end."""
        self.reply = b""
        self.reply_type = b"application/json"
        self.error: ApiError | None = None
        """What went wrong in the last try, to be told if it was the last."""
        self.verdict: tuple[int, bytes] | None = None
        """What an engine said was wrong with the request itself: status and body."""
        self.engine = ""
        self.idle = False
        """Whether the engine that it was last sent to had nothing else to do."""
        self.exact: int | None = None
        """Tokens of the prompt as its client counted them."""
        self.input_tokens = 0
        """As told to the plane: exact or estimated."""
        self.prompt_tokens = 0
        """As counted by the engine, where it says."""
        self.output_tokens = 0
        self.arrived_ns = self.dispatched_ns = self.first_token_ns = -1
        self.deadline_ns = 0
        self.given_up: ApiError | None = None
        """Why we cancelled it, where its client did not."""
