"""Batches of one's own loop against a loss written out token by token."""

from __future__ import annotations

import pytest
import torch

import qtarget
from qtarget.core.errors import DataError
from qtarget.data.collate import collate

ROWS = [
    {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6], "loss_weights": [9.0, 9.0, 0.5, 2.0]},
    {"input_ids": [7, 8], "labels": [-100, 8]},
]


def test_the_loss_of_a_batch_is_the_mean_over_tokens_that_are_predicted():
    batch = collate(ROWS, pad_id=1)
    logits = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    found = qtarget.target_loss(logits, batch["labels"], "sft", loss_weights=batch["loss_weights"])
    log_probs = logits.log_softmax(-1)
    # the token at t is predicted at t - 1
    expected = -(0.5 * log_probs[0, 1, 5] + 2.0 * log_probs[0, 2, 6] + log_probs[1, 0, 8]) / 3
    torch.testing.assert_close(found, expected)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6], [7, 8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        ([{"input_ids": []}], "row 1 has no tokens"),
        (
            [{"input_ids": [1, 2], "labels": [2]}],
            "row 1 has 1 labels for 2 input_ids; expected one a token, not shifted",
        ),
    ],
)
def test_what_is_no_batch_says_why(rows, words):
    with pytest.raises(DataError, match=words):
        collate(rows)
