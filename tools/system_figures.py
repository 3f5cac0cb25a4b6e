"""Draw the figures of the system into ``docs/figures``, PDF and PNG: ``python tools/system_figures.py``.

The same that ``sage paper`` puts before the studies, without the modules of the layers: they change with every module, and
``docs/figures/layers.svg`` is kept fresh by ``make docs``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from document import ROOT

from sage_bench.figures.style import save
from sage_bench.publish.system.system import system_findings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures")
    options = parser.parse_args()
    for drawing in system_findings().figures:
        if drawing.name == "layers":
            continue
        for path in save(drawing.draw(), options.out / f"system_{drawing.name}"):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
