"""``python -m sage_bench`` is ``sage``."""

from __future__ import annotations

from sage_bench.cli import main

main()
