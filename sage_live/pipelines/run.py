"""One request on its way through a declared pipeline: what each stage is sent, and what came of it.

The plane says when a stage runs and where. Here are the payloads: prompts and inputs are made when a stage is dispatched,
from the results of those before it, which are kept until the request ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from sage_core.commands import Task
from sage_core.declared import (
    REQUEST,
    Branch,
    Chat,
    Embed,
    Filter,
    Generate,
    Item,
    Join,
    Latest,
    Map,
    Placed,
    Rerank,
    Retrieve,
    Tool,
)
from sage_core.errors import DataError
from sage_core.pipeline import Stage
from sage_core.units import RequestKind
from sage_live.call import Answer, Call
from sage_live.errors import ApiError
from sage_live.pipelines import values
from sage_live.pipelines.pipeline import LivePipeline
from sage_live.pipelines.values import Passage, Value
from sage_live.retrieval.chunk import Chunk
from sage_live.retrieval.index import Hit
from sage_live.retrieval.rerank import rerank
from sage_live.wire import COUNT_MAX

_encode = msgspec.json.Encoder().encode
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")
_DATA: Final = b"data: "
_OBJECT: Final = b"data: {"
_DONE: Final = b"data: [DONE]\n\n"


class _Nobody(Answer):
    """Results of inner stages go to no client."""

    def complete(self, status: int, body: bytes, content_type: bytes) -> None: ...
    def begin(self, content_type: bytes) -> None: ...
    def piece(self, data: bytes) -> None: ...
    def finish(self, data: bytes) -> None: ...
    def fail(self, error: ApiError) -> None: ...


_NOBODY: Final = _Nobody()


class PipelineRun:
    """``call``: the client's. ``text``: what it asked. models: what the engines of a pool serve, by pool."""

    def __init__(self, pipeline: LivePipeline, call: Call, text: str, models: Mapping[str, str]) -> None:
        self._pipeline = pipeline
        self._call = call
        self._models = models
        self._values: dict[str, Value] = {REQUEST: text}
        self._calls: dict[str, Call] = {}  # the last one of each stage that an engine does
        self._streamed: Call | None = None
        self._sources: dict[str, None] = {}

    # --- stages of engines ----------------------------------------------------------------------------------------

    def stage_call(self, task: Task) -> Call:
        """What an engine is sent for ``task``. DataError where the result of an earlier stage cannot be read."""
        stage = self._pipeline.pipeline.stages[task.stage]
        (placed,) = self._pipeline.declared.stages[task.stage]
        each = placed.declaration
        outer = self._call
        model = self._models[stage.op.pool]
        if isinstance(each, Embed):
            body = _encode({"model": model, "input": self._prompt_of(placed, each.of)})
            made = Call(_NOBODY, RequestKind.EMBEDDING, model, "/v1/embeddings", body, tenant=outer.tenant)
        elif isinstance(each, Chat | Generate):
            for name in _PLACEHOLDER.findall(each.prompt):
                self._use(self.value(placed.inputs[name]))
            prompt = _PLACEHOLDER.sub(lambda found: self._prompt_of(placed, found[1]), each.prompt)
            fields: dict[str, Any] = {
                "model": model,
                "max_tokens": task.output_tokens_max,
                "temperature": each.temperature,
            }
            streams = outer.stream and isinstance(each, Chat) and stage.index == self._pipeline.pipeline.output
            if isinstance(each, Chat):
                system = [{"role": "system", "content": each.system}] if each.system else []
                fields["messages"] = [*system, {"role": "user", "content": prompt}]
            else:
                fields["prompt"] = prompt
            if streams:
                fields["stream"] = True
                if outer.usage_asked:
                    fields["stream_options"] = {"include_usage": True}
            kind = RequestKind.LLM_CHAT if isinstance(each, Chat) else RequestKind.LLM_GENERATE
            path = "/v1/chat/completions" if isinstance(each, Chat) else "/v1/completions"
            answer = _Streamed(self, outer) if streams else _NOBODY
            made = Call(
                answer,
                kind,
                model,
                path,
                _encode(fields),
                tenant=outer.tenant,
                stream=streams,
                usage_asked=outer.usage_asked,
            )
            if streams:
                self._streamed = made
                outer.flow = _Through(made)
        else:
            raise DataError(f"stage {placed.name}: {type(each).__name__.lower()} is no work for an engine")
        made.request = outer.request
        made.arrived_ns = outer.arrived_ns
        made.input_tokens = task.input_tokens
        made.exact = task.input_tokens  # for emulated engines; others count themselves
        made.traceparent = outer.traceparent
        self._calls[placed.name] = made
        return made

    def _prompt_of(self, placed: Placed, name: str) -> str:
        return values.text(self.value(placed.inputs[name]))

    # --- results --------------------------------------------------------------------------------------------------

    def value(self, name: str) -> Value:
        """The result of a stage that has one. DataError: an engine's answer says nothing."""
        found = self._values.get(name)
        if found is None:
            found = self._values[name] = self._made(name)
        return found

    def _made(self, name: str) -> Value:
        call = self._calls.get(name)
        if call is not None:
            return _result(name, call)
        stage, placed = self._pipeline.placed[name]
        each = placed.declaration
        if isinstance(each, Item):
            whole = self.value(placed.inputs[each.of])
            return values.part(whole, each.number, self._count_of(stage))
        there = [self.value(maker) for maker in placed.inputs.values() if self._there(maker)]
        if isinstance(each, Join):
            return values.passages(there)
        if isinstance(each, Latest) and there:
            return there[-1]
        raise DataError(f"stage {name}: it has no result")

    def _there(self, name: str) -> bool:
        """Whether that stage ran."""
        if name in self._values or (name in self._calls and self._calls[name].reply):
            return True
        stage, placed = self._pipeline.placed[name]
        return stage.free and self._allowed(stage) and any(self._there(maker) for maker in placed.inputs.values())

    def _allowed(self, stage: Stage) -> bool:
        """Whether the branches that it depends on said so."""
        for on, least, most in stage.guards:
            outcome = self._values.get(self._pipeline.declared.stages[on][-1].name)
            if not isinstance(outcome, int) or not least <= outcome <= most:
                return False
        return True

    def _count_of(self, stage: Stage) -> int:
        """Into how many parts the value of an item is cut: what the branch said, as far as the fan-out goes."""
        stages = self._pipeline.pipeline.stages
        count = self._values[self._pipeline.declared.stages[stage.inputs[1]][-1].name]
        siblings = sum(1 for each in stages if each.inputs == stage.inputs and each.op is stage.op)
        assert isinstance(count, int)
        return max(1, min(count, siblings))

    # --- stages of functions --------------------------------------------------------------------------------------

    async def perform(self, task: Task) -> int:
        """Do the work of a stage that is done here; the size of its result. ToolError, DataError."""
        result: Value = 0
        for placed in self._pipeline.declared.stages[task.stage]:
            result = self._values[placed.name] = await self._performed(placed)
        return min(values.size(result), COUNT_MAX)

    async def _performed(self, placed: Placed) -> Value:
        each = placed.declaration
        if isinstance(each, Retrieve):
            query = self.value(placed.inputs[each.query])
            hits = self._pipeline.indexes[each.index].search(query, each.k)  # type: ignore[arg-type]  # checked: a vector
            return self._found(hits)
        if isinstance(each, Rerank):
            found = self.value(placed.inputs[each.passages])
            assert isinstance(found, list)
            given = [Hit(Chunk(one.text, one.source, 0, number), one.score) for number, one in enumerate(found)]
            return self._found(rerank(values.text(self.value(placed.inputs[each.query])), given, each.keep))
        function = self._pipeline.functions.get(placed.name)
        if isinstance(each, Filter):
            whole = self.value(placed.inputs[each.of])
            assert isinstance(whole, list) and function is not None
            return [one for one in whole if await function.call(one.text)]
        assert isinstance(each, Tool | Map | Branch)
        names = [each.of] if isinstance(each.of, str) else each.of
        given_values = [self.value(placed.inputs[name]) for name in names]
        if isinstance(each, Branch):
            return await self._decided(each, placed, given_values)
        assert function is not None
        for value in given_values:
            self._use(value)
        result = await function.call(*map(values.argument, given_values))
        if isinstance(result, list | tuple):
            return "\n".join(map(str, result))
        return result if isinstance(result, str) else _encode(result).decode()

    async def _decided(self, each: Branch, placed: Placed, given: list[Value]) -> int:
        function = self._pipeline.functions.get(placed.name)
        if function is not None:
            outcome = int(await function.call(*map(values.argument, given)))
            if not 0 <= outcome <= COUNT_MAX:
                side = "below" if outcome < 0 else "above"
                raise DataError(
                    f"stage {placed.name}: a branch decides for a number from 0 to {COUNT_MAX:,}, and this one is {side}"
                )
            return outcome
        words = (each.contains or "").lower()
        return int(any(words in values.text(value).lower() for value in given))

    def _use(self, value: Value) -> None:
        """Something is made from it: the answer has the sources of passages that were."""
        if isinstance(value, list):
            self._sources.update((each.source, None) for each in value if each.source)

    def _found(self, hits: list[Hit]) -> list[Passage]:
        return [Passage(hit.chunk.text, hit.chunk.source, hit.score) for hit in hits]

    # --- the end --------------------------------------------------------------------------------------------------

    def answer(self) -> None:
        """Every stage is done: put the answer where the service looks for it. DataError: the output cannot be read."""
        outer, streamed = self._call, self._streamed
        engines = list(self._calls.values())
        outer.prompt_tokens = sum(each.prompt_tokens for each in engines)
        outer.output_tokens = sum(each.output_tokens for each in engines)
        outer.engine = engines[-1].engine if engines else ""
        if streamed is not None:
            outer.reply_type = streamed.reply_type
            outer.first_token_ns = streamed.first_token_ns
            outer.tail = self.events(streamed.tail)
            return
        stages = self._pipeline.pipeline
        result = self.value(stages.stages[stages.output].name)
        self._use(result)
        text = values.text(result)
        head = {"id": f"chatcmpl-{outer.request}", "created": 0, "model": outer.model}
        usage = _usage(outer.prompt_tokens, outer.output_tokens)
        if outer.stream:
            choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            head["object"] = "chat.completion.chunk"
            chunks = [{**head, "choices": [choice]}]
            if outer.usage_asked:
                chunks.append({**head, "choices": [], "usage": usage})
            outer.reply_type = b"text/event-stream"
            outer.tail = self._with_sources(b"".join(b"data: %b\n\n" % _encode(each) for each in chunks) + _DONE)
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        reply = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        if self._sources:
            reply["sources"] = list(self._sources)
        outer.reply, outer.reply_type = _encode(reply), b"application/json"

    def events(self, data: bytes) -> bytes:
        """Events of the engine that answers, as those of the pipeline; the last of them follows one with the sources."""
        return self._with_sources(b"\n\n".join(map(self._event, data.split(b"\n\n"))))

    def _event(self, event: bytes) -> bytes:
        """Under the request's id and the pipeline's name; tokens are those of all stages."""
        if not event.startswith(_OBJECT):
            return event
        try:
            fields: dict[str, Any] = msgspec.json.decode(event[len(_DATA) :])
        except (msgspec.DecodeError, UnicodeDecodeError):  # the client may make more of it
            return event
        fields |= {"id": f"chatcmpl-{self._call.request}", "model": self._call.model}
        if isinstance(usage := fields.get("usage"), dict):
            before = [call for call in self._calls.values() if call is not self._streamed]
            prompts = usage.get("prompt_tokens", 0) + sum(call.prompt_tokens for call in before)
            outputs = usage.get("completion_tokens", 0) + sum(call.output_tokens for call in before)
            fields["usage"] = _usage(prompts, outputs)
        return _DATA + _encode(fields)

    def _with_sources(self, data: bytes) -> bytes:
        at = 0 if data.startswith(_DONE) else data.rfind(b"\n" + _DONE) + 1
        if not self._sources or (at == 0 and not data.startswith(_DONE)):
            return data
        head = {"id": f"chatcmpl-{self._call.request}", "object": "chat.completion.chunk", "created": 0}
        event = b"data: %b\n\n" % _encode(
            {**head, "model": self._call.model, "choices": [], "sources": list(self._sources)}
        )
        return data[:at] + event + data[at:]

    def failed(self) -> None:
        """The request has failed: what its client is told is what the stage that failed was told."""
        outer = self._call
        if outer.error is not None:  # a function failed, or a stage could not be sent
            return
        for call in self._calls.values():
            if call.error is not None:
                outer.error = call.error
            if call.verdict is not None and not outer.begun:
                outer.verdict, outer.reply_type = call.verdict, call.reply_type


class _Streamed(_Nobody):
    """The answer of the stage that answers, on its way to the client. How it ends is the service's business."""

    def __init__(self, run: PipelineRun, outer: Call) -> None:
        self._run = run
        self._outer = outer

    def begin(self, content_type: bytes) -> None:
        self._outer.begun = True
        self._outer.answer.begin(content_type)

    def piece(self, data: bytes) -> None:
        self._outer.answer.piece(self._run.events(data))


class _Through:
    """The flow of a stream that an engine's answer will be."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def pause(self) -> None:
        if self._call.flow is not None:
            self._call.flow.pause()

    def resume(self) -> None:
        if self._call.flow is not None:
            self._call.flow.resume()


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None


class _Data(msgspec.Struct):
    embedding: str | list[float]


class _Reply(msgspec.Struct):
    choices: list[_Choice] = []
    data: list[_Data] = []


def _usage(prompt_tokens: int, output_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


def _result(name: str, call: Call) -> Value:
    """What an engine answered. DataError naming the stage."""
    try:
        reply = msgspec.json.decode(call.reply, type=_Reply)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"stage {name}: the engine's answer cannot be read: {error}") from error
    if call.kind is RequestKind.EMBEDDING and reply.data:
        return values.vector(reply.data[0].embedding)
    if reply.choices:
        choice = reply.choices[0]
        if choice.message is not None:
            return choice.message.content or ""
        if choice.text is not None:
            return choice.text
    raise DataError(f"stage {name}: the engine's answer has neither a message, a text nor a vector")
