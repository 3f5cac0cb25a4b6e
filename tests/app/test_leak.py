"""A run leaves nothing behind: sweeps and notebooks make many in one process."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from sage_bench.compose import make_driver, make_parts
from sage_bench.config import checked, composed


@pytest.mark.parametrize("mechanism", ["native", "reference"])
@pytest.mark.parametrize("load", ["standard", "closed"])
def test_everything_a_run_was_made_of_is_freed(mechanism: str, load: str, tmp_path: Path) -> None:
    """The collector cannot see references in native code, so there must be no cycle through it."""
    more = ["load.requests=40", "load.duration_s=null", f"mechanism={mechanism}"]
    config, _ = checked(composed([f"results={tmp_path}", "cluster=shared", f"load={load}", *more]))
    parts = make_parts(config)
    driver = make_driver(parts)
    driver.run()
    assert driver.counts.responded == 40
    left = [weakref.ref(each) for each in (driver, parts.load, driver._plane)]
    del driver, parts
    gc.collect()
    assert [each() for each in left] == [None] * 3
