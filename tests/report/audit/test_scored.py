"""Checks of what the base finds surprising, on hand-made numbers: noise, agreement against a sure base, coverage."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtarget.data.roc import roc_auc
from qtarget.report.audit.noise import (
    check_noise,
    knows_rows,
    row_means,
    suspected_rows,
    suspected_tokens,
    token_threshold,
)
from qtarget.report.audit.prior import agreed_labels, check_prior, flawed_prior
from qtarget.report.audit.scored import ScoredTokens, check_coverage, score_from_cache
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import ScoredRow
from qtarget.scoring.cache.schema import Provenance
from qtarget.scoring.cache.writer import write_cache


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def scored(rows: list[list[tuple[int, float, int, float]]], *, top: bool = True, entropy: float = 0.0) -> ScoredTokens:
    """Rows of (id, log-prob, base's favourite, its probability); the first token of a row is a prompt."""
    flat = [token for row in rows for token in row]
    offsets = np.cumsum([0, *map(len, rows)])
    places = np.array([i for i in range(len(flat)) if i not in set(offsets[:-1].tolist())], dtype=np.int64)
    ids, log_probs, tops, probabilities = (np.array(column) for column in zip(*flat))
    more = {}
    if top:
        more = {
            "top_ids": tops[places],
            "top_log_probs": np.log(probabilities[places]),
            "ranks": (tops == ids)[places].astype(int),
        }
    return ScoredTokens(
        ids, offsets, np.arange(len(rows)) + 100, places, log_probs[places], np.full(len(places), entropy), **more
    )


START = (0, 0.0, 0, 1.0)


def usual(token: int = 5) -> tuple[int, float, int, float]:
    return token, -0.1, token, 0.9


def odd(token: int, log_prob: float = -9.0, base: int = 5, sure: float = 0.95) -> tuple[int, float, int, float]:
    return token, log_prob, base, sure


class TestNoise:
    def test_odd_tokens_are_suspected_with_their_evidence(self):
        data = scored([[START, usual(), usual(6)]] * 30 + [[START, usual(), odd(9), odd(8), usual(), usual()]])
        assert token_threshold(data) == 3.0
        found = {f.check: f for f in check_noise(data, decode)}
        tokens = found["surprising_tokens"]
        assert (tokens.severity, tokens.count, tokens.rows) == ("warning", 1, (130,))
        assert (tokens.evidence["labels"], tokens.evidence["spans"]) == (2, 1)
        assert tokens.evidence["examples"][0] == {
            "row": 130, "position": 2, "text": "9", "before": "0 5", "log_prob": -9.0, "entropy": 0.0, "rank": None,
            "base_text": "5", "base_probability": 0.95,
        }  # fmt: skip
        assert tokens.evidence["longest_spans"] == [
            {"row": 130, "position": 2, "end": 4, "text": "9 8", "log_prob": -18.0}
        ]

    def test_usual_rows_have_a_fact_alone_and_no_rows_have_nothing(self):
        assert [f.check for f in check_noise(scored([[START, usual(), usual()]] * 30), decode)] == [
            "base_surprise",
            "row_kinds",
        ]
        nothing = ScoredTokens(*(np.zeros(n, dtype=np.int64) for n in (0, 1, 0, 0)), np.zeros(0), np.zeros(0))
        assert check_noise(nothing, decode) == check_prior(nothing, decode) == []

    def test_what_the_base_expects_to_be_open_is_not_suspected(self):
        """Nine nats of surprise at eight nats of entropy are what such a place has."""
        data = scored([[START, odd(9), usual(), usual()]] * 30, entropy=8.0)
        assert not suspected_tokens(data).any()
        assert suspected_tokens(scored([[START, odd(9), usual(), usual()]] * 30, entropy=0.0)).sum() == 30

    def test_the_threshold_is_the_median_plus_four_deviations(self):
        values = [0.0, 1.0, 2.0, 3.0, 50.0]  # median 2, absolute deviations 2 1 0 1 48: median 1
        data = scored([[START, *[(5, -v, 5, 0.9) for v in values]]])
        assert token_threshold(data) == pytest.approx(2 + 4 * 1.4826)
        assert suspected_tokens(data).tolist() == [False] * 4 + [True]

    def test_rows_are_outliers_of_their_mean_and_few_rows_have_none(self):
        rows = [[START, (5, -1.0 - 0.01 * i, 5, 0.5)] for i in range(40)]
        data = scored([*rows, [START, (5, -8.0, 6, 0.5)]])
        assert np.flatnonzero(suspected_rows(data)).tolist() == [40]
        found = {f.check: f for f in check_noise(data, decode)}["surprising_rows"]
        assert (found.count, found.rows) == (1, (140,))
        assert found.evidence["examples"][0]["mean_surprise"] == 8.0
        assert not suspected_rows(scored([*rows[:10], [START, (5, -8.0, 6, 0.5)]])).any()
        alike = scored([[[START, usual()], [START, usual(), (6, -0.9, 6, 0.4)]][i == 7] for i in range(30)])
        assert not suspected_rows(alike).any()  # 0.4 nats above rows that are all equal
        assert row_means(data, -data.log_probs)[[0, 40]].tolist() == [1.0, 8.0]

    def test_whether_surprise_tells_bad_rows_is_judged_on_the_rows(self):
        lost = scored([[START, odd(9), odd(8)]] * 60)
        knows = scored([[START, usual(), usual()]] * 60)
        mixed = scored([[START, usual(), odd(9) if i % 5 == 0 else usual()] for i in range(100)])
        for data, said in ((lost, "all rows score alike"), (knows, "all rows score alike")):
            found = {f.check: f for f in check_noise(data, decode)}["row_kinds"]
            assert (found.severity, found.count) == ("info", 0)
            assert said in found.message
        found = {f.check: f for f in check_noise(mixed, decode)}["row_kinds"]
        assert (found.severity, found.count, found.rows[:2]) == ("warning", 20, (100, 105))
        assert "two kinds: 20 of 100 rows look bad" in found.message
        weights = np.ones(200)
        weights[100::5] = 0.1
        (weighed,) = [f for f in check_noise(mixed, decode, weights) if f.check == "row_kinds"]
        assert (weighed.severity, weighed.count) == ("info", 0)
        assert "0.10 on average, those of the other rows 1.00, so they are weighed already" in weighed.message
        weights[100::10] = 1.0  # half of the bad rows teach as before
        assert [f for f in check_noise(mixed, decode, weights) if f.check == "row_kinds"] == [found]
        strange = scored(
            [[(i, 0.0, 0, 1.0), *[(9, -9.0 - 0.01 * (i % 7) - (i == 3) * 9, 5, 0.95)] * 3] for i in range(100)]
        )
        of_unknown = {f.check: f for f in check_noise(strange, decode)}
        assert "does not know these rows" in of_unknown["row_kinds"].message
        assert of_unknown["surprising_rows"].severity == "info", "what such a base finds strange accuses nobody"
        assert "no noise" in of_unknown["surprising_rows"].message
        (agreed,) = check_prior(strange, decode, known=knows_rows(check_noise(strange, decode)))
        assert (agreed.check, agreed.severity) == ("flawed_prior", "info")
        without = check_noise(scored([[START, odd(9)]] * 30, top=False), decode)[0]
        assert without.evidence["favourite_share"] is None


class TestFlawedPrior:
    def test_three_rows_that_agree_against_a_sure_base(self):
        rows = [[(i, 0, 0, 1), usual(3), odd(9), usual(4)] for i in range(3)]
        found = check_prior(scored(rows), decode)
        assert [(f.check, f.severity, f.count, f.rows) for f in found] == [
            ("flawed_prior", "warning", 3, (100, 101, 102))
        ]
        example = found[0].evidence["examples"][0]
        assert (example["text"], example["base_text"], example["rows_agreeing"]) == ("9", "5", 3)
        assert (example["context_tokens"], example["agreement"], example["labels"]) == (0, 1.0, 3)

    def test_the_context_is_the_most_specific_that_three_rows_share(self):
        rows = [[(i, 0, 0, 1), usual(3), usual(3), usual(4), odd(9)] for i in range(3)]
        elsewhere = [[(i, 0, 0, 1), usual(7), usual(5)] for i in range(20)]  # the base is right about 5 there
        groups = flawed_prior(scored(rows + elsewhere))
        assert [(g["context_tokens"], len(g["labels"])) for g in groups] == [(2, 3)]
        same = [[START, usual(3), odd(9), usual(i)] for i in range(3)]
        assert flawed_prior(scored(same))[0]["context_tokens"] is None

    @pytest.mark.parametrize(
        "rows",
        [
            [[(i, 0, 0, 1), usual(3), odd(9)] for i in range(2)],  # two are a coincidence
            [[(i, 0, 0, 1), usual(3), odd(9 + i)] for i in range(9)],  # noise does not agree
            [[(i, 0, 0, 1), usual(3), odd(9, sure=0.85)] for i in range(9)],  # the base is not sure
            [[(1, 0, 0, 1), usual(3), odd(9)]] * 9,  # one row, nine copies
            [[(i, 0, 0, 1), usual(3), odd(9) if i < 4 else odd(5, -0.05)] for i in range(9)],  # most say what the base says
            [[(i, 0, 0, 1), usual(3), usual(5)] for i in range(9)],
        ],
    )  # fmt: skip
    def test_silent(self, rows):
        assert check_prior(scored(rows), decode) == []
        assert not agreed_labels(scored(rows)).any()

    def test_without_topk_it_says_that_it_cannot_tell(self):
        (found,) = check_prior(scored([[START, odd(9)]] * 9, top=False), decode)
        assert (found.check, found.severity) == ("flawed_prior_unchecked", "info")
        assert "--top_k" in found.message

    @given(
        st.lists(
            st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=11), min_size=1, max_size=9
        )
    )
    def test_it_agrees_with_brute_force_over_every_context(self, drawn):
        """Contexts as tuples in a dictionary, rows as tuples in a set."""
        rows = [[(0, 0.0, 0, 1.0), *[(y, -9.0 if y != u else -0.01, u, 0.95) for y, u in row]] for row in drawn]
        expected: set[tuple[int, int]] = set()
        for size in (None, 8, 4, 2, 0):
            places = defaultdict(list)
            for i, row in enumerate(rows):
                for t in range(1, len(row)):
                    padded = [None] * 8 + [y for y, *_ in row[:t]]
                    context = tuple(padded) if size is None else tuple(padded[len(padded) - size :])
                    places[row[t][2], context].append((row[t][0], i, t))
            for (base, _), members in places.items():
                token, count = Counter(y for y, _, _ in members).most_common(1)[0]
                agreeing = {tuple(y for y, *_ in rows[i]) for y, i, _ in members if y == token}
                if token != base and 2 * count > len(members) and len(agreeing) >= 3:
                    expected |= {(i, t) for y, i, t in members if y == token}
        data = scored(rows)
        found = np.flatnonzero(agreed_labels(data))
        assert {(int(data.rows[k]), int(data.places[k] - data.offsets[data.rows[k]])) for k in found} == expected


class FixedSource:
    """The base's numbers are the row's ids: easy to recognise."""

    def score(self, token_ids, top_k, candidate_ids=None, *, positions):
        out = []
        for row, places in zip(token_ids, positions, strict=True):
            ids = row[places].astype(np.float32)
            tops = np.stack([row[places], row[places] + 1], 1).astype(np.int32)
            tops[places % 2 == 1] = tops[places % 2 == 1][:, ::-1]
            log_probs = np.tile(np.log(np.array([0.6, 0.3], np.float32)), (len(ids), 1))
            out.append(ScoredRow(-ids, ids / 2, tops, log_probs, np.full(len(ids), math.log(0.1), np.float32)))
        return out


@pytest.fixture
def cache(tmp_path):
    provenance = Provenance(
        model_id="m", model_fingerprint="f", tokenizer_fingerprint="t", chat_template_fingerprint="c", vocab_size=100,
        dtype="float32", top_k=2, tail_policy="bucket", versions={},
    )  # fmt: skip
    rows = [{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}, {"input_ids": [4, 9], "labels": [-100, 9]}]
    write_cache(tmp_path / "base", rows, FixedSource(), provenance)
    return ReferenceCache.open(tmp_path / "base")


def test_rows_find_their_numbers_and_strangers_are_named(cache):
    rows = [
        {"input_ids": [4, 9], "labels": [-100, 9]},
        {"input_ids": [4, 8], "labels": [-100, 8]},  # never scored
        {"input_ids": [4, 9], "labels": [4, -100]},  # trains on nothing, so it is in no cache
        {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]},
        {"input_ids": [4, 5, 6], "labels": [-100, -100, 6]},  # another mask
    ]
    data, missing = score_from_cache(rows, cache)
    assert missing == [1, 4]
    assert data.numbers.tolist() == [0, 3]
    assert (data.labels.tolist(), data.log_probs.tolist(), data.entropy.tolist()) == (
        [9, 5, 6],
        [-9, -5, -6],
        [4.5, 2.5, 3],
    )
    assert data.rows.tolist() == [0, 1, 1]
    assert data.ranks is not None and data.top_ids is not None
    assert (data.ranks.tolist(), data.top_ids.tolist()) == ([2, 2, 1], [10, 6, 6])
    (found,) = check_coverage(missing, 4, cache)
    assert (found.check, found.severity, found.count, found.rows) == ("cache_coverage", "error", 2, (1, 4))
    assert "qtarget score" in found.message
    assert check_coverage([], 4, cache) == []
    nothing, missing = score_from_cache(rows[1:3], cache)
    assert (len(nothing.places), missing) == (0, [0])


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=20))
def test_roc_auc_is_the_share_of_pairs_in_order(items):
    scores, marks = np.array([s for s, _ in items], float), np.array([m for _, m in items])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[marks] for b in scores[~marks]]
    found = roc_auc(scores, marks)
    assert found is None if not pairs else found == pytest.approx(np.mean(pairs))
