"""Figures: drawn from rows only, of print size, the same bytes twice, and never of mixed sources."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from sage_bench.figures.latency_cdf import latency_cdf
from sage_bench.figures.latency_rate import latency_rate
from sage_bench.figures.slo_attainment import slo_attainment
from sage_bench.figures.style import COLOURS, DPI, WIDTH_IN, bar, line, save
from sage_bench.figures.timeline import timeline
from sage_bench.metrics.measure import ALL
from sage_bench.metrics.summary import Summary, summarise
from sage_bench.results.reader import Run, load_runs
from sage_core.errors import DataError, OutputError
from sage_core.units import SECOND, RequestKind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, queueing: ModuleType) -> Path:
    path: Path = tmp_path_factory.mktemp("figures")
    classes = (
        queueing.Class(share=0.7),
        queueing.Class(kind=RequestKind.EMBEDDING, priority=1, share=0.3, output_tokens=0),
    )
    for rate in (30, 45, 60):
        for order in ("fifo", "priority"):
            for seed in (1, 2, 3):
                queue = queueing.Queue(rate, 0.02, 400, seed, order=order, queue_max=30, classes=classes)
                queueing.run(path / f"{order}-{rate}-{seed}", queue, overrides=(f"load.rate={rate}", f"policy={order}"))
    return path


@pytest.fixture(scope="module")
def summary(folder: Path) -> Summary:
    return summarise(load_runs(folder))


@pytest.fixture(scope="module")
def figures(summary: Summary) -> dict[str, Figure]:
    last = summary.conditions[-1]
    condition = summary.means[summary.means["condition"] == last.label]
    (sweep,) = summary.sweeps
    panels = [("chat", "ttft_ns_p50"), ("chat", "ttft_ns_p95")]
    return {
        "cdf": latency_cdf(last.arms, [("chat", "ttft_ns"), ("embedding", "e2e_ns")]),
        "timeline": timeline({name: runs[0] for name, runs in last.arms.items()}),
        "rate": latency_rate(summary.means, sweep.points, panels),
        "slo": slo_attainment(condition),
    }


@pytest.mark.parametrize("name", ["cdf", "timeline", "rate", "slo"])
def test_size_fonts_and_labels(tmp_path: Path, figures: dict[str, Figure], name: str) -> None:
    figure = figures[name]
    pdf, png = save(figure, tmp_path / "deep" / name)
    with Image.open(png) as image:
        width, height = image.size
    assert width == round(WIDTH_IN * DPI) and 1.5 * DPI < height < 5 * DPI
    content = pdf.read_bytes()
    text = content + b"".join(map(_inflated, re.findall(rb"stream\r?\n(.*?)endstream", content, re.DOTALL)))
    assert b"/Type42" in text.replace(b" ", b"") or b"/CIDFontType2" in text.replace(b" ", b""), (
        "TrueType fonts embedded"
    )
    assert b"/Type3" not in text.replace(b" ", b"")
    for axis in figure.axes:
        x, y = axis.get_xlabel() or figure.axes[-1].get_xlabel(), axis.get_ylabel() or figure.get_supylabel()
        assert x and y
    words = " ".join([axis.get_xlabel() for axis in figure.axes] + [figure.get_supylabel()])
    assert "simulated" in words, "a figure says where its numbers come from"
    assert figure.legends, "policies or spans are told apart in a legend outside the data"


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, summary: Summary) -> None:
    for name in ("a", "b"):
        last = summary.conditions[-1]
        save(latency_cdf(last.arms, [("chat", "ttft_ns")]), tmp_path / name / "cdf")
        save(timeline({name: runs[0] for name, runs in last.arms.items()}), tmp_path / name / "timeline")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_cdf_is_of_what_was_offered(figures: dict[str, Figure], summary: Summary) -> None:
    for curve, runs in zip(figures["cdf"].axes[0].lines, summary.conditions[-1].arms.values(), strict=True):
        rows = [run.frame("requests") for run in runs]
        chat = [each[each["kind"] == "chat"] for each in rows]
        offered = sum(map(len, chat))
        responded = sum(int((each["outcome"] == "responded").sum()) for each in chat)
        x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
        assert responded < offered and y[-1] == pytest.approx(responded / offered)
        assert x[-1] == pytest.approx(max(each["ttft_ns"].max() for each in chat) / SECOND)
        assert (np.diff(x) >= 0).all() and (np.diff(y) > 0).all()


def test_bars_are_the_attainment_of_the_rows(figures: dict[str, Figure], summary: Summary) -> None:
    heights = [patch.get_height() for patch in figures["slo"].axes[0].patches]
    expected = []
    for runs in summary.conditions[-1].arms.values():
        rows = [run.frame("requests") for run in runs]
        expected += [
            100 * np.mean([(each if kind == ALL else each[each["kind"] == kind])["good"].mean() for each in rows])
            for kind in (ALL, "chat", "embedding")
        ]
    assert heights == pytest.approx(expected)


def test_saturation_is_ringed(figures: dict[str, Figure], summary: Summary) -> None:
    (sweep,) = summary.sweeps
    rings = [each for each in figures["rate"].axes[0].lines if each.get_markerfacecolor() == "none"]
    assert [float(ring.get_xdata()[0]) for ring in rings] == [point.rate_rps for point in sweep.points.values()]
    assert {point.rate_rps for point in sweep.points.values()} == {45.0}


def test_timeline_spans_are_the_instants_of_the_rows(summary: Summary) -> None:
    runs = {name: members[0] for name, members in summary.conditions[-1].arms.items()}
    figure = timeline(runs, start_s=2.0, span_s=0.2, requests=1000)
    for axis, run in zip(figure.axes, runs.values(), strict=True):
        rows = run.frame("requests")
        rows = rows[rows["scheduled_ns"].between(2 * SECOND, 2.2 * SECOND)]
        bars = [(round(patch.get_x(), 9), round(patch.get_x() + patch.get_width(), 9)) for patch in axis.patches]
        chat = rows[(rows["kind"] == "chat") & (rows["outcome"] == "responded")]
        assert len(chat) > 2
        for row in chat.itertuples():
            assert (round(row.first_token_ns / SECOND, 9), round(row.ended_ns / SECOND, 9)) in bars
    with pytest.raises(DataError, match=r"no request from 1e\+06 s"):
        timeline(runs, start_s=1e6)


def test_sources_never_mix(tmp_path: Path, folder: Path, queueing: ModuleType) -> None:
    queueing.run(tmp_path / "live", queueing.Queue(30, 0.02, 400, 1), source="live")
    live, simulated = load_runs(tmp_path)[0], load_runs(folder)[0]
    with pytest.raises(DataError, match="different sources"):
        latency_cdf({"fifo": [simulated], "other": [live]}, [("chat", "ttft_ns")])
    for name in ("a", "b"):
        queueing.run(tmp_path / name, queueing.Queue(30 if name == "a" else 40, 0.02, 50, 1))
    both = summarise(load_runs(tmp_path))
    with pytest.raises(DataError, match="different sources"):
        slo_attainment(both.means)
    with pytest.raises(DataError, match="different sources"):
        latency_rate(both.means, {}, [("chat", "ttft_ns_p50")])


def test_what_cannot_be_drawn_says_so(folder: Path, summary: Summary, tmp_path: Path) -> None:
    run: Run = load_runs(folder)[0]
    with pytest.raises(DataError, match="no generate request has a ttft_ns"):
        latency_cdf({"fifo": [run]}, [("generate", "ttft_ns")])
    one = summary.means[summary.means["rate"] == 30.0]
    with pytest.raises(DataError, match="two rates or more"):
        latency_rate(one, {}, [("chat", "ttft_ns_p50")])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        save(timeline({"fifo": run}), tmp_path / "file" / "x")


def test_arms_differ_in_colour_and_in_dash() -> None:
    assert len({str(line(i)) for i in range(64)}) == len({str(bar(i)) for i in range(64)}) == 64
    assert len({str(line(i)["ls"]) for i in range(8)}) == len({to_hex(line(i)["color"]) for i in range(8)}) == 8
    luminance = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (bytes.fromhex(c[1:]) for c in COLOURS[:2])]
    assert abs(luminance[0] - luminance[1]) > 10, "the first two are told apart in grey"


def _inflated(stream: bytes) -> bytes:
    try:
        return zlib.decompress(stream.strip(b"\r\n"))
    except zlib.error:
        return b""
