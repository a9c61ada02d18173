"""Each row keeps its own keys: through Arrow, through a Dataset that Arrow has filled already, through map."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("datasets")

from datasets import Dataset

from qtarget.core.errors import DataError
from qtarget.data.loading import load_dataset_file, read_dataset, rows_to_dataset


def calling(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def schema(**properties):
    return [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}]


ROWS = [
    {"messages": calling("rain", {"city": "Oslo"}), "tools": schema(city={"type": "string"}), "note": {"a": 1}},
    {
        "messages": calling("convert", {"miles": 3, "deep": {"ü": [1, {"x": None}, "1", 1.5], "": {}}}),
        "tools": schema(miles={"type": "number", "minimum": 0, "enum": [1, None]}),
        "chat_template_kwargs": {"documents": [{"title": "x"}, {"text": "y", "n": 2**63}]},
    },
    {"messages": calling("none", {})},
]


def test_rows_keep_their_own_keys_and_nothing_else():
    data = rows_to_dataset(ROWS)
    for i, row in enumerate(ROWS):
        assert data[i]["messages"] == row["messages"]
        assert data[i]["tools"] == row.get("tools")
        assert data[i]["chat_template_kwargs"] == row.get("chat_template_kwargs", {})
    assert data.column_names == ["messages", "tools", "note", "chat_template_kwargs"]


@pytest.mark.parametrize("processes", [None, 2])
def test_they_keep_them_through_map(processes):
    data = rows_to_dataset(ROWS * 2).map(lambda row: {"n": len(row["messages"])}, num_proc=processes)
    assert list(data["messages"]) == [row["messages"] for row in ROWS * 2]
    assert list(data["tools"]) == [row.get("tools") for row in ROWS * 2]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_files_of_every_kind_keep_them(tmp_path, suffix, caplog):
    rows = [{"messages": calling("rain", {"city": "Oslo"})}, {"messages": calling("convert", {"miles": 3})}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(rows)
        if suffix == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
    assert list(load_dataset_file(path)["messages"]) == [row["messages"] for row in rows]
    assert ("rows_to_dataset" in caplog.text) == (suffix in ("parquet", "arrow"))


def test_a_parquet_file_of_json_columns_is_read_without_doubt(tmp_path, caplog):
    rows = [{"messages": calling("a", {"x": None})}, {"messages": calling("b", {"x": 1, "y": None})}]
    rows_to_dataset(rows).to_parquet(tmp_path / "rows.parquet")
    assert list(load_dataset_file(tmp_path / "rows.parquet")["messages"]) == [row["messages"] for row in rows]
    assert "rows_to_dataset" not in caplog.text


def test_nulls_that_arrow_forced_are_taken_out_of_a_data_set_and_said(caplog):
    rows = [
        {"messages": calling("rain", {"city": "Oslo"}), "tools": schema(city={"type": "string"})},
        {"messages": calling("convert", {"miles": 3}), "tools": schema(miles={"type": "number", "minimum": 0})},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "Ada"}]},
    ]
    filled = Dataset.from_list(rows)
    assert filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo", "miles": None}
    read = read_dataset(filled)
    assert [row["messages"] for row in read] == [row["messages"] for row in rows]
    assert [row["tools"] for row in read] == [row.get("tools") for row in rows]
    for word in ("'messages'", "arguments.miles", "'tools'", "properties.city", "rows_to_dataset", "on_mixed_types"):
        assert word in caplog.text


def test_a_null_that_only_its_row_can_have_brought_stays(caplog):
    rows = [
        {"messages": calling("rain", {"city": "Oslo", "unit": None})},
        {"messages": [{"role": "user", "content": "b"}]},
    ]
    assert [row["messages"] for row in read_dataset(Dataset.from_list(rows))] == [row["messages"] for row in rows]
    assert "null" not in caplog.text.replace("rows", "")


def test_a_null_that_all_rows_have_stays_and_is_said(caplog):
    rows = [{"messages": calling("rain", {"city": city, "unit": None})} for city in ("Oslo", "Rome")]
    assert [row["messages"] for row in read_dataset(Dataset.from_list(rows))] == [row["messages"] for row in rows]
    assert "arguments.unit were kept" in caplog.text


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2,
        [{"prompt": "a", "completion": "b", "note": {"x": None}}],
        [{"text": "a", "weight": 0.5}],
        [{"input_ids": [1, 2], "labels": [-100, 2], "text": "note"}],
    ],
)
def test_a_data_set_that_needs_nothing_comes_back_itself(rows, caplog):
    data = Dataset.from_list(rows)
    assert read_dataset(data) is data
    assert not caplog.text


def test_other_shapes_in_a_data_set_are_read_and_notes_keep_their_types():
    from datasets import ClassLabel, Features, Value

    features = Features(
        {"instruction": Value("string"), "output": Value("string"), "topic": ClassLabel(names=["a", "b"])}
    )
    data = Dataset.from_list([{"instruction": "Say hi", "output": "hi", "topic": 1}], features=features)
    read = read_dataset(data)
    assert read.column_names == ["topic", "prompt", "completion"]
    assert read.features["topic"] == features["topic"]
    assert read[0]["prompt"] == [{"role": "user", "content": "Say hi"}]


def test_a_shuffled_data_set_is_read_in_its_order():
    data = Dataset.from_list([{"instruction": str(i), "output": str(i), "n": i} for i in range(9)]).shuffle(seed=1)
    assert [row["n"] for row in read_dataset(data)] == data["n"]
    assert [int(row["completion"][0]["content"]) for row in read_dataset(data)] == data["n"]


def test_empty_kwargs_where_a_row_has_none():
    talk = [{"role": "user", "content": "a"}]
    data = Dataset.from_list([{"messages": talk, "chat_template_kwargs": {"x": 1}}, {"messages": talk}])
    assert list(read_dataset(data)["chat_template_kwargs"]) == [{"x": 1}, {}]


REFUSED = {
    "an integer key": ({1: "a"}, "the key 1"),
    "infinity": ({"x": float("inf")}, "inf, which JSON has no word for"),
    "a large integer": ({"x": [2**70]}, "beyond 64 bits"),
    "a set": ({"x": {1}}, "a set"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_json_cannot_hold_is_refused_by_row(name):
    arguments, words = REFUSED[name]
    with pytest.raises(DataError, match="row 2: column 'messages'") as raised:
        rows_to_dataset([{"messages": calling("f", {})}, {"messages": calling("f", arguments)}])
    assert words in str(raised.value)


def test_json_that_json_does_not_know_in_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": calling("f", {"x": float("nan")})}))
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: column 'messages' holds nan"):
        load_dataset_file(path)


def test_whole_numbers_that_arrow_made_floats_are_said(caplog):
    rows = [{"messages": calling("f", {"x": x})} for x in (3, 1.5)]
    read_dataset(Dataset.from_list(rows))
    assert "whole numbers of messages[].tool_calls[].function.arguments.x stand there as 3.0" in caplog.text
    caplog.clear()
    assert [row["messages"] for row in read_dataset(rows_to_dataset(rows))] == [row["messages"] for row in rows]
    assert not caplog.text


def test_a_stream_is_read_as_it_comes(caplog):
    from datasets import IterableDataset

    rows = [{"instruction": f"Say {i}", "output": str(i), "id": i} for i in range(3)]
    read = read_dataset(IterableDataset.from_generator(lambda: iter(rows)))
    assert list(read) == [
        {
            "prompt": [{"role": "user", "content": f"Say {i}"}],
            "completion": [{"role": "assistant", "content": str(i)}],
            "id": i,
        }
        for i in range(3)
    ]
    bad = read_dataset(IterableDataset.from_generator(lambda: iter([*rows, {"instruction": 3, "output": "a"}])))
    with pytest.raises(DataError, match="row 4: column 'instruction' is an integer"):
        list(bad)
    list(read_dataset(Dataset.from_list([{"messages": calling("f", {})}]).to_iterable_dataset()))
    assert "column messages holds Arrow structs" in caplog.text
