"""From arrivals to requests on the wire, ahead of time: what is left at the instant of sending is one write."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from sage_core.errors import ConfigError
from sage_core.load import Arrival, Arrivals, ColumnLoad, Contents, Load
from sage_core.slo import SloTable
from sage_core.units import MILLISECOND, NEVER, RequestKind
from sage_live.loadgen.options import Model, Options, header_safe
from sage_live.loadgen.prompts import Prompts

PATHS = {
    RequestKind.LLM_CHAT: "/v1/chat/completions",
    RequestKind.LLM_GENERATE: "/v1/completions",
    RequestKind.EMBEDDING: "/v1/embeddings",
}
_PROMPT = {
    RequestKind.LLM_CHAT: ('"messages":[{"role":"user","content":', "}]"),
    RequestKind.LLM_GENERATE: ('"prompt":', ""),
    RequestKind.EMBEDDING: ('"input":', ""),
}
_TEMPLATES_KEPT = 10_000
BYTES_AHEAD = 64 << 20


class Share(NamedTuple):
    """Requests whose id leaves ``rest`` when divided by ``of``: this process's part of a load."""

    rest: int
    of: int


WHOLE = Share(0, 1)


class Item(NamedTuple):
    """A request ready to send; ordered by ``at`` (ns since the start), then id.

    line and rest: its bytes, between which a header goes that depends on the start.
    """

    at: int
    request: int
    kind: int
    streamed: bool
    line: bytes
    rest: bytes
    input_tokens: int
    output_tokens: int


class _Template(NamedTuple):
    """What requests of one class have in common. Bytes with the places of an id, token counts, a length and a prompt."""

    line: bytes
    head: bytes
    before: bytes
    after: bytes
    prompts: Prompts
    streamed: bool


_Class: TypeAlias = tuple[str, int, str, int, int, int, int]
"""Pipeline, kind, tenant, priority, spans to the TTFT and end-to-end due times (ns or NEVER), cap on output tokens."""


class Encoder:
    """Turns arrivals into items."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._address = options.address()
        self._templates: dict[_Class, _Template] = {}
        self.objective_ns: int = NEVER
        """The tightest objective met so far: a span, NEVER where there is none."""

    def item(self, arrival: Arrival) -> Item:
        """One arrival."""
        at, r, output_tokens, contents, _ = arrival
        return self._item(
            at,
            r.request,
            (
                r.pipeline,
                r.kind,
                r.tenant,
                r.priority,
                _span(r.ttft_due_at, at),
                _span(r.due_at, at),
                r.output_tokens_max,
            ),
            r.input_tokens,
            output_tokens,
            contents,
        )

    def items(self, load: Load | ColumnLoad, share: Share = WHOLE) -> Iterator[Item]:
        """All of an open loop's arrivals in time order, or the first of each closed-loop user; those of ``share``."""
        if isinstance(load, ColumnLoad):
            for columns in load.columns():
                yield from self.of_columns(columns, share)
        else:
            yield from (self.item(a) for a in load.arrivals() if a.request.request % share.of == share.rest)

    def of_columns(self, c: Arrivals, share: Share) -> Iterator[Item]:
        """Arrivals in columns."""
        first = (share.rest - c.first) % share.of
        rows = slice(first, None, share.of)
        at = c.at[rows].tolist()
        classes = zip(
            map(c.pipelines.__getitem__, c.pipeline[rows].tolist()),
            c.kind[rows].tolist(),
            map(c.tenants.__getitem__, c.tenant[rows].tolist()),
            c.priority[rows].tolist(),
            map(_span, c.ttft_due_at[rows].tolist(), at),
            map(_span, c.due_at[rows].tolist(), at),
            c.output_tokens_max[rows].tolist(),
            strict=True,
        )
        return map(
            self._item,
            at,
            range(c.first + first, c.first + len(c.at), share.of),
            classes,
            c.input_tokens[rows].tolist(),
            c.output_tokens[rows].tolist(),
            [None] * len(at) if c.contents is None else c.contents[rows],
        )

    def _item(
        self,
        at: int,
        request: int,
        of: _Class,
        input_tokens: int,
        output_tokens: int,
        contents: Contents | None,
    ) -> Item:
        template = self._templates.get(of) or self._template(of)
        prompt, input_tokens = template.prompts.prompt(request, input_tokens, contents)
        asked = output_tokens if self._options.fixed_lengths else of[6]
        if of[1] == RequestKind.EMBEDDING:
            asked, body = 0, b"%b%b%b" % (template.before, prompt, template.after)
        elif self._options.fixed_lengths:
            body = b'%b%b%b,"max_tokens":%d,"min_tokens":%d}' % (template.before, prompt, template.after, asked, asked)
        else:
            body = b'%b%b%b,"max_tokens":%d}' % (template.before, prompt, template.after, asked)
        told = (request, input_tokens, len(body)) if template.prompts.exact else (request, len(body))
        rest = template.head % told + body
        return Item(at, request, of[1], template.streamed, template.line, rest, input_tokens, asked)

    def _template(self, of: _Class) -> _Template:
        pipeline, kind, _, _, ttft_ns, e2e_ns, _ = of
        self.objective_ns = min(self.objective_ns, ttft_ns, e2e_ns)
        if (
            len(self._templates) >= _TEMPLATES_KEPT
        ):  # objectives that differ by request: nothing to gain by keeping them
            self._templates.clear()
        model = self._model(pipeline)
        streamed = self._options.stream and kind != RequestKind.EMBEDDING
        template = _Template(
            f"POST {self._address.base}{PATHS[RequestKind(kind)]} HTTP/1.1\r\n".encode(),
            self._head(of, model.prompts).encode(),
            *self._body(RequestKind(kind), model.name, streamed),
            model.prompts,
            streamed,
        )
        self._templates[of] = template
        return template

    def _model(self, pipeline: str) -> Model:
        try:
            return self._options.models[pipeline]
        except KeyError:
            known = ", ".join(self._options.models)
            raise ConfigError(
                f"models: the load asks for pipeline {pipeline!r}, which has no model; known: {known}"
            ) from None

    def _head(self, of: _Class, prompts: Prompts) -> str:
        _, kind, tenant, priority, ttft_ns, e2e_ns, cap = of
        address = self._address
        host = f"[{address.host}]" if ":" in address.host else address.host
        lines = [f"host: {host}:{address.port}", "content-type: application/json"]
        if self._options.api_key is not None:
            lines.append(f"authorization: Bearer {self._options.api_key}")
        lines += [f"x-sage-tenant: {header_safe('tenant', tenant)}", f"x-sage-priority: {priority}"]
        for name, span_ns in (("ttft", ttft_ns), ("e2e", e2e_ns)):
            if span_ns < NEVER:
                lines.append(f"x-sage-{name}-ms: {span_ns / MILLISECOND:.10g}")
        if self._options.fixed_lengths and kind != RequestKind.EMBEDDING:
            # max_tokens then tells the true length, which no policy may know: the cap to decide by comes beside it.
            lines.append(f"x-sage-output-tokens-max: {cap}")
        fixed = "\r\n".join(lines).replace("%", "%%") + "\r\nx-request-id: %d\r\n"
        if prompts.exact:  # an estimate is not told: the server then counts for itself
            fixed += "x-sage-input-tokens: %d\r\n"
        return fixed + "content-length: %d\r\n\r\n"

    def _body(self, kind: RequestKind, model: str, streamed: bool) -> tuple[bytes, bytes]:
        before, after = _PROMPT[kind]
        fields: dict[str, object] = dict(self._options.body.get(SloTable.KINDS[kind], {}))
        if streamed:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        if kind != RequestKind.EMBEDDING and self._options.fixed_lengths:
            fields["ignore_eos"] = True
        more = json.dumps(fields, separators=(",", ":"))[1:-1]
        after += f",{more}" if more else ""
        if kind == RequestKind.EMBEDDING:
            after += "}"
        return f'{{"model":{json.dumps(model)},{before}'.encode(), after.encode()


class Agenda:
    """Items to come, soonest first: a look-ahead of an open loop's, bounded in number and memory, and what users ask
    next."""

    def __init__(self, items: Iterator[Item], ahead: int) -> None:
        self._items = items
        self._ahead = ahead
        self._heap: list[Item] = []
        self._bytes = 0
        self._more = True

    def fill(self, number: int) -> None:
        """Make up to ``number`` more items, unless enough wait."""
        heap = self._heap
        while self._more and number > 0 and len(heap) < self._ahead and self._bytes < BYTES_AHEAD:
            item = next(self._items, None)
            if item is None:
                self._more = False
                return
            self.add(item)
            number -= 1

    def add(self, item: Item) -> None:
        """A closed-loop user's next request."""
        self._bytes += len(item.rest)
        heapq.heappush(self._heap, item)

    def next_at(self) -> int:
        """Instant of the next item, NEVER if there is none."""
        if not self._heap:
            self.fill(1)
        return self._heap[0].at if self._heap else NEVER

    def pop(self) -> Item:
        """The next item; ``next_at`` has said that there is one."""
        item = heapq.heappop(self._heap)
        self._bytes -= len(item.rest)
        return item


def _span(due_at: int, at: int) -> int:
    return NEVER if due_at == NEVER else due_at - at
