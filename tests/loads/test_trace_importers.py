"""Importers: small files in the public formats, and everything that can be wrong with a line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sage_bench.traces.formats import Format, azure2023, burstgpt, generic_csv, mooncake
from sage_bench.traces.importer import VERSION, Report, import_trace
from sage_bench.traces.reader import Trace
from sage_bench.traces.schema import TRACE
from sage_core.errors import ConfigError, DataError, OutputError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,276,693,API log
"""
MOONCAKE = [
    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]},
    {"timestamp": 3000, "input_length": 512, "output_length": 1, "hash_ids": []},
]


def convert(
    tmp_path: Path, text: str, name: str, source_format: Format, *, skip_bad: bool = False
) -> tuple[Report, dict[str, list[object]]]:
    source, destination = tmp_path / f"source.{name}", tmp_path / "trace.parquet"
    source.write_text(text)
    report = import_trace(source, destination, name, source_format, skip_bad=skip_bad, overwrite=True)
    table = pq.read_table(destination)
    assert table.schema.equals(TRACE)
    Trace(destination).scan()  # what an importer writes, a reader accepts
    columns: dict[str, list[object]] = table.to_pydict()
    return report, columns


def test_azure(tmp_path: Path) -> None:
    report, columns = convert(tmp_path, AZURE, "azure2023", azure2023())
    assert report == Report(3, 0, 0)
    assert columns["arrival_s"] == [0.0, 4.314579, 4.541877]  # to the seventh digit of the source
    assert columns["prompt_tokens"] == [374, 396, 879]
    assert columns["output_tokens"] == [44, 109, 55]
    assert columns["kind"] == ["chat"] * 3
    assert columns["hash_ids"] == [None] * 3
    metadata = Trace(tmp_path / "trace.parquet").metadata
    assert metadata == {
        "source": "source.azure2023",
        "source_sha256": hashlib.sha256(AZURE.encode()).hexdigest(),
        "importer": "azure2023",
        "importer_version": VERSION,
        "rows_skipped": "0",
        "rows_reordered": "0",
        "license": "CC-BY-4.0",
    }


def test_azure_with_zone_and_other_kind(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 02:00:01+02:00,3,4\n"
    )
    _, columns = convert(tmp_path, text, "azure2023", azure2023("generation"))
    assert columns["arrival_s"] == [0.0, 0.99007]
    assert columns["kind"] == ["generation"] * 2


def test_mooncake(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row) for row in MOONCAKE) + "\n\n"
    report, columns = convert(tmp_path, text, "mooncake", mooncake())
    assert report.rows == 3
    assert columns["arrival_s"] == [0.0, 3.0, 3.0]
    assert columns["hash_ids"] == [[0, 1, 2], [0, 14], None]
    assert columns["kind"] == ["generation"] * 3
    assert Trace(tmp_path / "trace.parquet").metadata["hash_block_tokens"] == "512"


def test_burstgpt(tmp_path: Path) -> None:
    _, columns = convert(tmp_path, BURST, "burstgpt", burstgpt())
    assert columns["arrival_s"] == [0.0, 40.0, 113.0]
    assert columns["kind"] == ["chat", "chat", "generation"]
    assert columns["output_tokens"] == [18, 230, 276]


def test_burstgpt_later_release_has_sessions(tmp_path: Path) -> None:
    text = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5.5,s1,1.0,GPT-4,4,2,6,Conversation log\n6,,1.0,GPT-4,4,2,6,Conversation log\n"
    )
    _, columns = convert(tmp_path, text, "burstgpt", burstgpt())
    assert columns["session_id"] == ["s1", None]
    assert columns["arrival_s"] == [0.0, 0.5]


def test_csv_with_a_mapping(tmp_path: Path) -> None:
    text = "t,in,out,what,who\n1000,5,3,chat,x\n2500,6,0,embedding,\n"
    mapping = {"arrival_s": "t", "prompt_tokens": "in", "output_tokens": "out", "kind": "what", "session_id": "who"}
    _, columns = convert(tmp_path, text, "csv", generic_csv(mapping, "ms"))
    assert columns["arrival_s"] == [0.0, 1.5]
    assert columns["kind"] == ["chat", "embedding"]
    assert columns["session_id"] == ["x", None]
    queries = "when,len\n2023-01-01T00:00:00,5\n2023-01-01T00:00:02.5,6\n"
    _, columns = convert(
        tmp_path, queries, "csv", generic_csv({"arrival_s": "when", "prompt_tokens": "len"}, "iso", "embedding")
    )
    assert columns["arrival_s"] == [0.0, 2.5]
    assert columns["output_tokens"] == [0, 0]


def test_lines_out_of_order_are_sorted_and_counted(tmp_path: Path) -> None:
    lines = BURST.splitlines(keepends=True)
    report, columns = convert(tmp_path, "".join([lines[0], lines[3], lines[1], lines[2]]), "burstgpt", burstgpt())
    assert report.rows_reordered == 2
    assert columns["arrival_s"] == [0.0, 40.0, 113.0]
    assert columns["prompt_tokens"] == [472, 1087, 417]
    text = "\n".join(json.dumps(row) for row in reversed(MOONCAKE))
    _, columns = convert(tmp_path, text, "mooncake", mooncake())
    assert columns["hash_ids"] == [[0, 1, 2], None, [0, 14]]  # stable for equal instants
    assert Trace(tmp_path / "trace.parquet").metadata["rows_reordered"] == "1"


BAD_AZURE = {
    "2023-11-16 18:15:52.0,x,5": "ContextTokens: expected a whole number of tokens from 0, found 'x'",
    "2023-11-16 18:15:52.0,1.5,5": "ContextTokens: expected a whole number",
    "2023-11-16 18:15:52.0,nan,5": "ContextTokens: expected a whole number",
    "2023-11-16 18:15:52.0,-3,5": "ContextTokens: expected a whole number",
    "2023-11-16 18:15:52.0,3,": "GeneratedTokens: expected a whole number",
    "2023-11-16 18:15:52.0,3,99999999999": "GeneratedTokens: expected a whole number",
    "2023-11-16 18:15:52.0,0,5": "prompt tokens: expected at least 1, found 0",
    "2023-11-16 18:15:52.0,5,0": r"output tokens: expected at least 1 for chat \(0 is a failed call\)",
    "16/11/2023 18:15,5,5": "TIMESTAMP: expected a date and time as",
    "2023-11-16 18:15:52.,5,5": "TIMESTAMP: expected a date and time",
    "2023-11-16 18:15:52.0,5": "expected 3 fields, found 2",
    "2023-11-16 18:15:52.0,5,5,5": "expected 3 fields, found 4",
    '2023-11-16 18:15:52.0,"5"5,5': "broken quoting",
}


@pytest.mark.parametrize("line", BAD_AZURE)
def test_a_broken_line_is_named_or_counted(line: str, tmp_path: Path) -> None:
    rows = AZURE.splitlines(keepends=True)
    text = "".join([*rows[:3], line + "\n", rows[3]])
    with pytest.raises(DataError, match=rf"source\.azure2023: line 4: .*{BAD_AZURE[line]}.*--skip-bad"):
        convert(tmp_path, text, "azure2023", azure2023())
    assert not (tmp_path / "trace.parquet").exists()
    report, columns = convert(tmp_path, text, "azure2023", azure2023(), skip_bad=True)
    assert (report.rows, report.rows_skipped) == (3, 1)
    assert report.skipped_lines[0].startswith("line 4: ")
    assert columns["prompt_tokens"] == [374, 396, 879]
    assert Trace(tmp_path / "trace.parquet").metadata["rows_skipped"] == "1"


BAD_MOONCAKE = {
    "{": "expected a JSON object",
    "[1]": "expected a JSON object, found list",
    '{"timestamp": 1, "input_length": 5}': "output_length: expected a whole number of tokens from 0, found None",
    '{"timestamp": -1, "input_length": 5, "output_length": 5}': "timestamp: expected a time of at least 0, found -1",
    '{"timestamp": true, "input_length": 5, "output_length": 5}': "timestamp: expected a time",
    '{"timestamp": 1, "input_length": true, "output_length": 5}': "input_length: expected a whole number",
    '{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [1.5]}': "hash_ids: expected a list of whole numbers",
    '{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": 7}': "hash_ids: expected a list",
}


@pytest.mark.parametrize("line", BAD_MOONCAKE)
def test_broken_json_lines(line: str, tmp_path: Path) -> None:
    text = json.dumps(MOONCAKE[0]) + "\n" + line + "\n"
    with pytest.raises(DataError, match=f"line 2: .*{BAD_MOONCAKE[line]}"):
        convert(tmp_path, text, "mooncake", mooncake())
    assert convert(tmp_path, text, "mooncake", mooncake(), skip_bad=True)[0].rows_skipped == 1


def test_failed_calls_of_burstgpt_are_not_dropped_silently(tmp_path: Path) -> None:
    text = BURST + "120,GPT-4,300,0,300,API log\n121,GPT-4,300,5,300,Batch log\n"
    with pytest.raises(
        DataError, match=r"line 5: output tokens: expected at least 1 for generation \(0 is a failed call\)"
    ):
        convert(tmp_path, text, "burstgpt", burstgpt())
    report, _ = convert(tmp_path, text, "burstgpt", burstgpt(), skip_bad=True)
    assert report.rows_skipped == 2
    assert "Log Type: expected one of Conversation log, API log" in report.skipped_lines[1]


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; expected a trace in the format azure2023"):
        import_trace(tmp_path / "none.csv", tmp_path / "t.parquet", "azure2023", azure2023())
    with pytest.raises(DataError, match=r"line 1: column 'TIMESTAMP' is missing; .*found Timestamp"):
        convert(tmp_path, BURST, "azure2023", azure2023())
    with pytest.raises(DataError, match="found an empty file"):
        convert(tmp_path, "", "azure2023", azure2023())
    with pytest.raises(DataError, match=r"no usable line \(0 skipped\)"):
        convert(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n", "azure2023", azure2023())
    with pytest.raises(DataError, match=r"no usable line \(1 skipped\)"):
        convert(tmp_path, "{\n", "mooncake", mooncake(), skip_bad=True)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="not text in UTF-8"):
        import_trace(binary, tmp_path / "t.parquet", "azure2023", azure2023())


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    source, destination = tmp_path / "a.csv", tmp_path / "trace.parquet"
    source.write_text(AZURE)
    destination.write_text("precious")
    with pytest.raises(OutputError, match=r"exists already; .*--force"):
        import_trace(source, destination, "azure2023", azure2023())
    assert destination.read_text() == "precious"
    import_trace(source, destination, "azure2023", azure2023(), overwrite=True)
    assert Trace(destination).scan().rows == 3
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_nowhere_to_write(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text(AZURE)
    with pytest.raises(OutputError, match="cannot be written"):
        import_trace(source, source / "below" / "trace.parquet", "azure2023", azure2023())


def test_a_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device that is always full")
    source = tmp_path / "a.csv"
    source.write_text(AZURE)
    (tmp_path / "trace.parquet.part").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        import_trace(source, tmp_path / "trace.parquet", "azure2023", azure2023())
    assert not (tmp_path / "trace.parquet").exists()


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text(AZURE)
    for name in ("one.parquet", "two.parquet"):
        import_trace(source, tmp_path / name, "azure2023", azure2023())
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_bad_options_name_themselves() -> None:
    with pytest.raises(ConfigError, match="--kind"):
        azure2023("code")
    with pytest.raises(ConfigError, match="--columns: missing prompt_tokens"):
        generic_csv({"arrival_s": "t"})
    with pytest.raises(ConfigError, match="--columns: unknown tokens"):
        generic_csv({"arrival_s": "t", "tokens": "n"})
    with pytest.raises(ConfigError, match="--time-unit"):
        generic_csv({"arrival_s": "t", "prompt_tokens": "n"}, "minutes")
