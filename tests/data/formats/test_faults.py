"""Rows with faults: every one is told in one run, the cause first."""

from __future__ import annotations

import json

import pytest

from qtarget.core.errors import DataError
from qtarget.data.files import check_file
from qtarget.data.formats.shape import ReadOptions
from qtarget.data.loading import read_files


def alpaca(path, outputs):
    rows = [{"instruction": "q", "input": "", "output": output} for output in outputs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_all_faulty_rows_are_told_by_kind(tmp_path):
    path = alpaca(tmp_path / "a.jsonl", ["a", None, 3, "b", None, *[4] * 7])
    with pytest.raises(DataError) as told:
        read_files(path)
    null, integer = str(told.value).splitlines()
    assert null.startswith(f"{path}, line 2: 'output' is there but holds no value")
    assert "null_content: drop" in null and null.endswith("(2 rows: also line 5)")
    assert integer.startswith(f"{path}, line 3: column 'output' is an integer")
    assert integer.endswith("(8 rows: also line 6, line 7, line 8, line 9 and 3 more)")


def test_a_line_that_does_not_parse_hides_no_fault_before_it(tmp_path):
    path = alpaca(tmp_path / "a.jsonl", ["a", 3])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError) as told:
        read_files(path)
    one, two = str(told.value).splitlines()
    assert "line 2: column 'output' is an integer" in one and "line 3, column 2: not valid JSON" in two


@pytest.mark.parametrize("outputs", [[None, "a", None, "b"], ["a", None, "b", None]])
def test_rows_without_a_value_are_dropped_wherever_they_stand(outputs, tmp_path):
    reading = read_files(alpaca(tmp_path / "a.jsonl", outputs), ReadOptions(null_content="drop"))
    assert [row["completion"][0]["content"] for row in reading.rows] == ["a", "b"] and reading.dropped == 2


def test_nothing_but_rows_without_a_value_is_refused(tmp_path):
    with pytest.raises(DataError, match="every row lacks a value"):
        read_files(alpaca(tmp_path / "a.jsonl", [None, None]), ReadOptions(null_content="drop"))


def test_a_wrong_header_is_told_of_its_line(tmp_path):
    path = tmp_path / "h.csv"
    path.write_text('Prompt,Completion \n"a\n\nb",c\n')
    with pytest.raises(DataError, match=r"line 1: .*rename 'Prompt' to 'prompt'; rename 'Completion ' to 'completion'"):
        read_files(path)


@pytest.mark.parametrize(
    ("asked", "near"), [("tests.jsonl", "test.jsonl"), ("test.json", "test.jsonl"), ("missing.jsonl", None)]
)
def test_files_of_like_stems_are_proposed(asked, near, tmp_path):
    for name in ("test.jsonl", "prompts.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError) as told:
        check_file(tmp_path / asked, "--data")
    assert str(told.value).endswith("heck --data")
    assert ("did you mean" in str(told.value)) == (near is not None)
    assert near is None or f"did you mean {tmp_path / near}?" in str(told.value)
