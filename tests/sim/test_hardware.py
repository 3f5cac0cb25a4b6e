"""The facts about devices load, agree with the tables they come from, and give power by utilisation."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from sage_core.errors import DataError
from sage_sim.hardware import device_facts, facts
from sage_sim.profile import load_profile, profile_names

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "tools"))

from profile_fit.energy import busy_fractions  # noqa: E402

needs_data = pytest.mark.skipif(
    not (DATA / "hardware_specs.csv").exists(), reason="calibration tables are not in ../shared/data"
)
PRICED = {
    "a100_sxm": "p4de.24xlarge",
    "h100_sxm": "p5.4xlarge",
    "h200_sxm": "p5en.48xlarge",
    "b200_sxm": "p6-b200.48xlarge",
    "l40s": "g6e.xlarge",
    "l4": "g6.xlarge",
    "t4": "g4dn.xlarge",
    "cpu-cascade-lake-16vcpu": "c7i.4xlarge",
}


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_runs_on_a_known_device(name: str) -> None:
    hardware = load_profile(name).hardware
    known = facts(hardware.device)
    assert known is not None
    if hardware.memory_gib is not None:
        assert known.memory_gib == hardware.memory_gib
    if hardware.tdp_w is not None:
        assert known.tdp_w == hardware.tdp_w


@pytest.mark.parametrize("device", device_facts())
def test_a_fact_has_its_source(device: str) -> None:
    known = device_facts()[device]
    assert len(known.source) > 20
    assert known.power is None or len(known.power.source) > 20
    assert known.price is None or (known.price.source and known.price.date.startswith("2026-"))


def test_power_by_hand() -> None:
    # 400 W: 0.17 idle, 0.98 prefilling, 0.57 decoding.
    known = facts("a100_sxm")
    assert known is not None
    assert (known.idle_w, known.decode_w, known.prefill_w) == pytest.approx((68.0, 228.0, 392.0))


def test_what_is_not_known_is_none() -> None:
    assert facts("abacus") is None
    known = facts("b200_sxm")
    assert known is not None and known.idle_w is None  # the device is known, its power is not


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {kind: gpu, source: s, tdp: 3}", r"at \[\.\.\.\]: .*tdp"),
        ("a: {kind: tpu, source: s}", r"at \[\.\.\.\]\.kind: "),
        ("a: {kind: gpu, source: s, tdp_w: -3}", "tdp_w: expected a finite number above 0, got -3.0"),
        ("a: {kind: gpu, source: s, power: {idle: 0.9, prefill: 1, decode: 0.5, source: s}}", "idle <= prefill"),
        (
            "a: {kind: gpu, source: s, price: {usd_per_hour: .inf, sku: x, date: d, source: s}}",
            "usd_per_hour: expected",
        ),
        ("a: [", "not valid YAML at line"),
    ],
)
def test_broken_facts_are_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        device_facts(path)
    assert str(path) in str(caught.value)


def test_absent_facts_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        device_facts(tmp_path / "none.yaml")


@needs_data
def test_sizes_are_those_of_the_table() -> None:
    with (DATA / "hardware_specs.csv").open(newline="") as file:
        rows = {row["device"]: row for row in csv.DictReader(file)}
    columns = {
        "tdp_w": "tdp_w",
        "memory_gib": "mem_gib",
        "bandwidth_gb_s": "mem_bw_gb_s",
        "bf16_tflops": "bf16_dense_tflops",
        "fp8_tflops": "fp8_dense_tflops",
    }
    compared = 0
    for name, known in device_facts().items():
        for ours, theirs in columns.items():
            if name in rows and rows[name][theirs]:
                assert getattr(known, ours) == pytest.approx(float(rows[name][theirs]), rel=1e-4), (name, ours)
                compared += 1
    assert compared > 30


@needs_data
def test_prices_are_those_of_the_table() -> None:
    with (DATA / "prices.csv").open(newline="") as file:
        rows = {row["sku"]: row for row in csv.DictReader(file) if row["provider"] == "aws"}
    priced = {name: known.price for name, known in device_facts().items() if known.price}
    assert priced.keys() == PRICED.keys()
    for name, price in priced.items():
        row = rows[PRICED[name]]
        assert PRICED[name] in price.sku and price.date == row["price_date"]
        assert price.usd_per_hour == pytest.approx(float(row["usd_per_device_hour"]), rel=1e-4)


@needs_data
def test_busy_power_is_that_of_the_measurements() -> None:
    power = device_facts()["a100_sxm"].power
    assert power is not None and power.measured
    measured = busy_fractions(DATA)
    for phase, fraction in (("prefill", power.prefill), ("decode", power.decode)):
        told = measured[phase]
        assert told.groups == 4
        assert fraction == pytest.approx(told.mean, abs=0.005)
        assert told.lowest <= fraction <= told.highest
