"""Which rows belong together, and which are the same."""

from __future__ import annotations

import pytest

from qtarget.data.overlap import content_hash


@pytest.mark.parametrize("mask", ["labels", "completion_mask", "assistant_masks"])
def test_tokens_with_another_mask_are_other_rows(mask):
    """A cache of the one holds nothing of the other."""
    rows = [{"input_ids": [5, 6, 7], mask: values} for values in ([0, 0, 1], [0, 1, 1])]
    assert len({content_hash(row) for row in [*rows, {"input_ids": [5, 6, 7]}]}) == 3
