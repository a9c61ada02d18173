"""Whatever a file of rows holds, it is read or named: no exception but a ``QTargetError`` leaves the readers."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qtarget.core.errors import DataError, QTargetError
from qtarget.data.loading import load_dataset_file, load_rows

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
KEYS = (
    "prompt", "completion", "messages", "conversations", "text", "instruction", "input", "output", "system", "tools", "weight",
    "weight_spans", "loss_weights", "input_ids", "labels", "chat_template_kwargs", "role", "content", "from", "value", "other",
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "assistant", "gpt", "human", ""])
)
VALUES = st.recursive(
    SCALARS | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)
TEXT = st.text(max_size=6)
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GOOD: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b"},
    {"text": "ab", "weight": 0.5},
    {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"messages": CHAT, "weight_spans": [[0, 1, 0.5]], "chat_template_kwargs": {"a": 1}},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
    {"instruction": "a", "input": "", "output": "b"},
    {"input_ids": [1, 2], "labels": [-100, 2], "loss_weights": [1.0, 0.5]},
]


@st.composite
def changed_rows(draw: Any) -> list[Any]:
    """Rows of one shape, of which one or two values, anywhere, hold something else."""
    good = draw(st.sampled_from(GOOD))
    rows = [json.loads(json.dumps(good)) for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(0, 2))):
        owner: Any = draw(st.sampled_from(rows))
        while True:
            keys = list(range(len(owner))) if isinstance(owner, list) else sorted(owner)
            key = draw(st.sampled_from([*keys, "other"] if isinstance(owner, dict) else keys))
            inner = owner.get(key) if isinstance(owner, dict) else owner[key]
            if not inner or not isinstance(inner, list | dict) or draw(st.booleans()):
                break
            owner = inner
        owner[key] = draw(SCALARS | TEXT | VALUES)
    return rows


ROWS = changed_rows() | st.lists(
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4) | VALUES, min_size=1, max_size=3
)
QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def read_or_refused(path: Path, *, table: bool = False) -> list[Any] | None:
    """Rows, or nothing where they were refused by name; any other exception fails the test."""
    try:
        rows = load_rows(path)
    except QTargetError:
        return None
    assert rows and all(isinstance(row, dict) for row in rows)
    if table:
        try:
            assert len(load_dataset_file(path)) == len(rows)
        except QTargetError:
            return None
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


@settings(QUICK, max_examples=40)
@given(content=st.binary(max_size=60))
@example(content=b"")
@example(content=b"[" * 100_000)
@example(content=b'{"prompt": ' + b"[" * 100_000)
@example(content=b'{"weight": ' + b"9" * 5000 + b"}")
@example(content=b"\xff\xfe{\x00}\x00")
@example(content=b'"\x00"')
@example(content=b"PAR1" + bytes(40) + b"PAR1")
@example(content=gzip.compress(b'{"text": "a"}')[:-3])
def test_any_bytes_under_any_name(folder, content):
    for suffix in SUFFIXES:
        path = folder / f"rows{suffix}"
        path.write_bytes(content)
        read_or_refused(path)


@settings(QUICK, max_examples=250)
@given(rows=ROWS)
def test_any_json(folder, rows):
    """As lines and as an array: read alike, or refused both."""
    lines, array = folder / "rows.jsonl", folder / "rows.json"
    lines.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    array.write_text(json.dumps(rows), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_or_refused(lines, table=True)
        assert json.dumps(found) == json.dumps(read_or_refused(array, table=True))


@settings(QUICK, max_examples=60)
@given(rows=ROWS, data=st.data())
def test_a_byte_flipped_anywhere(folder, rows, data):
    content = bytearray("\n".join(json.dumps(row) for row in rows).encode())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    read_or_refused(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"text": "a", "n": ' + "9" * 5000 + "}"])
def test_depth_and_digits_are_named(folder, text):
    path = folder / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        load_rows(path)
