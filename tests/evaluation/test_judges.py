"""Judges by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from qtarget.core.errors import ConfigError, DataError, MissingDependencyError
from qtarget.evaluation.judges import Judge, judged, make_judge, same_json


def score(judge: Judge, completion: str, reference: str) -> float:
    return judged(judge, "the prompt", completion, reference, {"answer": reference}, "rows.jsonl, row 3")


@pytest.mark.parametrize(
    ("completion", "reference", "right"),
    [(" 42\n", "42", True), ("42.", "42", False), ("", "42", False), ("Straße", "straße", False)],
)
def test_exact(completion, reference, right):
    assert score(make_judge("exact"), completion, reference) == right


def test_case_is_ignored_where_that_is_asked_for():
    assert score(make_judge("exact", ignore_case=True), "STRASSE", "straße") == 1
    judge = make_judge("regex", pattern="answer: (\\w+)", ignore_case=True)
    assert score(judge, "ANSWER: YES", "answer: yes") == 1


@pytest.mark.parametrize(
    ("completion", "right"),
    [("first [1], no: [2]", True), ("[2], no: [1]", False), ("2", False), ("[2", False), ("[ 2 ]", True)],
)
def test_the_last_match_of_a_pattern_counts(completion, right):
    assert score(make_judge("regex", pattern=r"\[(.*?)\]"), completion, "It is [2].") == right


@pytest.mark.parametrize(
    ("completion", "reference", "right"),
    [
        ("So the answer is 1,234.", "1234", True), ("0.5", r"$\frac{1}{2}$", True), ("\\boxed{7}", "7", True),
        ("1235", "1234", False), ("no idea", "7", False), ("-3", "3", False),
    ],
)  # fmt: skip
def test_numbers(completion, reference, right):
    pytest.importorskip("math_verify")
    assert score(make_judge("number"), completion, reference) == right


@pytest.mark.parametrize(
    ("completion", "reference", "right"),
    [
        ('{"b": 2, "a": [1, null]}', '{"a": [1.0, null], "b": 2}', True),
        ('```json\n{"a": 1}\n```', '{"a": 1}', True),
        ('{"a": true}', '{"a": 1}', False),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1} and more', '{"a": 1}', False),
        ("", "0", False),
        ("NaN", "0", False),
        ("[" * 100_000, "[]", False),
        ("9" * 10_000, "9", False),
    ],
)
def test_json(completion, reference, right):
    assert same_json(completion, reference) == right


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"metric": "exactly"}, "unknown; expected exact, regex"),
        ({"metric": "regex"}, "--pattern is missing"),
        ({"metric": "regex", "pattern": "a+"}, "captures nothing"),
        ({"metric": "regex", "pattern": "(a"}, "is no regular expression"),
        ({"metric": "exact", "pattern": "(a)"}, "--metric regex alone"),
        ({"metric": "json", "ignore_case": True}, "no use for it"),
        ({"metric": "nowhere.at_all:f"}, "ModuleNotFoundError"),
        ({"metric": "math:g"}, "AttributeError"),
        ({"metric": "math:pi"}, "is a float; expected a function"),
    ],
)
def test_bad_choices_are_named(options, part):
    with pytest.raises(ConfigError) as raised:
        make_judge(**options)
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("metric", "pattern", "reference", "part"),
    [
        ("regex", "#(.)", "no sign", "does not match"),
        ("json", None, "{", "is not JSON"),
        ("number", None, "none", "no number"),
    ],
)
def test_references_that_cannot_be_compared(metric, pattern, reference, part):
    if metric == "number":
        pytest.importorskip("math_verify")
    with pytest.raises(DataError, match=part) as raised:
        score(make_judge(metric, pattern=pattern), "#a", reference)
    assert "rows.jsonl, row 3" in str(raised.value)


def test_a_function_of_the_users_is_called_with_prompt_completion_and_row(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text("seen = []\ndef f(*a):\n    seen.append(a)\n    return a[2]['value']\n")
    monkeypatch.syspath_prepend(tmp_path)
    judge = make_judge("my_judges:f")

    def of(value):
        return judged(judge, "p", "c", "r", {"value": value}, "rows.jsonl, row 3 (run)")

    good = (True, False, 0, 1, 0.25, np.float32(0.5), np.bool_(True), torch.tensor(0.5))
    assert [of(value) for value in good] == [1, 0, 0, 1, 0.25, 0.5, 1, 0.5]
    assert sys.modules["my_judges"].seen[0] == ("p", "c", {"value": True})
    for bad in (None, "yes", 1.5, -0.1, float("nan"), [True], np.zeros(2)):
        with pytest.raises(ConfigError, match="expected True, False, or a number from 0 to 1") as raised:
            of(bad)
        assert "row 3 (run)" in str(raised.value)
    with pytest.raises(ConfigError, match=r"raised KeyError: 'value', at rows\.jsonl, row 3"):
        judged(judge, "p", "c", "r", {}, "rows.jsonl, row 3")


def test_a_module_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_judges.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        make_judge("broken_judges:f")


def test_without_math_verify_the_metric_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingDependencyError, match=r"qtarget\[evaluate\]"):
        make_judge("number")
