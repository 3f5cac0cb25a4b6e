"""From runs to pages: what is written is whole, escaped, equal for equal runs, and keeps its losses."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from rich.console import Console

from sage_bench.metrics.compare import conditions
from sage_bench.publish.balance import balance, nowhere
from sage_bench.publish.chapter import Chapter, chapter_of, verdicts_of
from sage_bench.publish.checklist import checklist
from sage_bench.publish.fairness import differences, fairness, refuse_unequal_hosts
from sage_bench.publish.ledger import TEMPLATES, ledger, tally
from sage_bench.publish.page import page
from sage_bench.publish.publish import publish, write_chapters
from sage_bench.results.manifest import EngineFact, Source, read_manifest
from sage_bench.results.reader import Runs, load_runs
from sage_bench.studies.findings import Claim, Findings, number
from sage_bench.studies.registry import STUDIES
from sage_bench.studies.study import Experiments, Study, experiments_in
from sage_core.errors import DataError, OutputError


def write(chapter: Chapter, out: Path) -> dict[str, bytes]:
    """Everything written below ``out``, by relative path."""
    write_chapters([chapter], ledger([chapter]), out, title="Test & such", of_the_paper=True)
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def report(chapter: Chapter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return write(chapter, tmp_path_factory.mktemp("report"))


class Page(html.parser.HTMLParser):
    """Tags that are open, what refers to outside, and the text."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action") and value and not value.startswith(("data:", "#")):
                self.outside.append(value)
            if name == "id" and value:
                self.ids[value] += 1
            if name == "href" and value and value.startswith("#"):
                self.links.append(value[1:])
            if tag == "img" and name == "alt":
                assert value, "a figure without words"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_refers_to_nothing_outside(report: dict[str, bytes]) -> None:
    text = report["report.html"].decode()
    page = Page(text)
    assert not page.open and not page.outside
    assert page.tags["script"] == 0 and "url(" not in text and "@import" not in text
    assert max(page.ids.values()) == 1 and set(page.links) <= set(page.ids)
    assert page.tags["img"] == 1 and page.tags["b"] >= 2 and page.tags["i"] == 0, "text from data is escaped"
    for said in (
        "Where it does not matter",
        "Wins and losses",
        "does not hold",
        "Both policies see",
        "Odd & <b>bold</b>.",
    ):
        assert said in page.text
    for requirement in range(277, 295):
        assert f'<td class="n">{requirement}</td>' in text
    assert "not captured: " in page.text and "8.6" in page.text


def test_numbers_of_the_page_are_those_of_the_table(report: dict[str, bytes]) -> None:
    rows = list(csv.reader(io.StringIO(report["tiny/attainment.csv"].decode())))
    assert rows[0] == ["policy", "rate (req/s)", "SLO (%)"] and len(rows) == 5
    page = report["report.html"].decode()
    for row in rows[1:]:
        cells = f'<td>{row[0]}</td><td class="n">{row[1]}</td><td class="n">{row[2]}</td>'
        assert cells in page
        assert f"{row[0]} & {row[1]} & {row[2]}" in report["tiny/attainment_table.tex"].decode()


def test_equal_runs_give_equal_bytes(
    results: Path, study: Study, report: dict[str, bytes], tmp_path: Path, make_tiny_runs: ModuleType
) -> None:
    make_tiny_runs.make_runs(tmp_path / "again")
    again = write(chapter_of(study, experiments_in(tmp_path / "again", study)), tmp_path / "out")
    assert set(again) == set(report)
    dated = {"checklist_runs.csv", "report.html"}  # the page holds the checklist
    assert [name for name in report if report[name] != again[name] and name not in dated] == []

    def undated(text: bytes) -> bytes:
        return re.sub(rb'<section id="runs">.*?</section>', b"", text, flags=re.S)

    assert undated(report["report.html"]) == undated(again["report.html"])


def test_nothing_names_a_place_on_this_machine(report: dict[str, bytes], results: Path, tmp_path: Path) -> None:
    places = [str(results), str(tmp_path.parent), str(Path(__file__).parents[2]), str(Path.home()) + "/"]
    for name, content in report.items():
        assert not [place for place in places if place.encode() in content], name


def test_dates_are_in_the_table_of_runs_alone(report: dict[str, bytes]) -> None:
    date = re.compile(rb"20\d\d-\d\d-\d\d")
    assert {name for name, content in report.items() if date.search(content)} == {"checklist_runs.csv", "report.html"}
    rest = re.sub(rb'<section id="runs">.*?</section>', b"", report["report.html"], flags=re.S)
    assert not date.search(rest)


def test_claims_that_do_not_hold_stay_and_say_so(chapter: Chapter, report: dict[str, bytes]) -> None:
    rows = json.loads(report["claims.json"])
    outcome = {row["id"]: row["outcome"] for row in rows}
    assert outcome["tiny-1"] == "does not hold" and outcome["tiny-2"] == "no significant difference"
    assert {row["requirement"] for row in rows} == {*TEMPLATES, 276}
    missing = [row for row in rows if row["id"].startswith("template-")]
    assert len(missing) == len(TEMPLATES) - 2
    assert all(row["outcome"] == "not measured" and row["text"] and not row["evidence"] for row in missing)
    complete = next(row for row in rows if row["requirement"] == 276)
    assert complete["outcome"] == "holds" and complete["text"].startswith("2 of 2 ")
    assert tally(ledger([chapter])).startswith(
        f"Of {len(rows)} claims: holds 1, does not hold 1, no significant difference 1"
    )
    bare = replace(
        chapter, findings=replace(chapter.findings, claims=[Claim("x", 0, "a", "better", "holds", ("tiny",))])
    )
    assert ledger([bare])[-1].outcome == "does not hold", "a claim without a number is seen"


def test_wins_losses_and_where_nothing_differs_add_up(queueing: ModuleType, tmp_path: Path) -> None:
    """Two arms that differ at the highest load alone: counts and sentences follow the verdicts."""
    for rate in (5, 20, 40):
        for policy in ("fifo", "slow"):
            for seed in (1, 2, 3, 4, 5):
                service_s = 0.04 if policy == "slow" and rate == 40 else 0.02
                queueing.run(
                    tmp_path / f"{policy}-{rate}-{seed}",
                    queueing.Queue(rate, service_s, 400, seed),
                    experiment="x",
                    policy=policy,
                    overrides=(f"load.rate={rate}",),
                )
    found = conditions(load_runs(tmp_path))
    empty = Findings(tables=(), figures=(), sentences=(), claims=())
    chapter = Chapter("x", "", "x", "", empty, found, verdicts_of(found))
    (table,) = balance(chapter)
    assert table.sheet.rows and table.sheet.rows[0][:2] == ["slow", "fifo"]
    for i, cell in enumerate(table.sheet.rows[0][2:]):
        better, worse, same = map(int, cell.split(" / "))
        assert better + worse + same == 3, table.sheet.columns[i + 2]
    for i, verdict in enumerate(("better", "worse")):
        counted = sum(int(cell.split(" / ")[i]) for cell in table.sheet.rows[0][2:])
        assert counted == (chapter.verdicts["verdict"] == verdict).sum()
    assert table.sheet.rows[0][table.sheet.columns.index("SLO\nall requests")] == "0 / 1 / 2"
    first, load = nowhere(chapter)
    assert first.startswith("x (simulation): in 2 of 3 conditions no arm differs")
    assert "up to 20 req/s no arm differs; at 40 req/s at least one does" in load


def test_runs_of_different_machines_are_refused(results: Path, tmp_path: Path, study: Study) -> None:
    shutil.copytree(results, tmp_path / "r")
    victim = next(folder for folder in sorted((tmp_path / "r" / "tiny").iterdir()) if folder.name.startswith("hybrid"))
    manifest = read_manifest(victim)
    other = msgspec.structs.replace(manifest, hardware=msgspec.structs.replace(manifest.hardware, cores=99))
    (victim / "manifest.json").write_bytes(msgspec.json.encode(other))
    with pytest.raises(DataError, match=rf"{victim.name}.*different machines \(cores: .*99"):
        publish([study], tmp_path / "r", Console(file=io.StringIO()))
    chapter = chapter_of(study, experiments_in(tmp_path / "r", study))
    assert any("--hosts-differ" in sentence for sentence in fairness(chapter))
    again = msgspec.structs.replace(
        manifest,
        hardware=msgspec.structs.replace(manifest.hardware, memory_bytes=manifest.hardware.memory_bytes + 4096),
    )
    (victim / "manifest.json").write_bytes(msgspec.json.encode(again))
    refuse_unequal_hosts(conditions(Runs(list(load_runs(tmp_path / "r" / "tiny")))))


def test_what_arms_differ_in_is_listed_with_its_values(tmp_path: Path) -> None:
    from sage_bench.config import composed
    from sage_bench.run import run

    for arm, batch in (("a", 8), ("b", 32)):
        overrides = [
            "name=y", "load.rate=10", "load.duration_s=2", "record.steps=false", f"+cluster.devices.0.llm.kv_tokens={batch}000",
            f"arm.name={arm}", "arm.differs_in=[cluster.devices]", f"results={tmp_path}",
        ]  # fmt: skip
        run(composed(overrides), overrides)
    found = conditions(load_runs(tmp_path))
    empty = Findings(tables=(), figures=(), sentences=(), claims=())
    chapter = Chapter("y", "", "y", "", empty, found, verdicts_of(found))
    (table,) = differences(chapter)
    assert table.sheet.rows == [["y", "cluster.devices.0.llm.kv_tokens", "8000 (a); 32000 (b)"]]
    assert any("differ on purpose in cluster.devices" in sentence for sentence in fairness(chapter))


def test_two_things_of_one_name_are_refused(chapter: Chapter, tmp_path: Path) -> None:
    doubled = replace(chapter, findings=replace(chapter.findings, tables=[*chapter.findings.tables] * 2))
    with pytest.raises(DataError, match="table tiny/attainment: there are two"):
        write_chapters([doubled], (), tmp_path / "a", title="t")
    alike = [Claim(name, 0, "a", "1 %", "holds", ("x",)) for name in ("c-1", "c_1")]
    with pytest.raises(DataError, match="both would be the LaTeX macro"):
        write_chapters([chapter], alike, tmp_path / "b", title="t", figures=False)


def test_a_number_that_the_runs_do_not_give_is_an_error(results: Path, study: Study, tmp_path: Path) -> None:
    def nothing(experiments: Experiments) -> Findings:
        return Findings((), (), [f"The best attains {number(float('nan'))} %."], ())

    shutil.copytree(results, tmp_path / "r")
    with pytest.raises(DataError, match="a number that the runs do not give"):
        publish([replace(study, findings=nothing)], tmp_path / "r", Console(file=io.StringIO()), system=False)
    assert not (tmp_path / "r" / "report").exists()


def test_a_picture_that_is_none(chapter: Chapter, tmp_path: Path) -> None:
    for content in (b"", b"not a picture", b"\x89PNG\r\n\x1a\n cut short"):
        (tmp_path / "bars.png").write_bytes(content)
        with pytest.raises(DataError, match=r"bars\.png: not a PNG"):
            page("t", [chapter], (), {("tiny", "bars"): tmp_path / "bars.png"})


def test_a_folder_that_cannot_be_written(chapter: Chapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file.*cannot be written"):
        write_chapters([chapter], (), tmp_path / "file" / "report", title="t")


def test_publish_writes_and_says(results: Path, study: Study, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "r")
    out = io.StringIO()
    paths = publish([study], tmp_path / "r", Console(file=out, width=200), system=False)
    assert {path.name for path in paths} == {"report.html", "figures.tex", "claims.csv"}
    assert all(path.is_file() for path in paths)
    said = out.getvalue()
    assert "9.9 A tiny study" in said and "does not hold: attains" in said and "claims: holds 1" in said


def test_arms_are_held_against_the_baseline_that_the_study_names(queueing: ModuleType, tmp_path: Path) -> None:
    """Neither a reference nor the twin of a live run is counted, and all of them stay among the runs."""
    cases: list[tuple[Source, tuple[str, ...]]] = [
        ("simulation", ()),
        ("simulation", ("driver=sim",)),
        ("emulated", ("driver=live",)),
    ]
    for source, point in cases:
        for arm in ("alone", "first", "ours", "second"):
            for seed in (1, 2):
                folder = tmp_path / f"{arm}-{seed}-{source}-{len(point)}"
                queueing.run(
                    folder, queueing.Queue(20, 0.02, 100, seed), experiment="x", policy=arm, source=source, overrides=point,
                    config={"short": bool(point)},
                )  # fmt: skip
    every = load_runs(tmp_path)
    experiments = Experiments(
        {"x": every.where(lambda m: m.source == "simulation")}, {"x": every.where(lambda m: m.source != "simulation")}
    )
    study = Study("x", "", "x", "", ("x",), lambda _: Findings((), (), (), ()))
    chapter = chapter_of(study, experiments)
    assert set(chapter.verdicts["baseline"]) == {"alone"}, "without a name the first by name is the baseline"
    named = chapter_of(replace(study, baselines=("missing", "ours"), references=("alone",)), experiments)
    assert set(named.verdicts["baseline"]) == {"ours"}
    assert set(named.verdicts["policy"]) == {"first", "second"}
    assert not named.verdicts["condition"].str.contains("driver=sim").any()
    assert [table.caption.partition(" in ")[2][:11] for table in balance(named)] == ["1 condition"] * 2
    assert len(named.runs) == len(every) == 24
    assert chapter_of(replace(study, baselines=("missing",)), experiments).verdicts.empty


def test_arms_that_studies_name_exist() -> None:
    conf = Path(__file__).parents[2] / "conf"
    known = {path.stem for group in ("arm", "policy") for path in (conf / group).rglob("*.yaml")}
    named = {arm for study in STUDIES for arm in (*study.baselines, *study.references)}
    assert named and named <= known


def test_runs_that_were_left_out_are_told(results: Path, study: Study) -> None:
    experiments = replace(experiments_in(results, study), left_out=("tiny/one: interrupted, left out.",))
    assert chapter_of(study, experiments).findings.notes[-1] == "tiny/one: interrupted, left out."


def test_the_checklist_counts_runs_and_not_engines(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "r")
    folders = sorted((tmp_path / "r" / "tiny").iterdir())[:3]
    for folder, gpus in zip(folders, (("A", "A"), ("B",), ("B",)), strict=True):
        manifest = read_manifest(folder)
        engines = tuple(EngineFact(f"e{i}", "http://127.0.0.1", gpu, "vllm", "v1") for i, gpu in enumerate(gpus))
        changed = msgspec.structs.replace(
            manifest, engines=engines, hardware=msgspec.structs.replace(manifest.hardware, gpus=gpus)
        )
        (folder / "manifest.json").write_bytes(msgspec.json.encode(changed))
    found = conditions(load_runs(tmp_path / "r"))
    chapter = Chapter("x", "", "x", "", Findings((), (), (), ()), found, verdicts_of(found))
    values = {row[1]: row[2] for row in checklist([chapter]).rows}
    assert values["GPU model"].startswith("B (2 runs); A (1 runs)")
    assert re.findall(r"\((\w)\) \((\d) runs\)", values["engines"]) == [("B", "2"), ("A", "1")]
