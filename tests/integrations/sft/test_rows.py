"""What a trainer tokenises of rows with objects: each row's own keys, whatever the others have. The template writes JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from qtarget import QTargetConfig, QTargetTrainer
from qtarget.core.errors import DataError
from qtarget.data.formats.shape import ReadOptions
from qtarget.data.loading import load_dataset_file, read_files, rows_to_dataset
from qtarget.integrations.sft.rows import training_rows_of
from tests.integrations.conftest import make_model

TEMPLATE = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}{%- generation -%}{{ m | tojson }}{%- endgeneration -%}"
    "{%- else -%}{{ m | tojson }}{%- endif -%}{%- endfor -%}{{ tools | tojson }}{{ documents | tojson if documents }}"
)
TALK = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ m['tool_calls'] | tojson if m['tool_calls'] }};{% endfor %}"
"""It does not write a message's weight, as no real template does."""


def make_tokenizer(template):
    from transformers import AutoTokenizer

    from qtarget.data.embedded import base_model_path

    made = AutoTokenizer.from_pretrained(base_model_path())
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def talking():
    return make_tokenizer(TALK)


def trained(tmp_path, tokenizer, data, evaluation=None, **settings) -> Any:
    args = QTargetConfig(
        output_dir=str(tmp_path / "out"), report_to=[], bf16=False, use_cpu=True, max_length=None,
        eos_token=tokenizer.eos_token, **settings,
    )  # fmt: skip
    model = make_model(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    return QTargetTrainer(model, args, None, data, evaluation, tokenizer)


def texts(tokenizer, data):
    return [tokenizer.decode(row["input_ids"]) for row in data]


def rendered(row):
    """The template, by hand."""
    parts = [*row["messages"], row.get("tools")]
    documents = (row.get("chat_template_kwargs") or {}).get("documents")
    return "".join(json.dumps(part, ensure_ascii=False) for part in [*parts, *([documents] if documents else [])])


def calling(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def tool(**properties):
    return [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}]


ROWS = [
    {"messages": calling("rain", city="Oslo"), "tools": tool(city={"type": "string"})},
    {"messages": calling("convert", miles=3, digits=1), "tools": tool(miles={"type": "number", "minimum": 0})},
    {"messages": calling("none"), "chat_template_kwargs": {"documents": [{"title": "x"}, {"text": "y"}]}},
]


@pytest.mark.parametrize("kind", ["file", "rows", "arrow", "json"])
def test_each_row_is_trained_with_its_own_keys(tmp_path, tokenizer, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    everything = [
        {"tools": None, "chat_template_kwargs": None, **row} for row in ROWS
    ]  # from_list takes row 1's columns
    data = {
        "file": lambda: load_dataset_file(path),
        "rows": lambda: rows_to_dataset(ROWS),
        "arrow": lambda: Dataset.from_list(everything),
        "json": lambda: Dataset.from_list(everything, on_mixed_types="use_json"),
    }[kind]()
    trainer = trained(tmp_path, tokenizer, data, {"one": data})
    assert texts(tokenizer, trainer.train_dataset) == [rendered(row) for row in ROWS]
    assert texts(tokenizer, trainer.eval_dataset["one"]) == [rendered(row) for row in ROWS]


def test_the_audit_sees_the_same(tmp_path, tokenizer):
    from qtarget.integrations.sft.audit import tokenise

    args = QTargetConfig(output_dir=str(tmp_path / "out"), report_to=[], bf16=False, use_cpu=True)
    found = tokenise(args, rows_to_dataset(ROWS), tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in found.rows] == [rendered(row) for row in ROWS]


def test_a_message_weight_counts_in_any_row(tmp_path, talking):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = rows_to_dataset([{"messages": talk}, {"messages": [talk[0], talk[1] | {"weight": 0}]}])
    weights = trained(tmp_path, talking, data).train_dataset["loss_weights"]
    assert set(weights[0]) == {1.0}
    assert 0.0 in weights[1]


def test_other_shapes_in_python(tmp_path, tokenizer):
    rows = [{"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}]
    expected = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    trainer = trained(tmp_path, tokenizer, Dataset.from_list(rows), assistant_only_loss=True)
    assert texts(tokenizer, trainer.train_dataset) == [rendered(expected)]


def test_a_note_called_text_changes_no_token(tmp_path, tokenizer):
    rows = [{"prompt": "Norway? ", "completion": "Oslo"}, {"prompt": "Italy? ", "completion": "Rome"}]
    plain, noted = (
        trained(tmp_path, tokenizer, Dataset.from_list([row | more for row in rows])).train_dataset
        for more in ({}, {"text": "geo", "messages": [{"role": "user", "content": "x"}]})
    )
    assert list(plain["input_ids"]) == list(noted["input_ids"])
    assert all(row[-1] == tokenizer.eos_token_id for row in noted["input_ids"])


def test_roles_that_the_user_named_are_taken_by_the_trainer(tmp_path, tokenizer):
    row = {"messages": [{"role": "narrator", "content": "It rains"}, {"role": "assistant", "content": "Yes"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    data = load_dataset_file(path, options=ReadOptions(roles={"narrator": "narrator"}))
    assert texts(tokenizer, trained(tmp_path, tokenizer, data).train_dataset) == [rendered(row)]
    with pytest.raises(DataError, match=r"train data, row 1.*'narrator'|data, row 1.*'narrator'"):
        trained(tmp_path, tokenizer, Dataset.from_list([row]))


def test_tool_output_of_a_session_is_never_trained(tmp_path, talking):
    lines = [
        {"role": "user", "parts": [{"type": "text", "text": "Rain?"}], "created_at": "t"},
        {
            "role": "assistant", "created_at": "t",
            "parts": [
                {"type": "tool", "tool_name": "rain", "tool_input": {"city": "Oslo"}, "tool_output": "SECRET"},
                {"type": "tool", "tool_name": "snow", "tool_status": "error", "tool_output": "HIDDEN"},
                {"type": "text", "text": "Yes"},
            ],
        },
    ]  # fmt: skip
    path = tmp_path / "messages.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = trained(tmp_path, talking, rows_to_dataset(read_files(path).rows)).train_dataset
    (row,) = rows
    on = [i for i, weight in zip(row["input_ids"], row["loss_weights"], strict=True) if weight]
    assert "SECRET" in talking.decode(row["input_ids"])
    said = talking.decode(on)
    assert "Yes" in said
    assert not any(word in said for word in ("SECRET", "HIDDEN", "snow"))


def test_rows_that_are_only_scored_are_not_called_train_data(tokenizer, caplog):
    """`evaluate` makes its rows by a trainer that never trains."""
    words = "many words " * 30
    rows = Dataset.from_list([{"prompt": "Ask.", "completion": words}, {"prompt": "Ask.", "completion": "Short."}])
    model = make_model(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    with caplog.at_level("WARNING"):
        ready = training_rows_of(model, tokenizer, rows, {"max_length": 20})
    assert len(ready.rows) == 2 and len(ready.rows[0]["input_ids"]) == 20
    said = [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("evaluation data: 1 of 2 rows")


def test_what_training_leaves_out_by_weight_0_is_not_scored(tmp_path, talking):
    """`evaluate` counts the tokens that the run's `nll` counts."""
    talk = [
        {"role": "user", "content": "Ask."},
        {"role": "assistant", "content": "Wrong.", "weight": 0},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "Right.", "weight": 0.5},
    ]
    whole = [{**message, "weight": 0} for message in talk]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": rows}) + "\n" for rows in (talk, whole)))
    rows = rows_to_dataset(read_files(path).rows)
    model = make_model(vocab_size=len(talking), bos_token_id=None, eos_token_id=talking.eos_token_id)
    (row,) = training_rows_of(model, talking, rows, {}).rows
    said = talking.decode([y for y in row["labels"] if y != -100])
    assert row["row"] == 0 and "Right." in said and "Wrong." not in said
    both = training_rows_of(model, talking, rows, {"weights_scale": "label"}).rows  # weight 0 masks nothing there
    assert [row["row"] for row in both] == [0, 1]
    assert "Wrong." in talking.decode([y for y in both[0]["labels"] if y != -100])
