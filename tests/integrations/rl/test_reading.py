"""Prompts from files of prompts, and from demonstrations."""

from __future__ import annotations

import json

import pytest

from qtarget.core.errors import DataError
from qtarget.integrations.rl.inputs.reading import load_prompts

ASKED = {"role": "user", "content": "2+2"}
SAID = {"role": "assistant", "content": "4"}


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2+2=", "gold": 4}, {"prompt": "2+2=", "gold": 4}),
        ({"prompt": [ASKED], "gold": [4]}, {"prompt": [ASKED], "gold": [4]}),
        ({"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "answer": "4"}),
        ({"prompt": "2+2=", "completion": "4", "answer": "four"}, {"prompt": "2+2=", "answer": "four"}),
        ({"prompt": [ASKED], "completion": [SAID]}, {"prompt": [ASKED], "answer": "4"}),
        ({"messages": [ASKED, SAID, ASKED, SAID]}, {"prompt": [ASKED, SAID, ASKED], "answer": "4"}),
        ({"messages": [ASKED, SAID, ASKED]}, {"prompt": [ASKED], "answer": "4"}),
        ({"instruction": "2+2", "output": "4"}, {"prompt": [ASKED], "answer": "4"}),
    ],
)
def test_rows_become_prompts(tmp_path, row, expected):
    found = load_prompts(written(tmp_path, row, row))
    assert len(found) == 2
    assert {key: value for key, value in found[0].items() if value is not None} == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": 7}, "prompt is '7'; expected text"),
        ({"prompt": ""}, "expected text"),
        ({"prompt": [{"content": "a"}]}, "role and content"),
        ({"prompt": [ASKED, SAID]}, "ends with the assistant"),
        ({"text": "2+2=4"}, "no question"),
        ({"messages": [ASKED]}, "without an answer"),
    ],
)
def test_rows_that_ask_nothing(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        load_prompts(written(tmp_path, row))
