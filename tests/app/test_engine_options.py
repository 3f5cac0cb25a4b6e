"""What an engine may be configured to do, from the configuration to what it does; native and reference alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sage_bench.results.manifest import read_manifest
from sage_bench.run import RunResult
from sage_core.errors import ConfigError

Go = Callable[..., RunResult]

ONE = (
    "experiment=mixed", "load=standard", "load.rate=6", "load.requests=60", "load.duration_s=null", "policy=fifo", "slo=none",
    "warmup_s=0", "cooldown_s=0",
)  # fmt: skip
H100 = "{node: gpu, llm: {profile: llama-3.1-8b-h100-tp1%s}}"


def cluster(llm: str = "", **device: Any) -> str:
    more = "".join(f", {key}: {value}" for key, value in device.items())
    return f"cluster.devices=[{(H100 % llm)[:-1]}{more}}}]"


def mean_ms(result: RunResult, column: str) -> float:
    return float(pc.mean(pq.read_table(result.folder / "requests.parquet")[column]).as_py()) / 1e6


def both(go: Go, *overrides: str) -> RunResult:
    """The run, after the reference has given the same digest."""
    native = go(*overrides)
    assert go(*overrides, "mechanism=reference").finish.digest == native.finish.digest
    return native


class TestPrefixCache:
    SHARED = ("+load.classes.chat.prefixes=1", "+load.classes.chat.prefix_tokens=480")

    def test_what_is_shared_is_computed_once(self, go: Go) -> None:
        cached = both(go, *ONE, *self.SHARED, cluster())
        plain = both(go, *ONE, *self.SHARED, cluster(", prefix_caching: false"))
        assert mean_ms(cached, "ttft_ns") < 0.8 * mean_ms(plain, "ttft_ns")

    def test_without_anything_shared_it_changes_nothing(self, go: Go) -> None:
        cached, plain = (go(*ONE, cluster(f", prefix_caching: {on}")) for on in ("true", "false"))
        assert cached.finish.digest == plain.finish.digest

    def test_blocks_that_do_not_divide(self, go: Go) -> None:
        with pytest.raises(
            ConfigError, match=r"block_size of replica 0: .*blocks of 16 tokens, which is not a multiple of 64"
        ):
            go(*ONE, *self.SHARED, cluster(", block_size: 64"))


class TestOptions:
    def test_speculation_shortens_the_time_between_tokens(self, go: Go) -> None:
        drafts = ", speculative: {num_speculative_tokens: 3, acceptance_rate: 0.8}"
        assert mean_ms(both(go, *ONE, cluster(drafts)), "tpot_ns") < 0.6 * mean_ms(go(*ONE, cluster()), "tpot_ns")

    def test_the_host_takes_its_time(self, go: Go) -> None:
        host = ", host: {api_server_s: 0.02, scheduler_s: 0.03, detokenizer_token_s: 0.0001}"
        slow, fast = both(go, *ONE, cluster(host)), go(*ONE, cluster())
        assert mean_ms(slow, "ttft_ns") > mean_ms(fast, "ttft_ns") + 20
        assert mean_ms(slow, "tpot_ns") > 29  # the scheduler is the longer of the two

    def test_a_request_longer_than_the_model_fails(self, go: Go) -> None:
        result = both(go, *ONE, cluster(", max_model_len: 600"))
        assert result.counts.failed == 60
        assert any("600" in warning for warning in result.warnings), result.warnings

    def test_stages_of_a_pipeline(self, go: Go) -> None:
        piped = both(go, *ONE, cluster(", pipeline_parallel: 2, pipeline_hop_s: 0.001"))
        assert mean_ms(piped, "tpot_ns") > mean_ms(go(*ONE, cluster()), "tpot_ns") + 0.5
        (device,) = read_manifest(piped.folder).devices
        assert device.count == 2

    def test_a_device_that_loads_its_weights_is_away_longer(self, go: Go) -> None:
        fault = "cluster.faults=[{at_s: 2, device: 0, restart_after_s: 1}]"
        loading = both(go, *ONE, cluster(", startup_s: 5, weights_gib_per_s: 2"), fault)
        joined = [replica.joined_ns / 1e9 for replica in read_manifest(loading.folder).replicas]
        assert joined == [0.0, pytest.approx(2 + 1 + 5 + 16.06e9 / 2**31, abs=0.01)]


class TestSharedDevice:
    MIXED = ("experiment=mixed", "load.requests=80", "load.duration_s=null", "load.rate=40", "policy=fifo")
    EMBED = "{profile: bge-large-en-v1.5-h100}"
    ROOM = ", gpu_memory_utilization: 0.8"

    def test_mps_runs_both_at_once(self, go: Go) -> None:
        mps = "{llm_share: 0.7, embed_share: 0.3, saturation: 0.5}"
        shares = both(go, *self.MIXED, cluster(self.ROOM, embed=self.EMBED, mps=mps))
        turns = both(go, *self.MIXED, cluster(self.ROOM, embed=self.EMBED))
        assert shares.counts.responded == turns.counts.responded == 80
        assert shares.finish.digest != turns.finish.digest

    @pytest.mark.parametrize(
        ("device", "says"),
        [
            (cluster(", kv_tokens: 600000"), "gpu: its replicas need .* GiB and it has 80.00 GiB"),
            (cluster(", gpu_memory_utilization: 0.99", embed=EMBED), "gpu: its replicas need .*; lower kv_tokens"),
            (cluster(mps="{llm_share: 0.7, embed_share: 0.3, saturation: 0.5}"), r"mps: shares are for an LLM and an embedding"),
            (
                cluster(ROOM, embed=EMBED, mps="{llm_share: 0.7, embed_share: 0.4, saturation: 0.5}"),
                r"devices\[0\]\.mps: expected shares of 1 in all, got 0\.7 \+ 0\.4",
            ),
            (cluster(", speculative: {num_speculative_tokens: 2, acceptance_rate: 1.5}"), "acceptance_rate: expected .*1"),
            (cluster(", watermark: 1.5"), "llm.watermark: expected .*1"),
        ],
    )  # fmt: skip
    def test_what_cannot_be(self, go: Go, device: str, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            go(*self.MIXED, device)


def test_a_run_that_leaves_its_profile_says_so(go: Go) -> None:
    result = go(*ONE, "load.requests=3", "load.classes.chat.input_tokens.value=60000", cluster(", kv_tokens: 200000"))
    assert any("prompt_tokens = " in warning and "is extrapolated" in warning for warning in result.warnings)


class TestDisaggregated:
    APART = (
        "cluster.devices=[{{node: gpu, price_per_h: 20.0, disaggregated: {{prefill: {{profile: llama-3.1-8b-h100-tp1}}, "
        "decode: {{profile: llama-3.1-8b-h100-tp1}}, prefill_engines: 2, link: {{gb_per_s: {}, latency_s: 0.001}}}}}}]"
    )

    def test_keys_and_values_take_their_time(self, go: Go) -> None:
        fast, slow = both(go, *ONE, self.APART.format(400.0)), go(*ONE, self.APART.format(1.0))
        # 512 tokens of 131,072 bytes: 67 ms over 1 GB/s, and some wait for the link.
        assert 66 < mean_ms(slow, "ttft_ns") - mean_ms(fast, "ttft_ns") < 95
        (device,) = read_manifest(fast.folder).devices
        assert device.count == 3
        assert device.power is not None and device.power.idle_w < device.power.prefill_w

    def test_it_stands_for_itself(self, go: Go) -> None:
        embed = self.APART.format(1.0).replace("disaggregated:", "embed: {profile: bge-m3-h100}, disaggregated:")
        with pytest.raises(ConfigError, match=r"devices\[0\]\.disaggregated: stands for devices of its own"):
            go(*ONE, embed)


class TestPrice:
    TP4 = "cluster.devices=[{{node: gpu{}, llm: {{profile: llama-2-70b-h100-tp4}}}}]"

    def test_what_is_not_given_is_listed_for_all_devices(self, go: Go) -> None:
        assert read_manifest(go(*ONE, self.TP4.format("")).folder).price_per_h == pytest.approx(4 * 6.88, rel=0.01)

    def test_a_price_of_one_device_for_four_is_noted(self, go: Go) -> None:
        result = go(*ONE, self.TP4.format(", price_per_h: 6.88"))
        assert any("price_per_h is 6.88 USD for 4 x h100_sxm, listed at" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("llm", "says"),
    [
        (", kv_tokens: 20000, gpu_memory_utilization: 0.5", "kv_tokens, gpu_memory_utilization: both say how large"),
        (", max_model_len: 1000000", "max_model_len: .* has 131072 positions, got 1000000"),
        (", weights_gib_per_s: 1.0e300", "weights_gib_per_s: expected"),
    ],
)
def test_what_contradicts(go: Go, llm: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        go(*ONE, cluster(llm))


def test_too_many_devices(go: Go) -> None:
    with pytest.raises(ConfigError, match=r"expected at most 100,000 devices in all, got 1,000,000,000"):
        go(*ONE, cluster(count=1_000_000_000))


def test_a_prior_is_announced_as_one(go: Go) -> None:
    result = go(*ONE, "load.requests=2", "cluster.devices=[{node: l4, llm: {profile: llama-3.1-8b-l4-tp1}}]")
    assert any("a prior from data sheets, nothing of this model was measured" in warning for warning in result.warnings)
