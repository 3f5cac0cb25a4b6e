"""How every figure looks: one column wide, readable in print, in grey, and by colour-blind readers; the same bytes twice.

Arms are told apart by colour and line style together. Colours: Okabe and Ito's palette. Fonts are embedded as TrueType
(``fonttype`` 42), which publishers ask for. No date is written into a file, so the same rows give the same PDF and PNG.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sage_bench.results.writer import output_error

WIDTH_IN: Final = 3.4
"""One column of a two-column page."""

DPI: Final = 300

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
DASHES: Final[Sequence[Any]] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)), (0, (3, 4)))
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES: Final = ("", "///", "...", "xxx", "---", "\\\\\\\\", "ooo", "++")

_RC: Final[dict[str, Any]] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so it is the same everywhere
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.4,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "sage",
}

SOURCES: Final = {
    "simulation": "simulated",
    "live": "measured on live engines",
    "emulated": "live code on emulated engines",
}


def line(arm: int) -> dict[str, Any]:
    """Colour and line style of the ``arm``-th curve; the pairs repeat only after 64."""
    return {"color": COLOURS[arm % len(COLOURS)], "ls": DASHES[(arm + arm // len(COLOURS)) % len(DASHES)]}


def bar(arm: int) -> dict[str, Any]:
    """Colour and hatch of the ``arm``-th bar."""
    return {"color": COLOURS[arm % len(COLOURS)], "hatch": HATCHES[(arm + arm // len(COLOURS)) % len(HATCHES)]}


@contextmanager
def styled(rows: int = 1, height_in: float = 2.2, **kwargs: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of ``rows`` panels above each other, ``height_in`` inches tall in all, in this style."""
    with matplotlib.rc_context(_rc()):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, squeeze=False, **kwargs)[:, 0]
        yield figure, list(axes)


def legend_above(figure: Figure, axes: Axes) -> None:
    """The legend of ``axes`` above all panels, outside the data: as many columns as its labels leave room for, and the
    figure as much taller as its rows need. Nothing if there is nothing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        entry_in = 0.45 + 0.06 * max(map(len, labels))  # 7 points are 0.06 inches a character
        columns = max(1, min(len(labels), int(WIDTH_IN / entry_in)))
        figure.set_figheight(figure.get_figheight() + 0.14 * (-(-len(labels) // columns) - 1))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, columnspacing=1.2)


def plain_log(axis: Axis) -> None:
    """Ticks of a log axis as plain numbers: the decades, and 2 and 5 between them where there are few. Set limits first."""
    low, high = axis.get_view_interval()
    few = math.log10(high / low) < 2
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem``.pdf and ``stem``.png, whose folder is made if need be. Raises :class:`OutputError`."""
    pdf, png = stem.with_name(f"{stem.name}.pdf"), stem.with_name(f"{stem.name}.png")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_rc()):  # fonts are embedded now, not when drawn
            figure.savefig(pdf, metadata={"CreationDate": None})
            figure.savefig(png, dpi=DPI, metadata={"Software": None})
    except OSError as error:
        raise output_error(stem, error) from error
    return [pdf, png]


def _rc() -> Any:
    """This style over matplotlib's defaults, whatever the user's own settings are."""
    return {**{str(key): value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}, **_RC}
