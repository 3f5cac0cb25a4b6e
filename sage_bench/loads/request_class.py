"""One class of a mix: what its requests look like, whose they are, and how urgent."""

from __future__ import annotations

from collections.abc import Mapping

from sage_bench.loads.arrivals import ArrivalProcess
from sage_bench.loads.check import shares, whole
from sage_bench.loads.lengths import TOKENS_MAX, Lengths
from sage_core.errors import ConfigError
from sage_core.slo import SloTable
from sage_core.units import RequestKind

BLOCK_TOKENS = 16
"""Tokens of the blocks in which a class states its shared prefixes: what vLLM caches by default."""

PIPELINES = {RequestKind.LLM_CHAT: "chat", RequestKind.LLM_GENERATE: "generate", RequestKind.EMBEDDING: "embed"}


class RequestClass:
    """A class of requests in a mix.

    kind: chat, generate or embedding. share: fraction of the load's requests; null takes what the other classes leave.
    tenants: one name, or names with their shares of the class. priority: 0 is interactive, larger is less urgent.
    pipeline: defaults to chat, generate or embed by kind. input_tokens, output_tokens: length distributions (a trace
    brings its own). output_tokens_max: the client's cap on output, the only bound that a policy may know; it is one
    number for the class, and it cuts the drawn length, as an engine would. prefixes: how many shared prompt prefixes
    the class uses, the k-th most popular one with weight 1/k; 0 for none. prefix_tokens: how long each is, so that an
    engine with a prefix cache computes it once (in whole blocks of 16); a shorter prompt is all prefix. arrivals: a process of its own, at its share
    of the load's rate; otherwise it takes its share of the load's common process.
    """

    def __init__(
        self,
        kind: str,
        share: float | None = None,
        tenants: str | Mapping[str, float | None] = "default",
        priority: int = 0,
        pipeline: str | None = None,
        input_tokens: Lengths | None = None,
        output_tokens: Lengths | None = None,
        output_tokens_max: int | None = None,
        prefixes: int = 0,
        prefix_tokens: int = 0,
        arrivals: ArrivalProcess | None = None,
    ) -> None:
        if kind not in SloTable.KINDS:
            raise ConfigError(f"load.classes: kind: expected one of {', '.join(SloTable.KINDS)}, got {kind!r}")
        self.kind = RequestKind(SloTable.KINDS.index(kind))
        self.share = share
        self.tenants = shares("load.classes.tenants", {tenants: 1.0} if isinstance(tenants, str) else tenants)
        self.priority = whole("load.classes.priority", priority, 0, 2**31 - 1)
        self.pipeline = PIPELINES[self.kind] if pipeline is None else pipeline
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.output_tokens_max = (
            None
            if output_tokens_max is None
            else whole("load.classes.output_tokens_max", output_tokens_max, 1, TOKENS_MAX)
        )
        self.prefixes = whole("load.classes.prefixes", prefixes, 0)
        self.prefix_tokens = whole("load.classes.prefix_tokens", prefix_tokens, 0, TOKENS_MAX)
        if self.prefix_tokens and not self.prefixes:
            raise ConfigError("load.classes.prefix_tokens: prefixes of no class; set load.classes.<name>.prefixes too")
        if 0 < self.prefix_tokens < BLOCK_TOKENS:
            raise ConfigError(
                f"load.classes.prefix_tokens: {self.prefix_tokens} is less than one block, and only whole blocks of "
                f"{BLOCK_TOKENS} tokens are shared; give at least {BLOCK_TOKENS}, or 0 to share nothing"
            )
        self.arrivals = arrivals
        if self.kind is RequestKind.EMBEDDING and (output_tokens is not None or output_tokens_max is not None):
            raise ConfigError(
                "load.classes: an embedding generates nothing; leave output_tokens and output_tokens_max out"
            )
