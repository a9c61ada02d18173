"""The verdict: two kinds where there are two, and nothing dropped where nobody can tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qtarget.core.errors import ConfigError
from qtarget.filtering import Filter, ScoredRows, decide
from qtarget.filtering.prompts import told_by_prompt


def rows_of(
    bad: np.ndarray, *, known: bool = True, task: bool = False, seed: int = 0, entropy: bool = True
) -> ScoredRows:
    """Rows of a calibrated base (tokens drawn from what it expects), the bad ones with two tokens that it never says.

    Args:
        bad: ``[rows]`` booleans.
        known: else every token is 7 nats less likely than the base expects.
        task: the bad rows have a prompt of their own.
    """
    rng = np.random.default_rng(seed)
    ids, masks, log_probs, entropies = [], [], [], []
    for number, wrong in enumerate(bad.tolist()):
        prompt = rng.integers(10, 40, 6) + (100 if task and wrong else 0)
        size = int(rng.integers(4, 15))
        expected = rng.exponential(0.4, size)
        said = -rng.exponential(np.maximum(expected, 1e-3))
        if wrong:
            said[rng.choice(size, 2, replace=False)] -= rng.uniform(4, 12, 2)
        ids.append(np.concatenate([prompt, rng.integers(200, 400, size), [number % 7]]))
        masks.append(np.array([False] * 6 + [True] * size + [False]))
        log_probs.append(said - (0 if known else 7))
        entropies.append(expected)
    return ScoredRows.of(ids, masks, log_probs, entropies if entropy else None)


def share(count: int, of: float, seed: int = 1) -> np.ndarray:
    bad = np.zeros(count, dtype=bool)
    bad[np.random.default_rng(seed).choice(count, round(of * count), replace=False)] = True
    return bad


@pytest.mark.parametrize("part", [0.08, 0.2, 0.4])
def test_bad_rows_of_a_known_format_are_found(part) -> None:
    bad = share(400, part)
    found = decide(rows_of(bad))
    assert found.verdict == "two kinds"
    assert (~found.keep)[bad].mean() > 0.85
    assert (~found.keep)[~bad].mean() < 0.02
    assert found.summary.startswith(f"two kinds: {found.dropped} of 400 rows look bad")
    assert found.threshold is not None
    assert (found.score[~found.keep] > found.threshold).all()
    assert (found.score[found.keep] <= found.threshold).all()
    assert ((found.posterior > 0.5) == ~found.keep).all()


@pytest.mark.parametrize("rule", ["surprise", "combined"])
def test_labels_that_the_base_excludes_are_bad_and_hide_no_others(rule) -> None:
    bad = share(400, 0.2)
    rows = rows_of(bad)
    known = decide(rows, rule)
    log_probs = np.split(rows.log_probs, rows.bounds[1:-1])
    for row in np.flatnonzero(bad)[:3]:
        log_probs[row][0] = -np.inf
    parts = (np.split(values, rows.offsets[1:-1]) for values in (rows.ids, rows.trained))
    assert rows.entropy is not None
    found = decide(ScoredRows.of(*parts, log_probs, np.split(rows.entropy, rows.bounds[1:-1])), rule)
    assert np.isfinite(found.score).all() and found.verdict == known.verdict == "two kinds"
    assert not found.keep[np.flatnonzero(bad)[:3]].any()
    assert (found.keep == known.keep).mean() > 0.9


def test_a_share_of_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"keep 0\.001 of 100 rows is no row"):
        decide(rows_of(share(100, 0.1)), {"rule": "surprise", "keep": 0.001})


@pytest.mark.parametrize("seed", range(20))
def test_clean_rows_are_all_kept(seed) -> None:
    found = decide(rows_of(np.zeros(300, dtype=bool), seed=seed))
    assert found.verdict == "cannot tell"
    assert found.keep.all()
    assert not found.posterior.any()


def test_a_base_that_does_not_know_the_rows_cannot_tell() -> None:
    found = decide(rows_of(share(400, 0.2), known=False))
    assert found.verdict == "cannot tell"
    assert "the base does not know these rows" in found.summary
    assert found.keep.all()


def test_a_task_that_the_base_does_not_know_is_no_noise() -> None:
    bad = share(400, 0.2)
    rows = rows_of(bad, task=True)
    assert told_by_prompt(rows, bad) > 0.99
    found = decide(rows)
    assert found.verdict == "cannot tell"
    assert "told by their prompts alone" in found.summary


def test_prompts_say_nothing_of_noise() -> None:
    bad = share(1000, 0.3)
    assert told_by_prompt(rows_of(bad), bad) == pytest.approx(0.5, abs=0.08)
    assert told_by_prompt(rows_of(bad), np.arange(1000) < 3) == 0.5


def test_without_entropy_nobody_can_tell_and_a_share_can_still_be_kept() -> None:
    bad = share(200, 0.2)
    rows = rows_of(bad, entropy=False)
    assert "no entropy" in decide(rows).summary
    found = decide(rows, {"rule": "surprise", "keep": 0.8})
    assert found.dropped == 40
    assert bad[~found.keep].mean() > 0.9


def test_few_rows_are_not_judged() -> None:
    assert "30 rows are too few" in decide(rows_of(share(30, 0.3))).summary


def test_a_share_keeps_exactly_so_many_and_the_best() -> None:
    rows = rows_of(share(101, 0.2))
    found = decide(rows, {"rule": "surprise", "keep": 0.6})
    assert (found.verdict, int(found.keep.sum())) == ("kept by share", 61)
    assert found.score[found.keep].max() <= found.score[~found.keep].min()
    assert set(found.posterior.tolist()) == {0.0, 1.0}


def test_every_row_has_its_reason() -> None:
    found = decide(rows_of(share(400, 0.2)))
    dropped, kept = int(np.flatnonzero(~found.keep)[0]), int(np.flatnonzero(found.keep)[0])
    assert found.reason(dropped).startswith("dropped: surprise")
    assert "above" in found.reason(dropped)
    assert "at most" in found.reason(kept)
    assert found.reason(dropped, "weight").startswith("weighed 0.0")
    assert found.tells
    unsure = decide(rows_of(share(30, 0.3)))
    assert unsure.reason(0) == unsure.reason(0, "weight") == "kept: cannot tell"
    assert not unsure.tells


def test_none_keeps_everything() -> None:
    found = decide(rows_of(share(60, 0.5)), "none")
    assert (found.verdict, found.dropped) == ("not filtered", 0)


def test_the_same_rows_give_the_same_verdict() -> None:
    rows = rows_of(share(400, 0.2))
    assert decide(rows).summary == decide(rows).summary


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("surprize", "expected one of auto, surprise"),
        ({"rule": "surprise", "share": 0.5}, "unknown key share"),
        ({"rule": "surprise", "keep": 1.5}, "above 0 and below 1"),
        ({"rule": "surprise", "keep": True}, "above 0 and below 1"),
        ({"rule": "none", "keep": 0.5}, "keeps every row"),
        ({"as": "mask"}, "drop or weight"),
        (0.6, "expected a rule"),
        (False, "expected a rule"),
        ({"rule": ["surprise"]}, "unknown"),
    ],
)
def test_a_wrong_wish_is_refused_in_words(value, said) -> None:
    with pytest.raises(ConfigError, match=said):
        Filter.of(value)


def test_a_mapping_without_a_rule_asks_the_evidence() -> None:
    assert Filter.of({"as": "weight"}) == Filter("auto", None, "weight")
    assert not Filter.of(None)
    assert not Filter.of("none")


def judged_rows(bad: np.ndarray, *, contradicted: bool = True, hard: float = 0.0, seed: int = 0) -> ScoredRows:
    """Rows that the base does not know, and copies do: bad ones have three tokens that the copy never says, hard ones are unsure.

    Args:
        contradicted: whether another prompt makes a bad row's answer likelier.
        hard: share of the rows of which the copy is unsure.
    """
    plain = rows_of(np.zeros(len(bad), dtype=bool), known=False, seed=seed)
    rng = np.random.default_rng(seed + 1)
    entropy = [rng.exponential(0.4, size) for size in np.diff(plain.bounds)]
    unsure = rng.random(len(bad)) < hard
    said = [
        -rng.exponential(np.maximum(values, 1e-3)) - 3 * doubt for values, doubt in zip(entropy, unsure, strict=True)
    ]
    entropy = [values + 3 * doubt for values, doubt in zip(entropy, unsure, strict=True)]  # twenty alike choices more
    for row in np.flatnonzero(bad):
        said[row][rng.choice(len(said[row]), 3, replace=False)] -= 3
    against = np.where(bad & contradicted, rng.exponential(4, len(bad)), -rng.exponential(4, len(bad)))
    parts = (np.split(values, plain.offsets[1:-1]) for values in (plain.ids, plain.trained))
    assert plain.entropy is not None
    base = (np.split(values, plain.bounds[1:-1]) for values in (plain.log_probs, plain.entropy))
    return ScoredRows.of(*parts, *base, crossfit=said, crossfit_entropy=entropy, contradiction=against)


def test_copies_tell_what_the_base_cannot_and_another_prompt_helps() -> None:
    bad = share(400, 0.3)
    rows = judged_rows(bad)
    assert decide(rows, "surprise").verdict == "cannot tell"
    assert decide(rows, "auto").verdict == "cannot tell"  # the base is asked, and nobody else
    found = decide(rows, "crossfit")
    assert found.verdict == "two kinds"
    assert (~found.keep)[bad].mean() > 0.8
    assert (~found.keep)[~bad].mean() < 0.05
    alone = decide(judged_rows(bad, contradicted=False), "crossfit")
    assert alone.score[bad].mean() + 1 < found.score[bad].mean()
    np.testing.assert_allclose(alone.score[~bad], found.score[~bad])


@pytest.mark.parametrize("seed", range(5))
def test_hard_rows_are_no_bad_ones(seed) -> None:
    found = decide(judged_rows(np.zeros(300, dtype=bool), hard=0.3, seed=seed), "crossfit")
    assert found.verdict == "cannot tell"
    assert found.keep.all()


def test_a_share_by_copies_keeps_the_best() -> None:
    bad = share(200, 0.3)
    found = decide(judged_rows(bad), {"rule": "crossfit", "keep": 0.7})
    assert found.dropped == 60
    assert bad[~found.keep].mean() > 0.8


def test_copies_that_do_not_know_the_rows_judge_nobody() -> None:
    plain = judged_rows(share(200, 0.3))
    assert plain.crossfit is not None
    ignorant = replace(plain, crossfit=plain.crossfit - 3.0, way_out="the next step")
    found = decide(ignorant, "crossfit")
    assert found.verdict == "cannot tell"
    assert ignorant.knowledge.sentence in found.summary
    assert "the next step" in found.summary
    by_share = decide(ignorant, {"rule": "crossfit", "keep": 0.7})
    assert by_share.dropped == 60
    assert ignorant.knowledge.sentence in by_share.summary
