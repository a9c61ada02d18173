"""Contexts packed and sorted: no two are one, in parts and in files as in memory, and what is counted is the count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qtarget.core.errors import ShapeError
from qtarget.data.agreement import KINDS, agreement, contexts_of, counted_fields, counted_flat, ngrams, prior_conflict
from qtarget.data.agreement.ngrams import NOWHERE, FlatTokens, in_parts, largest_shares, scratch
from tests.data.test_agreement import by_hand, conflict_by_hand, drawn, trained

LARGEST = 2**21 - 1


@pytest.mark.parametrize("kind", [("last", 1), ("last", 2), ("last", 3), ("back", 2), ("back", 3)])
def test_different_contexts_have_different_keys_and_equal_ones_the_same(kind) -> None:
    """Ids at both ends of what fits, where shifted numbers would run into each other."""
    rng = np.random.default_rng(0)
    ids = [rng.choice([0, 1, 2, LARGEST - 1, LARGEST], size=6).tolist() for _ in range(400)]
    flat = FlatTokens.of(ids, [[True] * 6] * 400)
    name, size = kind
    contexts = [
        tuple(row[t - size : t]) if name == "last" else (row[t - size],) if t >= size else ()
        for row in ids
        for t in range(1, 6)
    ]
    contexts = [found if len(found) == (size if name == "last" else 1) else None for found in contexts]
    keys = flat.keys(kind).tolist()
    assert len(set(zip(keys, contexts, strict=True))) == len(set(keys)) == len(set(contexts)) > 4
    assert {key for key, context in zip(keys, contexts, strict=True) if context is None} <= {int(NOWHERE)}


@pytest.fixture
def tiny_parts(monkeypatch):
    """A handful of contexts a part, two tokens a chunk, and every column in a file."""
    for name, value in (("PART", 8), ("CHUNK", 2), ("IN_MEMORY", 0)):
        monkeypatch.setattr(ngrams, name, value)


@pytest.mark.usefixtures("tiny_parts")
@pytest.mark.parametrize("seed", range(4))
def test_parts_chunks_and_files_change_nothing(seed: int) -> None:
    ids, masks = drawn(seed, rows=12, vocab=3)
    assert isinstance(scratch(3, np.uint64), np.memmap)
    for kind in KINDS:
        keys = FlatTokens.of(ids, masks).keys(kind)
        parts = [keys[index] for index in in_parts(keys)]
        assert len(parts) > 1 and sum(map(len, parts)) == int((keys != NOWHERE).sum())
        assert all(not set(a.tolist()) & set(b.tolist()) for i, a in enumerate(parts) for b in parts[:i])
    for found, row in zip(agreement(ids, masks), by_hand(ids, masks), strict=True):
        np.testing.assert_allclose(found, row, rtol=1e-6)
    rng = np.random.default_rng(seed)
    known = [np.log(rng.uniform(0.0, 0.2, size=len(trained(mask)))) for mask in masks]
    for found, row in zip(prior_conflict(ids, masks, known), conflict_by_hand(ids, masks, known), strict=True):
        np.testing.assert_allclose(found, row, rtol=1e-5, atol=1e-7)


def test_flat_rows_give_what_lists_give_and_progress_ends_at_what_was_said() -> None:
    ids, masks = drawn(3, rows=30, vocab=4)
    rng = np.random.default_rng(3)
    known = [np.log(rng.uniform(0.0, 0.3, size=len(trained(mask)))).astype(np.float32) for mask in masks]
    said = [rng.integers(-1, 4, size=len(values)) for values in known]
    fields = frozenset({"agreement", "reliability", "conflict"})
    lists = counted_fields(ids, masks, known, fields, said)
    flat, done = FlatTokens.of(ids, masks), []
    found = counted_flat(flat, np.concatenate(known), fields, np.concatenate(said), done.append)
    assert set(found) == set(lists) == fields
    for name, values in found.items():
        np.testing.assert_array_equal(values, np.concatenate(lists[name]))
    assert 0.5 * contexts_of(flat) < sum(done) <= contexts_of(flat)


def test_rows_without_trained_tokens_and_no_rows_are_no_error() -> None:
    assert [found.tolist() for found in agreement([[1, 2], [], [3]], [[False, False], [], [True]])] == [[], [], []]
    assert agreement([], []) == []
    assert largest_shares(FlatTokens.of([[5, 6]], [[True, True]]), KINDS).tolist() == [0.0]


@pytest.mark.parametrize("token", [-1, LARGEST + 1])
def test_ids_that_do_not_fit_are_refused(token: int) -> None:
    with pytest.raises(ShapeError, match=r"0 to 2,097,151"):
        agreement([[1, token, 3]], [[False, True, True]])


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ShapeError, match="expected equal numbers"):
        FlatTokens(np.zeros(3, np.int32), np.zeros(2, bool), np.array([0, 3]))
