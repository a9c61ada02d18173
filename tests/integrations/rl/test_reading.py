"""Prompts from files of prompts, and from demonstrations."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from qtarget.cli.rl import load_prompt_sets, load_rl_config
from qtarget.core.errors import ConfigError, DataError
from qtarget.integrations.rl.inputs.reading import load_prompts, read_prompts

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
    assert read_prompts(Dataset.from_list([row, row])).to_list() == found.to_list()


@pytest.mark.parametrize("bad", [{"prompt": None, "answer": "4"}, {"answer": "4"}])
def test_one_row_without_a_prompt_is_named(tmp_path, bad):
    good = {"prompt": "2+2=", "answer": "4"}
    with pytest.raises(DataError, match="line 2: no prompt, as 2 other rows have"):
        load_prompts(written(tmp_path, good, bad, good))


def test_no_rows_are_no_prompts():
    with pytest.raises(DataError, match="there are no rows"):
        read_prompts(Dataset.from_list([]))


def test_prompts_of_a_data_set_by_its_name(tmp_path):
    for split, rows in (("train", "123"), ("test", "45")):
        lines = [json.dumps({"prompt": f"{n}+1=", "answer": n}) for n in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    config = tmp_path / "rl.yaml"
    settings = {"model_name_or_path": "base", "dataset_name": str(tmp_path), "reward_funcs": "a:b", "output_dir": "out",
                "bf16": False, "per_device_train_batch_size": 4, "num_generations": 4, "report_to": "none"}  # fmt: skip
    config.write_text(json.dumps(settings))
    train, validation = load_prompt_sets(load_rl_config(config, ["--eval_strategy", "epoch"]))
    assert train["prompt"] == ["1+1=", "2+1=", "3+1="] and validation is not None and validation["answer"] == ["4", "5"]
    assert load_prompt_sets(load_rl_config(config))[1] is None
    with pytest.raises(ConfigError, match="are both 'train'"):
        load_prompt_sets(load_rl_config(config, ["--eval_strategy", "epoch", "--dataset_test_split", "train"]))
    with pytest.raises(DataError, match="split 'absent'"):
        load_prompt_sets(load_rl_config(config, ["--dataset_train_split", "absent"]))


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
