"""What rows say of one another, against a count by hand over all other rows: no hash tables, no leaving out by subtraction."""

from __future__ import annotations

import numpy as np
import pytest

from qtarget.core.errors import ShapeError
from qtarget.data.agreement import (
    agreement,
    confident_choices,
    context_trust,
    counted_fields,
    prior_conflict,
    prior_reliability,
)


def drawn(seed: int, rows: int = 7, vocab: int = 5, length: int = 9):
    """Ragged rows of few different tokens, so that contexts repeat, also within a row; masks with gaps."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(vocab, size=rng.integers(1, length)).tolist() for _ in range(rows)]
    masks = [(rng.random(len(row)) < 0.7).tolist() for row in ids]
    return ids, masks


def trained(mask: list[bool]) -> list[int]:
    return [i for i in range(1, len(mask)) if mask[i]]


def depth(mask: list[bool], i: int) -> int:
    """How many trained tokens end at ``i`` without a gap."""
    count = 0
    while i - count >= 1 and mask[i - count]:
        count += 1
    return count


def same_context(kind: tuple[str, int], a: tuple[list, list, int], b: tuple[list, list, int]) -> bool:
    """Whether token i of row a and token j of row b have the same context of this kind."""
    (ids, mask, i), (others, other_mask, j) = a, b
    name, number = kind
    if name == "last":
        return i >= number and j >= number and ids[i - number : i] == others[j - number : j]
    if name == "back":
        return i >= number and j >= number and ids[i - number] == others[j - number]
    return depth(mask, i) == depth(other_mask, j)


KINDS = [("last", 1), ("last", 2), ("last", 3), ("back", 2), ("back", 3), ("depth", 0)]


def by_hand(ids: list[list[int]], masks: list[list[bool]]) -> list[list[float]]:
    """The largest k / (n + 1), every other row's trained tokens looked at one by one."""
    out = []
    for r, (row, mask) in enumerate(zip(ids, masks)):
        shares = []
        for i in trained(mask):
            best = 0.0
            for kind in KINDS:
                places = [
                    other[j]
                    for s, (other, other_mask) in enumerate(zip(ids, masks))
                    if s != r
                    for j in trained(other_mask)
                    if same_context(kind, (row, mask, i), (other, other_mask, j))
                ]
                best = max(best, places.count(row[i]) / (len(places) + 1))
            shares.append(best)
        out.append(shares)
    return out


@pytest.mark.parametrize("seed", range(6))
def test_agreement_is_the_count_by_hand(seed: int) -> None:
    ids, masks = drawn(seed)
    expected = by_hand(ids, masks)
    assert any(0 < share < 1 for row in expected for share in row)
    for found, row in zip(agreement(ids, masks), expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, row, rtol=1e-6)


def test_a_row_never_agrees_with_itself() -> None:
    """A row that says one thing a hundred times is no witness for it; another row that says it once is."""
    ids = [[1, *[2, 3] * 100], [4, 5, 6]]
    masks = [[False] + [True] * (len(row) - 1) for row in ids]
    assert float(agreement(ids, masks)[0].max()) == 0
    more = agreement([*ids, [9, 2, 3]], [*masks, [False, True, True]])
    assert float(more[0][1]) == pytest.approx(1 / 2)  # 3 after 2: one place in another row


def test_noise_has_less_agreement_than_what_it_replaced() -> None:
    """Rows of one format with random values; some tokens of the format are replaced at random."""
    rng = np.random.default_rng(0)
    ids = [[int(v), 50, 51, int(v), 52, 53] for v in rng.integers(10, 40, size=60)]
    masks = [[False, True, True, True, True, True]] * 60
    hit = rng.choice(60, 12, replace=False).tolist()
    for r in hit:
        ids[r][5] = int(rng.integers(60, 999))
    last = np.array([row[-1] for row in agreement(ids, masks)])
    noisy = np.isin(np.arange(60), hit)
    assert last[noisy].max() == 0
    assert last[~noisy].min() > 0.7


def test_reliability_is_the_mean_of_what_was_known() -> None:
    agreed, p = np.array([0.9, 0.3, 0.0]), np.array([0.5, 0.1, 0.9])
    assert prior_reliability(agreed, np.log(p)) == pytest.approx((0.9 * 0.5 + 0.3 * 0.1) / 1.2)
    assert prior_reliability(agreed, np.zeros(3)) == pytest.approx(1.0)  # all known
    assert prior_reliability(agreed, np.full(3, -np.inf)) == 0.0
    assert (
        prior_reliability(np.zeros(3), np.log(p)) == 0.0
    )  # no row agrees with any other: nothing is known of the base


def conflict_by_hand(ids, masks, log_probs) -> list[list[float]]:
    out = []
    for r, (row, mask) in enumerate(zip(ids, masks)):
        values = []
        for i in trained(mask):
            conflict = 0.0
            for length in (3, 2, 1):
                flags = [
                    log_probs[s][m] < np.log(0.1)
                    for s, (other, other_mask) in enumerate(zip(ids, masks))
                    if s != r
                    for m, j in enumerate(trained(other_mask))
                    if same_context(("last", length), (row, mask, i), (other, other_mask, j))
                ]
                if len(flags) >= 3:
                    share = sum(flags) / len(flags)
                    conflict = 0.0 if share <= 0.6 else 1.0 if share >= 0.8 else (share - 0.6) / 0.2
                    break
            values.append(conflict)
        out.append(values)
    return out


@pytest.mark.parametrize("seed", range(6))
def test_conflict_is_the_count_by_hand(seed: int) -> None:
    ids, masks = drawn(seed, rows=12, vocab=3)
    rng = np.random.default_rng(seed)
    log_probs = [np.log(rng.uniform(0.0, 0.2, size=len(trained(mask)))) for mask in masks]
    expected = conflict_by_hand(ids, masks, log_probs)
    assert any(value > 0.1 for row in expected for value in row)
    found = prior_conflict(ids, masks, log_probs)
    for ours, row in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, row, rtol=1e-5, atol=1e-7)


def test_conflict_needs_surprise_most_of_the_time() -> None:
    ids, masks = [[5, 7, 7, 1]] * 10 + [[9, 8, 8, 1]], [[False, False, False, True]] * 11

    def conflict(p: float, surprised: int = 10) -> list[float]:
        known = [np.log(np.array([p if i < surprised else 0.9])) for i in range(11)]
        return [round(float(row[0]), 3) for row in prior_conflict(ids, masks, known)]

    assert conflict(0.01)[:10] == [1] * 10  # nine other rows surprise the base here
    assert conflict(0.01)[10] == 0  # no other row has this context: nothing is known
    assert conflict(0.5) == [0] * 11  # the base knew
    assert conflict(0.01, surprised=6)[:10] == [0] * 6 + [0.333] * 4  # five or six of nine: noise, or just above it


def test_a_choice_that_the_rows_keep_contradicting_is_a_conflict_whatever_stands_before_it() -> None:
    ids = [[100 + i, 200 + i, 50 + i % 4] for i in range(10)]  # no context is shared, and the answers vary
    masks = [[False, False, True]] * 10
    known = [np.log(np.array([0.01 if i < 9 else 0.9])) for i in range(10)]
    says = [np.array([7 if i % 2 == 0 or i == 9 else -1]) for i in range(10)]  # sure at rows 0, 2, 4, 6, 8 and 9
    assert [float(row[0]) for row in prior_conflict(ids, masks, known)] == [0.0] * 10
    found = [round(float(row[0]), 3) for row in prior_conflict(ids, masks, known, says)]
    assert found == [
        1,
        0,
        1,
        0,
        1,
        0,
        1,
        0,
        1,
        1,
    ]  # four of five others: 0.8; row 9, where the base was right, sees five of five
    rare = [np.array([7 if i < 3 else -1]) for i in range(10)]  # two other rows are not enough
    assert not any(float(row[0]) for row in prior_conflict(ids, masks, known, rare))


@pytest.mark.parametrize("seed", range(4))
def test_conflict_by_choice_is_the_count_by_hand(seed: int) -> None:
    ids, masks = drawn(seed, rows=12, vocab=3)
    rng = np.random.default_rng(seed)
    log_probs = [np.log(rng.uniform(0.0, 0.13, size=len(trained(mask)))) for mask in masks]
    says = [rng.integers(-1, 3, size=len(trained(mask))) for mask in masks]
    by_context, moved = conflict_by_hand(ids, masks, log_probs), 0
    found = prior_conflict(ids, masks, log_probs, says)
    for r, row in enumerate(found):
        for i, value in enumerate(row):
            others = [
                log_probs[s][j] < np.log(0.1)
                for s in range(len(ids))
                for j in range(len(log_probs[s]))
                if s != r and says[s][j] == says[r][i] >= 0
            ]
            share = sum(others) / len(others) if len(others) >= 3 else 0.0
            by_choice = min(1.0, max(0.0, (share - 0.6) / 0.2))
            moved += by_choice > by_context[r][i]
            assert float(value) == pytest.approx(max(by_choice, by_context[r][i]), rel=1e-5, abs=1e-6)
    assert moved


def test_what_stands_after_noise_says_little_of_the_base() -> None:
    """Ten rows agree; in four a drawn token comes first, after which the base is surprised by the right one too."""
    ids = [[5, 30 + i if i < 4 else 7, 8, 9] for i in range(10)]
    masks = [[False, True, True, True]] * 10
    known = [np.log(np.array([0.01, 0.05, 0.05] if i < 4 else [0.9, 0.9, 0.9])) for i in range(10)]
    agreed = agreement(ids, masks)
    trust = [context_trust(values) for values in agreed]
    assert trust[0].tolist() == [1.0, 0.0, 0.0] and min(trust[9]) > 0.9
    flat = [np.concatenate(values) for values in (agreed, known, trust)]
    assert prior_reliability(*flat[:2]) < 0.7 < 0.85 < prior_reliability(*flat)
    eight = [row[2] for row in prior_conflict(ids, masks, [np.log(np.array([0.9, 0.9, 0.05]))] * 10, None, trust)]
    assert eight == [1.0] * 10  # the base is surprised where nothing stands before: a conflict for all that come there
    noisy = [np.log(np.array([0.9, 0.9, 0.05 if i < 8 else 0.9])) for i in range(10)]
    spoilt = [np.array([1.0, 1.0, 0.0 if i < 8 else 1.0]) for i in range(10)]
    assert float(prior_conflict(ids, masks, noisy)[9][2]) > 0.9  # eight of nine others
    assert float(prior_conflict(ids, masks, noisy, None, spoilt)[9][2]) == 0.0  # but none of those is trusted


@pytest.mark.parametrize("length", [1, 2, 6])
def test_trust_is_the_product_over_three_tokens_before(length: int) -> None:
    agreed = np.random.default_rng(length).uniform(0, 1, length)
    expected = [
        np.prod([agreed[j] / (agreed[j] + 0.02) for j in range(max(0, i - 3), i)]) if i else 1.0 for i in range(length)
    ]
    np.testing.assert_allclose(context_trust(agreed), expected)


def test_a_choice_counts_where_the_base_is_sure_of_it() -> None:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([[0.2, 0.5, 0.0], [0.49, 0.4, 0.1], [1.0, 0.0, 0.0]]))
    for dtype in (np.float16, np.float32, np.float64):  # half of the mass is half in each
        found = confident_choices(np.array([[4, 5, -1], [4, 5, 6], [9, -1, -1]]), log_probs.astype(dtype))
        assert found.tolist() == [5, -1, 9]


def test_counted_fields_are_these_and_only_those_asked_for() -> None:
    ids, masks = drawn(1, rows=12, vocab=3)
    log_probs = [np.log(np.full(len(trained(mask)), 0.05)) for mask in masks]
    shares = by_hand(ids, masks)
    everything = frozenset({"agreement", "reliability", "conflict", "label_log_probs"})
    found = counted_fields(ids, masks, log_probs, everything)
    assert set(found) == {"agreement", "reliability", "conflict"}
    np.testing.assert_allclose(np.concatenate(found["agreement"]), np.concatenate(shares), rtol=1e-6)
    trust = [context_trust(np.array(values, dtype=np.float32)) for values in shares]
    expected = np.concatenate(prior_conflict(ids, masks, log_probs, None, trust))
    np.testing.assert_allclose(np.concatenate(found["reliability"]), 0.05 * (1 - expected), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.concatenate(found["conflict"]), expected, rtol=1e-5, atol=1e-7)
    assert set(counted_fields(ids, masks, log_probs, frozenset({"conflict"}))) == {"conflict"}
    assert counted_fields(ids, masks, log_probs, frozenset({"label_log_probs"})) == {}


def test_arrays_count_as_lists_do() -> None:
    ids, masks = drawn(2)
    arrays = agreement([np.array(row) for row in ids], [np.array(mask) for mask in masks])  # pyright: ignore
    for found, expected in zip(arrays, agreement(ids, masks), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_misaligned_inputs_say_which_row() -> None:
    with pytest.raises(ShapeError, match="row 2 has 2 tokens and a mask of 1"):
        agreement([[1, 2], [1, 2]], [[False, True], [True]])
    with pytest.raises(ShapeError, match="2 rows of tokens and 1 masks"):
        agreement([[1, 2], [1, 2]], [[False, True]])
    with pytest.raises(ShapeError, match="2 agreements and 1 log-probs"):
        prior_reliability(np.ones(2), np.zeros(1))
    with pytest.raises(ShapeError, match="at least one"):
        prior_reliability(np.ones(0), np.zeros(0))
    rows, masks = [[1, 2], [1, 2]], [[False, True]] * 2
    one, two = [np.zeros(1)] * 2, [np.zeros(1), np.zeros(2)]
    with pytest.raises(ShapeError, match="row 2: 1 supervised tokens and 2 log-probs"):
        prior_conflict(rows, masks, two)
    with pytest.raises(ShapeError, match="2 rows of tokens, 1 of log-probs"):
        prior_conflict(rows, masks, one[:1])
    with pytest.raises(ShapeError, match="row 2: 1 supervised tokens and 2 choices"):
        prior_conflict(rows, masks, one, two)
    with pytest.raises(ShapeError, match="2 rows of tokens, 1 of trust"):
        prior_conflict(rows, masks, one, one, one[:1])
