"""Rows, sizes and template time beyond the limits are refused by name, before memory is spent on them."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from qtarget.core.errors import ConfigError, DataError
from qtarget.data.embedded import base_model_path
from qtarget.data.formats.shape import ReadOptions
from qtarget.data.limits import SPARED, Limits
from qtarget.data.limits.templates import bounded_templates
from qtarget.data.limits.unpacking import decoded_bytes
from qtarget.data.loading import read_files

ROWS = [{"prompt": "a", "completion": "b"}] * 12
BIG = "y" * 10**6


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_rows_are_counted_over_all_files(tmp_path, name):
    one, two = write(tmp_path / name, ROWS), write(tmp_path / f"b{name}", ROWS)
    assert len(read_files([one, two], ReadOptions(limits=Limits(rows=24))).rows) == 24
    with pytest.raises(DataError, match=r"more than 23 rows; raise the limit: `limits: \{rows: 230\}`"):
        read_files([one, two], ReadOptions(limits=Limits(rows=23)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_gigabytes_bound_a_file(tmp_path, name):
    path = write(tmp_path / name, ROWS * 100)
    with pytest.raises(DataError, match=r"than 1e-06 GB; split it, or raise the limit: `limits: \{gigabytes: 2\}`"):
        read_files(path, ReadOptions(limits=Limits(gigabytes=1e-6)))


def packed(tmp_path, kind):
    """A file of some kilobytes that unpacks to 600 MB, more than ``SPARED``."""
    path, count = tmp_path / f"bomb.{kind}", 2 * SPARED // len(BIG) + 64
    if kind == "jsonl.gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(count):
                file.write(b" " * len(BIG))
    elif kind == "jsonl.zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            for _ in range(count):
                file.write(b" " * len(BIG))
    elif kind == "parquet":
        shared = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([BIG]))
        pq.write_table(pa.table({"text": shared}), path)
    else:
        batch = pa.table({"text": pa.array([BIG] * count)})
        with pa.OSFile(str(path), "wb") as file:
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_file(file, batch.schema, options=options) as writer:
                writer.write_table(batch)
    return path


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_a_small_file_that_unpacks_to_a_large_one(tmp_path, kind):
    path = packed(tmp_path, kind)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    with pytest.raises(
        DataError, match=r"bytes and unpacks to more than [\d,]+, which no usual file does.*expansion: \d+"
    ):
        read_files(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25
    assert pa.total_allocated_bytes() - before < 2 * SPARED


def test_offsets_that_leave_their_buffer_are_refused(tmp_path):
    texts = pa.array(["first", "second", "third"])
    offsets = pa.array([0, 5, 2**30, 2**30 + 5], pa.int32()).buffers()[1]
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        schema = pa.schema({"text": pa.string()})
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays([texts], schema=schema))
    content = bytearray((tmp_path / "a.arrow").read_bytes())
    good, bad = (bytes(buffer)[:16] for buffer in (texts.buffers()[1], offsets))
    at = content.index(good)
    content[at : at + 16] = bad
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(DataError, match="is not a readable Arrow file"):
        read_files(tmp_path / "a.arrow")


TEXTS = pa.array(["a" * 100] * 40 + [None] * 10)


@pytest.mark.parametrize(
    "array",
    [
        TEXTS,
        TEXTS.dictionary_encode(),
        TEXTS.cast(pa.string_view()),
        pc.run_end_encode(TEXTS),
        TEXTS.cast(pa.large_string()),
        pa.StructArray.from_arrays([TEXTS.dictionary_encode()], ["x"]),
    ],
    ids=lambda array: str(array.type)[:20],
)
def test_decoded_bytes_are_those_of_the_values(array):
    assert decoded_bytes(array) == sum(len(text or "") for text in TEXTS.to_pylist())


def test_lists_that_share_their_values_count_them_each_time():
    shared = pa.ListViewArray.from_arrays(pa.array([0] * 10, pa.int32()), pa.array([40] * 10, pa.int32()), TEXTS)
    assert decoded_bytes(shared) >= 10 * 4000


@pytest.mark.parametrize(
    "given",
    [{"row": 5}, {"rows": 0}, {"rows": -1}, {"rows": float("nan")}, {"gigabytes": "2"}, {"rows": True}, [1], "rows=3"],
)
def test_limits_that_are_none(given):
    with pytest.raises(ConfigError, match="limits"):
        Limits.of(given)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end():
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    chat = [{"role": "user", "content": "a"}]
    with bounded_templates(0.3):
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert "a" in whole
    tokenizer.chat_template = ENDLESS
    with (
        pytest.raises(DataError, match=r"rendered one row for 0\.3 s of CPU time.*template_seconds: 3\}"),
        bounded_templates(0.3),
    ):
        tokenizer.apply_chat_template(chat, tokenize=False)


def test_many_rows_may_take_longer_than_one():
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    tokenizer.chat_template = "{% for i in range(40000) %}{{ i }}{% endfor %}"
    with bounded_templates(0.3):
        for _ in range(120):
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
