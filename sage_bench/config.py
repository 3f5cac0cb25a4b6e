"""The schema of a run's configuration: what Hydra composed, checked before anything is built.

Groups whose choice is an object (``policy``, ``load``, ``slo``) carry a ``_target_`` and are checked by the object's own
constructor; everything else is a struct here. A wrong key, type or value is one ConfigError that names the key.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

import msgspec
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sage_bench.pipelines.file import read_pipeline
from sage_core.errors import ConfigError
from sage_core.units import SECONDS_MAX
from sage_sim.faults import Fault
from sage_sim.network import NetworkConfig

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=SECONDS_MAX)]
Usd = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
"""What results may be called: a plain folder name."""

FolderName = Annotated[str, msgspec.Meta(pattern=rf"^{NAME.pattern}\Z")]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


Count = Annotated[int, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]


class SpeculativeConfig(_Strict, frozen=True):
    """Speculative decoding: so many drafts a decode, each accepted at this rate if all before it were; ``draft_s`` is
    what the drafts of an iteration take."""

    num_speculative_tokens: Positive
    acceptance_rate: Annotated[float, msgspec.Meta(ge=0, le=1)]
    draft_s: Seconds = 0.0


class HostConfig(_Strict, frozen=True):
    """CPU time of an LLM engine: of its scheduler, an iteration and per sequence in it; of its one API server, a request
    and per input token; of its detokeniser, per token."""

    scheduler_s: Seconds = 0.0
    scheduler_seq_s: Seconds = 0.0
    api_server_s: Seconds = 0.0
    api_server_token_s: Seconds = 0.0
    detokenizer_token_s: Seconds = 0.0


class MpsConfig(_Strict, frozen=True):
    """Shares of the multiprocessors by NVIDIA MPS; ``saturation``: the share that is enough to saturate the memory."""

    llm_share: Fraction
    embed_share: Fraction
    saturation: Fraction


class LlmConfig(_Strict, frozen=True):
    """An LLM engine on a device; names and defaults as in vLLM 0.19, 0 for no limit.

    kv_tokens null: what the profile says fits the device. max_model_len null: the model's own. watermark: fraction of
    the KV blocks kept free at admission. startup_s: from start to healthy after a fault, on top of reading the weights at
    ``weights_gib_per_s`` (null: not modelled). pipeline_parallel: stages, each on as many devices as the profile has;
    ``pipeline_hop_s`` from one to the next.
    """

    profile: str
    pool: str = "llm"
    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 2048
    block_size: Positive = 16
    kv_tokens: Positive | None = None
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    chunked_prefill: bool = True
    scheduling: Literal["fcfs", "priority"] = "fcfs"
    prefix_caching: bool = True
    async_scheduling: bool = True
    scheduler_reserve_full_isl: bool = True
    long_prefill_token_threshold: Count = 0
    max_num_partial_prefills: Count = 0
    max_model_len: Positive | None = None
    watermark: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    speculative: SpeculativeConfig | None = None
    host: HostConfig = HostConfig()
    ingress_s: Seconds = 0.0
    egress_s: Seconds = 0.0
    startup_s: Seconds = 0.0
    weights_gib_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    pipeline_parallel: Positive = 1
    pipeline_hop_s: Seconds = 0.0


class EmbedConfig(_Strict, frozen=True):
    """An embedding engine on a device."""

    profile: str
    pool: str = "embed"
    max_batch_tasks: Positive = 32
    max_batch_tokens: Positive = 16384
    padding: bool = True
    ingress_s: Seconds = 0.0
    egress_s: Seconds = 0.0


class OperatorConfig(_Strict, frozen=True):
    """CPU workers for retrieve, rerank, tool and the like."""

    pool: str
    workers: Positive = 1
    fixed_s: Seconds = 0.0
    input_token_s: Seconds = 0.0


class KvLinkConfig(_Strict, frozen=True):
    """What keys and values travel over, from each prefill engine."""

    gb_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)]  # 10^9 bytes
    latency_s: Seconds = 0.0


class DisaggregatedConfig(_Strict, frozen=True):
    """Prefill and decode on engines of their own, one replica to the plane (sage_sim.disaggregated)."""

    prefill: LlmConfig
    decode: LlmConfig
    link: KvLinkConfig
    prefill_engines: Positive = 1
    decode_engines: Positive = 1


class DeviceConfig(_Strict, frozen=True):
    """``count`` equal devices on one node, each with an LLM engine, an embedding engine, or both; or CPU workers.

    Two engines take turns, iteration by iteration, unless ``mps`` gives each a share of the device. ``disaggregated``
    stands for several devices that are one replica. price_per_h null: the list price of its devices, where there is one.
    """

    node: str
    count: Positive = 1
    llm: LlmConfig | None = None
    embed: EmbedConfig | None = None
    operator: OperatorConfig | None = None
    mps: MpsConfig | None = None
    disaggregated: DisaggregatedConfig | None = None
    price_per_h: Usd | None = None  # USD, of all that one of them spans (tensor and pipeline parallelism)

    @property
    def llms(self) -> list[LlmConfig]:
        """Its LLM engines, one of each kind."""
        if self.disaggregated is not None:
            return [self.disaggregated.prefill, self.disaggregated.decode]
        return [] if self.llm is None else [self.llm]

    @property
    def engines(self) -> list[LlmConfig | EmbedConfig]:
        """Those and its embedding engine."""
        return [*self.llms, *([] if self.embed is None else [self.embed])]


class ClusterConfig(_Strict, frozen=True):
    """Devices in order: their numbers are their places in this list, counted out."""

    devices: list[DeviceConfig]
    network: NetworkConfig = NetworkConfig()
    report_interval_s: Seconds = 1.0
    faults: list[Fault] = []


class SimDriverConfig(_Strict, frozen=True, tag_field="kind", tag="sim"):
    """Virtual time. ``until_s``: stop the clock there and fail what is left."""

    until_s: Annotated[float, msgspec.Meta(gt=0, le=SECONDS_MAX)] | None = None


class LiveDriverConfig(_Strict, frozen=True, tag_field="kind", tag="live"):
    """Real time: a gateway in front of real or emulated engines, and a load generator.

    engines: URLs, one for each engine of ``cluster.devices`` in order (a device's LLM engine before its embedding
    engine); empty: emulated engines are started, as the devices say. adapters: of each pool; others are ``vllm``.
    models: what the engines of a pool call their model, where that is not the pool's name. tokenizer: a tokenizer.json,
    by which prompts have exact lengths; null: about as long. exact_output: engines are told to generate as many tokens
    as the load says (``ignore_eos``); else they stop by themselves. indexes: folders of the indexes that pipelines name. stream: LLM answers are streamed. processes: of the
    load generator. drain_s: what may pass after the last arrival of an open loop; then what has no answer is given up.
    watch_core: number of the core of this machine on which the engine runs, whose speed is recorded; null: it is not.
    """

    engines: list[str] = []
    adapters: dict[str, str] = {}
    models: dict[str, str] = {}
    tokenizer: str | None = None
    exact_output: bool = True
    indexes: dict[str, str] = {}
    stream: bool = True
    processes: Positive = 1
    drain_s: Seconds = 120.0
    watch_core: Annotated[int, msgspec.Meta(ge=0)] | None = None


class RecordConfig(_Strict, frozen=True):
    """Which of the optional tables are written."""

    tasks: bool = True
    steps: bool = True


class ArmConfig(_Strict, frozen=True):
    """What a run is in a comparison, where its policy alone does not say it.

    name: in tables and figures; null: the policy. differs_in: the keys (``cluster``, ``load.rate``) beside the policy in
    which the arms of the experiment are meant to differ, the same list in each; runs that differ in any other are not
    compared with one another.
    """

    name: FolderName | None = None
    differs_in: list[str] = []


class RunConfig(_Strict, frozen=True):
    """Everything about one run."""

    name: FolderName
    arm: ArmConfig
    seed: Annotated[int, msgspec.Meta(ge=0)]
    warmup_s: Seconds
    cooldown_s: Seconds
    mechanism: Literal["native", "reference"]
    attempts_max: Positive
    results: Annotated[str, msgspec.Meta(min_length=1)]
    record: RecordConfig
    driver: SimDriverConfig | LiveDriverConfig
    cluster: ClusterConfig
    pipeline: dict[str, Any]
    policy: dict[str, Any]
    load: dict[str, Any]
    slo: dict[str, Any]


def composed(overrides: Sequence[str] = ()) -> DictConfig:
    """What ``sage run`` with these overrides would run, for use from Python: ``run(composed(["policy=fifo"]))``.

    Raises ConfigError, in one line, for a choice or a key that does not exist.
    """
    try:
        with initialize_config_module("sage_bench.conf", version_base="1.3"):
            return compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"config: {' '.join(told_by_hydra(error).split())}") from error


def told_by_hydra(error: Exception) -> str:
    """Its message without its search path, and with our schema's advice for a key that does not exist."""
    if unknown := re.match(r"Could not override '([^']+)'", str(error)):
        hint = override_hint(unknown[1])
        if hint is not None:
            return hint
    lines = itertools.takewhile(lambda line: line != "Config search path:", str(error).strip().splitlines())
    return "\n".join(line for line in lines if line.strip())


def checked(config: DictConfig | dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration as structs and as plain data. Raises ConfigError naming the key."""
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"config: {error.full_key}: expected a value; say {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {str(error).splitlines()[0]}") from error
    plain.pop("experiment", None)
    plain["pipeline"] = _pipeline(plain.get("pipeline"))
    try:
        return msgspec.convert(plain, RunConfig, strict=True), plain
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), plain)) from error


def _pipeline(node: Any) -> Any:
    """What requests may go through beside single requests, complete in itself: a file is read now, so that what a run
    writes down of itself needs no file."""
    if isinstance(node, dict) and node.get("kind") == "file":
        given = {key: value for key, value in node.items() if key != "kind"}
        if not isinstance(given.get("path"), str):
            raise ConfigError("config: pipeline.path: expected a YAML file; pipeline=file pipeline.path=PATH")
        return read_pipeline(given.pop("path")) | given  # what else is given beside it changes it
    return node


def override_hint(key: str) -> str | None:
    """What to say about an override of ``key``, which is not in the composed configuration; None where nothing is known.

    Hydra's own advice (append it with ``+``) is wrong for a misspelt key, which the schema then refuses.
    """
    parent, _, name = re.sub(r"\.(\d+)", r"[\1]", key).rpartition(".")
    known = _fields_at(parent or TOP)
    return None if not known or name in known else f"unknown key {name!r} at {parent or TOP}{_near(name, known)}"


TOP: Final = "the top level"


def _explain(message: str, plain: dict[str, Any]) -> str:
    """msgspec's message with the path first, what was there, and the nearest known key for an unknown one."""
    text, _, path = message.partition(" - at `$")
    key = path.rstrip("`").lstrip(".") or TOP
    if unknown := re.match(r"Object contains unknown field `(.+)`", text):
        return f"config: unknown key {unknown[1]!r} at {key}{_near(unknown[1], _fields_at(key))}"
    if text.startswith("Object missing"):
        return f"config: {key}: {text[0].lower()}{text[1:]}"
    got = _value_at(plain, key)
    parent, _, name = key.rpartition(".")
    kind = _STRUCTS.get(_any_index(parent or TOP))
    if kind is not None and text.startswith("Invalid enum value"):
        return f"config: {key}: expected one of {', '.join(get_args(get_type_hints(kind)[name]))}, got {got!r}"
    if "matching regex" in text:
        text = "Expected a plain folder name (letters, digits, and . _ + - after the first)"
    if text.startswith("Expected"):
        text = f"{text.partition(', got ')[0]}, got {got!r}"
    return f"config: {key}: {text[0].lower()}{text[1:]}"


_STRUCTS: Final[dict[str, type]] = {
    TOP: RunConfig,
    "arm": ArmConfig,
    "record": RecordConfig,
    "driver": SimDriverConfig,
    "driver(live)": LiveDriverConfig,
    "cluster": ClusterConfig,
    "cluster.devices[...]": DeviceConfig,
    "cluster.devices[...].llm": LlmConfig,
    "cluster.devices[...].llm.speculative": SpeculativeConfig,
    "cluster.devices[...].llm.host": HostConfig,
    "cluster.devices[...].mps": MpsConfig,
    "cluster.devices[...].disaggregated": DisaggregatedConfig,
    "cluster.devices[...].disaggregated.link": KvLinkConfig,
    "cluster.devices[...].disaggregated.prefill": LlmConfig,
    "cluster.devices[...].disaggregated.decode": LlmConfig,
    "cluster.devices[...].embed": EmbedConfig,
    "cluster.devices[...].operator": OperatorConfig,
    "cluster.network": NetworkConfig,
    "cluster.faults[...]": Fault,
}
"""The struct that each path of the configuration leads to."""


def _any_index(path: str) -> str:
    return re.sub(r"\[\d+\]", "[...]", path)


def _fields_at(path: str) -> list[str]:
    """Keys of the struct that a path such as ``cluster.devices[0].llm`` leads to."""
    kind = _STRUCTS.get(_any_index(path))
    fields = getattr(kind, "__struct_fields__", None) or getattr(kind, "__dataclass_fields__", {})
    return list(fields)


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}" if known else ""


def _value_at(plain: Any, path: str) -> Any:
    """What stands at a path such as ``cluster.devices[0].count``."""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        plain = plain[int(index)] if index else plain[key]
    return plain
