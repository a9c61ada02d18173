"""Rows that would train on nothing, counted against a brute-force reading of the definition."""

from __future__ import annotations

import random

import pytest

from qtarget.core.errors import DataError
from qtarget.data.checks.audit import audit_rows


def row(labels: list[int]) -> dict:
    return {"input_ids": list(range(10, 10 + len(labels))), "labels": labels}


GOOD, PROMPT_ONLY, FIRST_ONLY = row([-100, 5, 6]), row([-100, -100, -100]), row([7, -100, -100])
LATE, LONG, EMPTY = row([-100] * 4 + [5]), row([-100, 5, 6, 7, 8]), row([])


def test_each_row_has_one_finding_and_is_named():
    report = audit_rows([GOOD, PROMPT_ONLY, EMPTY, LATE, LONG, FIRST_ONLY], max_length=3)
    found = {name: (finding.count, finding.rows) for name, finding in report.findings.items()}
    assert found == {"empty": (1, (2,)), "unsupervised": (2, (1, 5)), "cut_off": (1, (3,)), "truncated": (1, (4,))}
    assert (report.rows, report.tokens, report.supervised_tokens, report.lost_tokens) == (6, 15, 4, 3)
    assert report.unusable_rows == 4
    lines = report.messages()
    assert len(lines) == 4
    assert "2 of 6 rows have no supervised token: rows 2, 6;" in lines[1]
    assert "1 of 6 rows are truncated before their end (max_length 3)" in lines[3]
    report.raise_if_unusable()


def test_without_max_length_nothing_is_cut():
    report = audit_rows([GOOD, LATE, LONG], max_length=None)
    assert report.messages() == []
    assert (report.supervised_tokens, report.lost_tokens) == (7, 0)


def test_rows_without_labels_train_on_every_token_but_the_first():
    assert audit_rows([{"input_ids": [1, 2, 3]}], max_length=None).supervised_tokens == 2


def test_only_the_first_few_rows_are_named_but_all_are_counted():
    report = audit_rows([PROMPT_ONLY] * 1000 + [GOOD], max_length=None)
    assert report.findings["unsupervised"].count == 1000
    assert "1000 of 1001 rows" in report.messages()[0]
    assert "rows 1, 2, 3, 4, 5, ...;" in report.messages()[0]


def test_a_data_set_that_trains_on_nothing_is_refused():
    with pytest.raises(DataError, match=r"no row .* trains on anything: 2 of 3 .* 1 of 3"):
        audit_rows([PROMPT_ONLY, LATE, PROMPT_ONLY], max_length=3).raise_if_unusable()
    with pytest.raises(DataError, match="no rows"):
        audit_rows([], max_length=3).raise_if_unusable()


def test_labels_of_another_length_and_untokenised_rows_are_errors():
    with pytest.raises(DataError, match="row 2 has 3 input_ids but 2 labels"):
        audit_rows([GOOD, {"input_ids": [1, 2, 3], "labels": [1, 2]}], max_length=None)
    with pytest.raises(DataError, match="row 1 has no input_ids"):
        audit_rows([{"text": "a"}], max_length=None)


def test_counts_agree_with_brute_force_on_random_rows():
    rng = random.Random(0)
    for _ in range(200):
        rows = [row([rng.choice([-100, 3]) for _ in range(rng.randrange(7))]) for _ in range(5)]
        max_length = rng.choice([None, 0, 1, 3, 6])
        report = audit_rows(rows, max_length=max_length)
        kept = lost = 0
        names = dict.fromkeys(("empty", "unsupervised", "cut_off", "truncated"), 0)
        for example in rows:
            targets = [t for t in range(len(example["labels"])) if t > 0 and example["labels"][t] == 3]
            inside = [t for t in targets if max_length is None or t < max_length]
            kept, lost = kept + len(inside), lost + len(targets) - len(inside)
            tokens = example["input_ids"][:max_length]
            if not tokens:
                names["empty"] += 1
            elif not inside:
                names["cut_off" if targets else "unsupervised"] += 1
            elif inside != targets:
                names["truncated"] += 1
        assert (report.supervised_tokens, report.lost_tokens) == (kept, lost)
        assert {name: finding.count for name, finding in report.findings.items()} == {
            k: n for k, n in names.items() if n
        }
