"""Validation rows: by prompt, seeded, never a prompt on both sides."""

from __future__ import annotations

import random

import pytest

from qtarget.data.prompts import prompt_of
from qtarget.starting.split import split_rows


def test_rows_of_one_prompt_stay_together_whatever_their_order():
    rng = random.Random(0)
    prompts = [f"q{rng.randrange(60)}" for _ in range(400)]
    train, validation = split_rows(prompts, 0.1, 3)
    assert sorted(train + validation) == list(range(400))
    assert not {prompts[i] for i in train} & {prompts[i] for i in validation}
    assert 20 <= len(validation) <= 40
    order = list(range(400))
    rng.shuffle(order)
    _, again = split_rows([prompts[i] for i in order], 0.1, 3)
    assert {prompts[order[i]] for i in again} == {prompts[i] for i in validation}
    assert split_rows(prompts, 0.1, 4)[1] != validation


@pytest.mark.parametrize(
    ("prompts", "share", "expected"),
    [(["a"] * 5, 0.1, 0), (["a", "b"], 0.1, 1), (["a", "a", "b", "b"], 0.1, 2), (["a", "b"], 0.0, 0)],
)
def test_small_and_odd_data(prompts, share, expected):
    train, validation = split_rows(prompts, share, 0)
    assert len(validation) == expected
    assert len(train) == len(prompts) - expected


def test_a_prompt_of_half_the_rows_is_never_validated_alone():
    prompts = ["big"] * 60 + [f"q{i}" for i in range(40)]
    for seed in range(5):
        _, validation = split_rows(prompts, 0.1, seed)
        assert len(validation) == 10
        assert "big" not in {prompts[i] for i in validation}


def test_what_a_prompt_is_in_each_shape():
    asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("A", "B")]
    assert len({prompt_of({"messages": asked + answer}) for answer in answers}) == 1
    assert len({prompt_of({"prompt": asked, "completion": answer}) for answer in answers}) == 1
    assert prompt_of({"messages": asked + answers[0]}) != prompt_of({"messages": asked[1:] + answers[0]})
    assert prompt_of({"text": "a  B"}) == prompt_of({"text": "A b"})
    tokens = [{"input_ids": [1, 2, 3, end], "labels": [-100, -100, 3, end]} for end in (4, 5)]
    assert prompt_of(tokens[0]) == prompt_of(tokens[1])
    assert prompt_of({"input_ids": [1, 2]}) != prompt_of({"input_ids": [1, 3]})
