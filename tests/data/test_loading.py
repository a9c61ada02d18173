"""Files as users have them: every way of being broken is named with its place and the next step."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from qtarget.core.errors import DataError
from qtarget.data.files import expand
from qtarget.data.loading import dataset_of, load_dataset_file, load_rows, read_files

ROWS = [{"prompt": "2+2=", "completion": "4", "id": 1}, {"prompt": "Grüße, “you”\u2028:", "completion": "ok", "id": 2}]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def json_lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_every_format_gives_the_rows_that_were_written(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        text = (json_lines(ROWS) if "jsonl" in suffix else json.dumps(ROWS)).encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    assert load_rows(path) == ROWS
    assert load_dataset_file(path).to_list() == ROWS


def test_csv_fields_are_text_and_may_hold_line_breaks(tmp_path):
    path = write(tmp_path / "rows.csv", '\ufeffprompt,completion\n"a, b","1\n2"\nc,3\n')
    assert load_rows(path) == [{"prompt": "a, b", "completion": "1\n2"}, {"prompt": "c", "completion": "3"}]


def test_long_csv_fields_are_read(tmp_path):
    path = write(tmp_path / "rows.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(load_rows(path)[0]["text"]) == 200_000


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    assert load_rows(write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}')) == [
        {"text": "a"},
        {"text": "b"},
    ]


def test_columns_that_only_later_rows_have_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "a"}, {"text": "b", "weight": 0.5}]))
    assert load_dataset_file(path).to_list() == [{"text": "a", "weight": None}, {"text": "b", "weight": 0.5}]


def test_another_text_column_by_name(tmp_path):
    assert load_rows(write(tmp_path / "a.jsonl", '{"body": "a"}'), text_field="body") == [{"body": "a"}]


BROKEN = {
    "empty.jsonl": ("", ["no rows", "one training example a line"]),
    "empty.json": (" \n", ["no rows"]),
    "none.json": ("[]", ["no rows"]),
    "header.csv": ("prompt,completion\n", ["no rows"]),
    "cut.jsonl": ('{"text": "a"}\n\n{"text": "b\n', ["line 3", '{"text": "b', "one JSON object a line"]),
    "pretty.jsonl": ('[\n{"text": "a"}\n]', ["line 1", "name it .json"]),
    "lines.json": ('{"text": "a"}\n{"text": "b"}', ["line 2", '{"text": "b"}', "name it .jsonl"]),
    "wrapped.json": ('{"data": [{"text": "a"}]}', ["an object with keys data", "expected an array"]),
    "list.jsonl": ('{"text": "a"}\n["b"]\n', ["line 2", "expected an object", 'a list: ["b"]']),
    "null.json": ('[{"text": "a"}, null]', ["row 2", "null"]),
    "surrogate.jsonl": (
        '{"text": "a \\ud83d\\ude00"}\n{"text": "b", "note": {"by": ["x \\ud83d y"]}}',
        ["line 2", "'note'", "half of a surrogate pair", r"x \ud83d y", "remove it"],
    ),
    "alpaca.jsonl": (
        '{"question": "a", "response": "b"}',
        ["line 1", "'question' to 'prompt'", "'response' to 'completion'"],
    ),
    "typo.jsonl": ('{"promt": "a", "completions": "b"}', ["'promt' to 'prompt'", "'completions' to 'completion'"]),
    "share.jsonl": ('{"conversations": []}', ["line 1", "'conversations' is a list []"]),
    "half.jsonl": (
        '{"prompt": "a"}',
        ["line 1", "the row has 'prompt' without an answer: add 'completion', or remove the row"],
    ),
    "unanswered.jsonl": (
        '{"instruction": "a", "input": "b"}',
        ["line 1", "the row has 'instruction' without an answer: add 'output', or remove the row"],
    ),
    "renamed.jsonl": ('{"instruction": "a", "response": "b"}', ["rename 'response' to 'output'"]),
    "roleless.jsonl": ('{"messages": [{"role": "", "content": "a"}]}', ["line 1: messages[0] has an empty role"]),
    "nothing.jsonl": ('{"prompt": "a", "completion": null}', ["'completion' is there but holds no value"]),
    "mixed.jsonl": ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', ["line 2", "line 1", "`text`", "one shape"]),
    "number.jsonl": ('{"text": 5}', ["line 1", "'text' is an integer 5", "expected text"]),
    "uneven.jsonl": ('{"prompt": "a", "completion": [{"role": "assistant"}]}', ["make both text"]),
    "rolefree.jsonl": ('{"messages": [{"content": "a"}]}', ["role"]),
    "unmessaged.jsonl": ('{"messages": []}', ["'messages' is a list []"]),
    "words.jsonl": ('{"input_ids": ["a"]}', ["token ids"]),
    "unlabelled.jsonl": (
        '{"input_ids": [1, 2], "labels": [-100, 2]}\n{"input_ids": [1, 2]}',
        ["line 2: this row has `input_ids`, but line 1 has `input_ids` and `labels`"],
    ),
    "unaligned.jsonl": ('{"input_ids": [1, 2], "labels": [2]}', ["line 1: 1 labels for 2 input_ids", "-100"]),
    "named.jsonl": ('{"input_ids": [1, 2], "labels": ["a", "b"]}', ["'labels'", "token ids"]),
    "short.csv": ("prompt,completion\na\n", ["line 2", "'completion' is there but holds no value"]),
    "long.csv": ("prompt,completion\na,b,c\n", ["line 2", "1 more values", "quote"]),
    "quote.csv": ('prompt,completion\n"a,b\n', ["not valid CSV"]),
    "chat.csv": ('messages\n"[{}]"\n', ["line 2", "messages[0] has no role"]),
    "ids.csv": ('input_ids\n"(1, 2)"\n', ["line 2", "'input_ids' is a string", "token ids"]),
    "latin.jsonl": ('{"text": "Grüße"}'.encode("latin1"), ["byte 12", "iconv"]),
    "fake.jsonl.gz": ('{"text": "a"}', ["gzip"]),
    "fake.parquet": ("text", ["Parquet"]),
    "rows.xlsx": ("", [".parquet", "convert"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_with_its_place(tmp_path, name):
    text, expected = BROKEN[name]
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as raised:
        load_rows(path)
    for part in [str(path), *expected]:
        assert part in str(raised.value)


def test_a_truncated_gzip_file_is_named(tmp_path):
    whole = gzip.compress(json_lines(ROWS * 50).encode())
    with pytest.raises(DataError, match="complete gzip"):
        load_rows(write(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2]))


def test_a_missing_file_names_its_likely_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", '{"text": "a"}')
    with pytest.raises(DataError, match=r"trian\.jsonl is not a file; did you mean .*train\.jsonl"):
        load_rows(tmp_path / "trian.jsonl")


def test_a_column_whose_type_changes_is_named_with_its_row(tmp_path):
    rows = [{"text": letter, "weight": weight} for letter, weight in zip("abcd", (1, 2, "three", 4))]
    path = write(tmp_path / "a.jsonl", json_lines(rows))
    assert load_rows(path) == rows
    with pytest.raises(DataError, match=r'row 3: column \'weight\' holds "three"'):
        load_dataset_file(path)


def test_notes_of_mixed_types_are_kept_as_json_text(tmp_path):
    rows = [{"text": "a", "noise_spans": [[0, 1, "random_tokens"]]}, {"text": "b", "noise_spans": []}, {"text": "c"}]
    kept = load_dataset_file(write(tmp_path / "a.jsonl", json_lines(rows)))["noise_spans"]
    assert list(kept) == ['[[0, 1, "random_tokens"]]', "[]", None]


def test_excerpts_of_long_lines_stay_short(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "' + "x" * 10_000)
    with pytest.raises(DataError) as raised:
        load_rows(path)
    assert len(str(raised.value)) < 500 + len(str(path))


WIDE = {
    "utf16": ("utf-16", "UTF-16"),
    "utf16-be-marked": ("utf-16-be-marked", "UTF-16"),
    "utf16le": ("utf-16-le", "UTF-16LE"),
    "utf16be": ("utf-16-be", "UTF-16BE"),
    "utf32": ("utf-32", "UTF-32"),
    "utf32le": ("utf-32-le", "UTF-32LE"),
    "utf32be": ("utf-32-be", "UTF-32BE"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json", "jsonl.gz", "csv.zst"])
@pytest.mark.parametrize("name", WIDE)
def test_other_encodings_are_named_with_the_command_that_converts(tmp_path, name, suffix):
    encoding, said = WIDE[name]
    text = '{"text": "Grüße"}\r\n' * 3
    mark = name == "utf16-be-marked"
    raw = b"\xfe\xff" + text.encode("utf-16-be") if mark else text.encode(encoding)
    path = write(tmp_path / f"rows.{suffix}", compressed(raw, suffix))
    with pytest.raises(DataError) as raised:
        load_rows(path)
    assert f"is {said}, expected UTF-8" in str(raised.value)
    assert f"iconv -f {said} -t UTF-8" in str(raised.value)


def test_the_command_converts(tmp_path):
    import re
    import shutil
    import subprocess

    if shutil.which("iconv") is None:
        pytest.skip("there is no iconv here")
    path = write(tmp_path / "rows.jsonl.gz", gzip.compress('{"text": "Grüße"}\n'.encode("utf-16-le")))
    with pytest.raises(DataError) as raised:
        load_rows(path)
    (command,) = re.findall("`(.*)`", str(raised.value))
    subprocess.run(command, shell=True, check=True)
    assert load_rows(tmp_path / "rows_utf8.jsonl") == [{"text": "Grüße"}]


def compressed(raw: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(raw)
    if suffix.endswith(".zst"):
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(raw)
        return sink.getvalue().to_pybytes()
    return raw


@pytest.mark.parametrize("suffix", ["jsonl.zst", "json.zst", "csv.gz", "tsv.zst", "tsv", "ndjson"])
def test_more_kinds_of_files(tmp_path, suffix):
    separator = "\t" if suffix.startswith("tsv") else ","
    if suffix.startswith(("csv", "tsv")):
        text = f"prompt{separator}completion{separator}id\n2+2={separator}4{separator}007\n"
        expected = [{"prompt": "2+2=", "completion": "4", "id": "007"}]
    else:
        text, expected = (json_lines(ROWS) if "json." not in suffix[:5] else json.dumps(ROWS)), ROWS
    assert load_rows(write(tmp_path / f"rows.{suffix}", compressed(text.encode(), suffix))) == expected


def test_a_truncated_zstd_file_is_named(tmp_path):
    whole = compressed(json_lines(ROWS * 500).encode(), ".zst")
    with pytest.raises(DataError, match="complete gzip or zstd"):
        load_rows(write(tmp_path / "a.jsonl.zst", whole[: len(whole) // 2]))
    with pytest.raises(DataError, match="complete gzip or zstd"):
        load_rows(write(tmp_path / "b.jsonl.zst", '{"text": "a"}'))


def test_numbers_of_a_table_are_numbers(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,completion,weight\na,4,0.5\nb,5,\nc,6, 1e-1\n")
    rows = load_dataset_file(path).to_list()
    assert [row["weight"] for row in rows] == [0.5, None, 0.1]
    assert [row["completion"] for row in rows] == ["4", "5", "6"]
    tokens = load_rows(write(tmp_path / "t.csv", 'input_ids,labels\n"[1, 2]","[-100, 2]"\n'))
    assert tokens == [{"input_ids": [1, 2], "labels": [-100, 2]}]


@pytest.mark.parametrize("cell", ["high", '"0,5"', "1_0", "nan", "inf", "0x1"])
def test_a_bad_number_names_its_line(tmp_path, cell):
    with pytest.raises(DataError, match=r"line 3: column 'weight' holds .* expected a number"):
        load_rows(write(tmp_path / "a.csv", f"prompt,completion,weight\na,b,1\na,b,{cell}\n"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("semicolons.csv", "prompt;completion\na;b\n", "export it with commas"),
        ("tabs.csv", "prompt\tcompletion\na\tb\n", r"name it \.tsv"),
        ("twice.csv", "prompt,completion,prompt\na,b,c\n", "two columns are called 'prompt'"),
    ],
)
def test_headers_that_mislead_are_named(tmp_path, name, text, words):
    with pytest.raises(DataError, match=words):
        load_rows(write(tmp_path / name, text))


def test_several_files_and_patterns_are_read_in_order(tmp_path):
    from qtarget.data.loading import read_files

    for name in "cab":
        write(tmp_path / f"{name}.jsonl", json_lines([{"text": name}]))
    assert [row["text"] for row in load_rows(tmp_path / "*.jsonl")] == ["a", "b", "c"]
    assert [row["text"] for row in load_rows([tmp_path / "c.jsonl", tmp_path / "a.jsonl"])] == ["c", "a"]
    assert (
        "read 3 files: a.jsonl from row 1, b.jsonl from row 2, c.jsonl from row 3"
        in read_files(tmp_path / "*.jsonl").announced
    )
    with pytest.raises(DataError, match="no file matches"):
        load_rows(tmp_path / "*.csv")
    with pytest.raises(DataError, match="named twice"):
        load_rows([tmp_path / "?.jsonl", tmp_path / "a.jsonl"])
    write(tmp_path / "d.jsonl", '{"text": "d"}\n{"prompt": "a", "completion": "b"}')
    with pytest.raises(
        DataError, match=r"d\.jsonl, line 2: this row has `prompt` and `completion`, but .*a\.jsonl, line 1 has"
    ):
        load_rows(tmp_path / "*.jsonl")


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ((), "*.jsonl"),
        (("b.parquet", "a.jsonl"), "*.jsonl"),
        (("a.csv.gz",), "*.csv.gz"),
        (("data-0.arrow", "dataset_info.json"), "*.arrow"),  # as `save_to_disk` writes it
        (("a.json",), "*.json"),
        (("A.JSONL",), "*.JSONL"),
        (("train/a.jsonl", "test/a.jsonl", "about.json", "README.md"), "**/*.jsonl"),
        (("a.csv", "old/a.jsonl"), "*.csv"),
        (("a.parquet/part-0.parquet",), "**/*.parquet"),
        ((".cache/a.jsonl", "b/a.csv"), "**/*.csv"),  # a pattern finds no hidden files
    ],
)
def test_a_folder_is_told_the_pattern_of_its_files(tmp_path, names, pattern):
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, "")
    with pytest.raises(DataError, match=rf"is a folder; .* for instance '{re.escape(str(folder / pattern))}'"):
        load_rows(folder)
    assert not names or expand(folder / pattern)


def test_files_of_one_name_are_told_apart(tmp_path):
    for name in ("a/train.jsonl", "b/train.jsonl"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, json_lines([{"text": name}] * 4))
    assert (
        "read 2 files: a/train.jsonl from row 1, b/train.jsonl from row 5"
        in read_files(tmp_path / "**/*.jsonl").announced
    )


def test_a_column_that_changes_its_type_is_named_with_its_file(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", json_lines([{"text": "x", "weight": weight} for weight in (1.0, "high")]))
    for read in (load_dataset_file, lambda files: dataset_of(read_files(files))):
        with pytest.raises(DataError) as refused:
            read(tmp_path / "b.jsonl")
        assert str(refused.value).startswith(f"{tmp_path / 'b.jsonl'}, row 2: column 'weight' holds \"high\"")
        with pytest.raises(DataError, match=r"^a\.jsonl from row 1, b\.jsonl from row 3; row 2: column 'weight'"):
            read(tmp_path / "*.jsonl")


def test_where_rows_are_left_out_it_is_said_what_row_numbers_count(tmp_path):
    from qtarget.data.formats.shape import ReadOptions
    from qtarget.data.loading import read_files

    rows = [{"prompt": "a", "completion": None if i in (1, 3) else "b"} for i in range(5)]
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", json_lines(rows))
    first, *_, last = read_files(tmp_path / "*.jsonl", ReadOptions(null_content="drop")).announced
    assert first == "read 2 files: a.jsonl from row 1, b.jsonl from row 4"
    assert last.startswith("4 rows left out, ") and last.endswith("; row numbers count the rows that are kept")


def test_byte_order_marks_where_files_were_put_together(tmp_path):
    assert len(load_rows(write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\r{"text": "c"}'))) == 3


def test_rows_that_are_in_both_are_counted_by_content():
    from qtarget.data.overlap import shared_rows

    train = [{"prompt": "a", "completion": "b", "id": 1}, {"messages": [{"role": "user", "content": "x"}]}]
    validation = [{"messages": [{"content": "x", "role": "user"}], "id": 9}, {"prompt": "a", "completion": "c"}]
    (line,) = shared_rows(train, validation)
    assert line.startswith("1 of 2 validation rows is a training row too: validation row 1 is training row 2;")
    assert shared_rows(train, validation[1:]) == []


def test_deep_json_is_no_traceback(tmp_path):
    with pytest.raises(DataError):
        load_rows(write(tmp_path / "a.jsonl", '{"text": "a", "note": ' + "[" * 100_000 + "]" * 100_000 + "}"))


@pytest.mark.parametrize(("name", "around"), [("rows.jsonl", "%s\n"), ("rows.json", "[%s]")])
@pytest.mark.parametrize("row", ['{"text": "a", "text": "b"}', '{"text": "a", "note": {"x": 1, "x": 2}}'])
def test_a_key_that_stands_twice_is_refused(name, around, row, tmp_path):
    (tmp_path / name).write_text(around % row)
    with pytest.raises(DataError, match="stands twice in one object"):
        load_rows(tmp_path / name)
