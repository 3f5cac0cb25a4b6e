"""The shipped parameters are what the fitting tool makes of the measured traces."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_synth", ROOT / "tools" / "fit_synth.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_synth"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "trace", "about", "arrivals"),
    [
        ("azure2023_conv", "trace_azure2023_conv", "AZURE", True),
        ("ragpulse_query", "trace_ragpulse_embedding_derived", "RAGPULSE", False),
    ],
)
def test_shipped_parameters_are_reproduced(
    name: str, trace: str, about: str, arrivals: bool, tool: ModuleType, measured: Path
) -> None:
    shipped = yaml.safe_load((ROOT / "sage_bench" / "traces" / f"synth_{name}.yaml").read_text())
    again = tool.fitted(measured / f"{trace}.parquet", getattr(tool, about), arrivals=arrivals)
    assert_close(again, shipped, name)


def test_the_documentation_quotes_the_shipped_numbers() -> None:
    text = " ".join((ROOT / "docs" / "loads.md").read_text().split())
    chat, query = (
        yaml.safe_load((ROOT / "sage_bench" / "traces" / f"synth_{name}.yaml").read_text())
        for name in ("azure2023_conv", "ragpulse_query")
    )
    good = chat["goodness"]
    fano, gap = good["arrivals"]["fano_10s"], good["arrivals"]["gap_cv"]
    low, high = fano["synth_p5_p95"]
    for quoted in (
        f"{good['prompt_tokens']['ks_distance']:.3f} (prompt) and {good['output_tokens']['ks_distance']:.3f} (output)",
        f"the trace is {good['prompt_output_rank_correlation']['trace']:.2f}",
        f"gamma gaps (CV {chat['arrivals']['cv']:.2f}) under a log-normal rate with CV {chat['arrivals']['rate_cv']:.2f}",
        f"a correlation time of {chat['arrivals']['correlation_s']:.0f} s",
        f"{fano['trace']:.2f} in the trace, {fano['synth']:.2f} on average over generated hours (90 % between {low:.2f} and {high:.2f})",
        f"CV of gaps {gap['trace']:.2f} and {gap['synth']:.2f}",
        f"for embedding requests: distance {query['goodness']['prompt_tokens']['ks_distance']:.3f}",
        f"one hour, {chat['rows']:,} requests ({chat['license']}",
    ):
        assert quoted in text


def assert_close(found: Any, expected: Any, at: str) -> None:
    """Equal structure and text; numbers to a thousandth, as another processor may round differently."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), at
        for key, value in expected.items():
            assert_close(found[key], value, f"{at}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for i, value in enumerate(expected):
            assert_close(found[i], value, f"{at}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), at
    else:
        assert found == expected, at
