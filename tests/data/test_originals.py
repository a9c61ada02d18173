"""Rows as they came in, beside the rows that are read of them."""

from __future__ import annotations

import gzip
import json

import pytest

from qtarget.data.formats.shape import ReadOptions
from qtarget.data.loading import load_rows, original_texts

LINES = ['{"prompt":  "1+1=", "completion": "2", "note": "\\u00e9"}', '{"completion": "ä", "prompt": "b"}']


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz"])
def test_lines_come_as_they_are(tmp_path, name) -> None:
    text = LINES[0] + "\n\n" + LINES[1] + "\r\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert original_texts(path) == LINES


def test_rows_that_are_left_out_are_not_among_them(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": c}] for c in ("b", None, "c")]
    path.write_text("".join(json.dumps({"messages": row, "n": i}) + "\n" for i, row in enumerate(rows)))
    options = ReadOptions(null_content="drop")
    read = load_rows(path, options=options)
    texts = original_texts(path, options)
    assert [json.loads(text)["n"] for text in texts] == [row["n"] for row in read]


def test_other_kinds_come_as_objects_in_the_files_order(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,weight\n1+1=,2,0.5\n")
    (tmp_path / "b.json").write_text('[{"prompt": "x", "completion": "y"}]')
    found = original_texts([tmp_path / "a.csv", tmp_path / "b.json"])
    assert [json.loads(text) for text in found] == [
        {"prompt": "1+1=", "completion": "2", "weight": 0.5}, {"prompt": "x", "completion": "y"}
    ]  # fmt: skip
