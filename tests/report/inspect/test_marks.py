"""Marks of noise at trained tokens: against the characters, also where nothing or one token stands before the answer."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from qtarget.data.embedded import base_model_path
from qtarget.report.inspect.marks import token_marks


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


ANSWER = "no no no no no, the answer is seven"


@pytest.mark.parametrize("answer", [ANSWER, " and and and and and and and"])
@pytest.mark.parametrize("start", ["", "<bos>"])
@pytest.mark.parametrize("shape", ["prompt", "messages"])
@pytest.mark.parametrize("cut", [None, 4])
def test_marks_stand_at_the_characters(tokenizer, answer, start, shape, cut):
    """With nothing before the answer its first token is no label; the others keep their places."""
    if start:
        start = tokenizer.bos_token or tokenizer.eos_token
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    head = tokenizer(start, add_special_tokens=False)["input_ids"]
    ids = np.array([*head, *encoded["input_ids"], tokenizer.eos_token_id])[:cut]
    offsets = [*[(0, 0)] * len(head), *encoded["offset_mapping"], (0, 0)][:cut]
    middle = encoded["offset_mapping"][2]
    row = {"noise_spans": [[*middle, "random_tokens"]]}
    if shape == "prompt":
        row |= {"prompt": "", "completion": answer}
    else:
        row |= {"messages": [{"role": "assistant", "content": answer}]}
    found = token_marks(row, ids, np.arange(1, len(ids)), tokenizer)
    assert found is not None
    assert found.tolist() == [pair == middle for pair in offsets[1:]]


def test_a_prompt_of_one_token_that_the_answer_repeats(tokenizer):
    encoded = tokenizer(" and and and and", add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"])
    assert len(ids) == 4 and len(set(ids.tolist())) == 1
    row = {"prompt": " and", "completion": " and and and", "noise_spans": [[4, 8, "random_tokens"]]}
    found = token_marks(row, ids, np.arange(1, 4), tokenizer)
    assert found is not None and found.tolist() == [False, True, False]


def test_a_row_without_labels_has_no_marks(tokenizer):
    row = {"prompt": "", "completion": "a", "noise_spans": [[0, 1, "random_tokens"]]}
    ids = np.array(tokenizer("a", add_special_tokens=False)["input_ids"][:1])
    found = token_marks(row, ids, np.zeros(0, np.int64), tokenizer)
    assert found is None or found.tolist() == []
