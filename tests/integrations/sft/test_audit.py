"""The audit's tokens are the trainer's, row by row, and rows at which TRL stops are kept."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from qtarget import QTargetConfig
from qtarget.core.errors import ConfigError
from qtarget.data.checks.audit import audit_rows
from qtarget.data.checks.tokens import check_roles
from qtarget.integrations.sft.audit import cut, tokenise
from tests.integrations.conftest import SETTINGS, make_tokenizer

TALK = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}],
    [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Why"}, {"role": "assistant", "content": "So"},
     {"role": "user", "content": "And"}, {"role": "assistant", "content": "More of it"}],
    [{"role": "user", "content": "Who"}, {"role": "assistant", "content": "Me"}],
]  # fmt: skip
SHAPES = {
    "prompt_completion": Dataset.from_dict({"prompt": ["ab:", "c:", "abcdef:"], "completion": ["xyz", "yy", "z" * 9]}),
    "text": Dataset.from_dict({"text": ["abc", "de fg", "hijklmnopqr"]}),
    "messages": Dataset.from_dict({"messages": TALK}),
    "split_messages": Dataset.from_dict({"prompt": [t[:-1] for t in TALK], "completion": [t[-1:] for t in TALK]}),
    "tokens": Dataset.from_dict(
        {"input_ids": [[5, 6, 7], [8, 9, 10, 11]], "labels": [[-100, 6, 7], [-100, -100, 10, 11]]}
    ),
}


def config(tmp_path, **settings) -> QTargetConfig:
    return QTargetConfig(str(tmp_path / "out"), **{**SETTINGS, **settings})


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_those_of_the_trainer(shape, mode, tmp_path, make_trainer):
    settings = {
        "max_length": 9,
        "truncation_mode": mode,
        "shuffle_dataset": False,
        "assistant_only_loss": shape == "messages",
    }
    found = tokenise(config(tmp_path, **settings), SHAPES[shape], make_tokenizer())
    theirs = make_trainer(data=SHAPES[shape], **settings).train_dataset
    kept = {row["qtarget_row_ids"][0]: row for row in theirs}
    assert len(found.rows) == len(SHAPES[shape])
    assert kept
    for number, row in enumerate(found.rows):
        mine = cut(row, config(tmp_path, **settings))
        if number not in kept:  # TRL drops what has no label left
            assert (mine["labels"] == -100).all()
            continue
        assert mine["input_ids"].tolist() == kept[number]["input_ids"]
        assert mine["labels"].tolist() == kept[number]["labels"]


def test_packing_and_shuffling_do_not_reach_the_audit(tmp_path):
    args = config(tmp_path, packing=True, shuffle_dataset=True, max_length=9)
    rows = SHAPES["prompt_completion"]
    plain = tokenise(config(tmp_path, max_length=None), rows, make_tokenizer())
    packed = tokenise(args, rows, make_tokenizer())
    for a, b in zip(plain.rows, packed.rows, strict=True):
        assert a["input_ids"].tolist() == b["input_ids"].tolist()
    assert (args.packing, args.max_length) == (True, 9)  # the caller's are left alone


def test_a_conversation_without_assistant_is_kept_where_trl_stops(tmp_path, make_trainer):
    from qtarget.core.errors import DataError

    silent = [{"role": "user", "content": "Anyone there"}]
    rows = Dataset.from_dict({"messages": [TALK[0], silent, TALK[2]]})
    with pytest.raises(DataError):
        make_trainer(data=rows, assistant_only_loss=True)
    found = tokenise(config(tmp_path, assistant_only_loss=True), rows, make_tokenizer())
    report = audit_rows(found.rows, max_length=64)
    assert (report.findings["unsupervised"].severity, report.findings["unsupervised"].rows) == ("error", (1,))
    assert len(found.rows[1]["input_ids"]) == len("<Anyone there>")
    assert (found.rows[1]["labels"] == -100).all()
    assert (found.rows[0]["labels"] != -100).sum() == len("Hello you") + 1


RUNAWAY = "{%- for m in messages -%}{%- generation -%}{{ '<' + m['content'] + '>' }}{%- endgeneration -%}{%- endfor -%}"


def test_a_template_that_marks_the_users_text_too_is_an_error(tmp_path):
    rows = SHAPES["messages"]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = RUNAWAY
    args = config(tmp_path, assistant_only_loss=True)

    def roles(tokens):
        return check_roles(
            list(rows), tokens.rows, tokens.tokenizer, chat_template=tokens.chat_template, assistant_only=True
        )

    (found,) = roles(tokenise(args, rows, tokenizer))
    assert (found.check, found.severity, found.count) == ("foreign_text", "error", 3)
    users = ["<Hi>", "<be kind><Why>", "<And>", "<Who>"]
    assert found.evidence["tokens"] == sum(map(len, users)) - 3  # nothing predicts the first token of a row
    assert roles(tokenise(args, rows, make_tokenizer())) == []


def test_settings_that_trl_refuses_say_so(tmp_path):
    with pytest.raises(ConfigError, match="not conversational"):
        tokenise(config(tmp_path, assistant_only_loss=True), SHAPES["text"], make_tokenizer())


def test_many_rows_keep_their_order(tmp_path):
    rows = Dataset.from_dict({"text": [chr(97 + i % 26) * (1 + i % 7) for i in range(2500)]})
    found = tokenise(config(tmp_path), rows, make_tokenizer())
    assert [len(row["input_ids"]) for row in found.rows] == [2 + i % 7 for i in range(2500)]
    assert all(isinstance(row["labels"], np.ndarray) for row in found.rows)


PAIR = {"prompt": "ab:", "completion": "xyz"}


@pytest.mark.parametrize(
    ("more", "settings", "check"),
    [
        ({"weight": -1.0}, {}, "unusable_weights"),
        ({"weight": "high"}, {}, "unusable_weights"),
        ({"weight_spans": [[0, 9, 0]]}, {}, "unusable_weights"),
        ({"weight": 0}, {"weights_scale": "label"}, None),
        ({"weight": 0}, {}, "weightless"),
        ({"weight_spans": [[0, 1, 0]]}, {"max_length": 4}, "weightless"),
        ({"weight_spans": [[0, 1, 0]]}, {}, None),
    ],
)
def test_weights_are_errors_of_the_audit_exactly_where_training_stops(more, settings, check, tmp_path, make_trainer):
    from qtarget.core.errors import DataError

    rows = Dataset.from_list([{**PAIR, **more}])
    found = tokenise(config(tmp_path, **settings), rows, make_tokenizer())
    assert [one.check for one in found.findings if one.severity == "error"] == ([check] if check else [])
    if check:
        with pytest.raises(DataError):
            make_trainer(data=rows, **settings)
    else:
        make_trainer(data=rows, **settings)


def test_rows_of_weight_0_are_those_that_training_leaves_out(tmp_path, make_trainer):
    rows = Dataset.from_list([{**PAIR, "weight": weight} for weight in (1.0, 0.0, 2.0, None)])
    found = tokenise(config(tmp_path), rows, make_tokenizer()).findings
    assert [one.rows for one in found if one.check == "weightless"] == [(1,)]
    kept = {row["qtarget_row_ids"][0] for row in make_trainer(data=rows).train_dataset}
    assert kept == {0, 2, 3}


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_masks_beside_tokens_are_read_as_in_training(mask, tmp_path, make_trainer):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 1], mask: [0, 0, 1, 1]}])
    found = tokenise(config(tmp_path), rows, make_tokenizer())
    assert found.rows[0]["labels"].tolist() == [-100, -100, 7, 1]
    assert make_trainer(data=rows).train_dataset[0]["labels"] == [-100, -100, 7, 1]
