"""A suggestion comes from measured facts and the files it names, or says that there is not enough evidence."""

from __future__ import annotations

import importlib.util

import pytest

import qtarget
from qtarget.data.checks.findings import Finding
from qtarget.report.audit.advice import evidence, facts_of, which_target
from tests import ROOT


def facts(favourite: float | None, **more) -> dict:
    surprise = None if favourite is None else 9.0
    base = {"favourite_share": favourite, "mean_surprise": surprise, "median_surprise": surprise, "mean_entropy": 1.0,
            "suspected_share": 0.0, "flawed_prior_share": 0.0, "duplicate_share": 0.0, "contradictory_share": 0.0,
            "rows": 600, "scored_rows": 600, "teacher": False}  # fmt: skip
    return base | more


def test_the_evidence_is_what_the_result_files_say():
    spec = importlib.util.spec_from_file_location("update_evidence", ROOT / "scripts" / "update_evidence.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.collect() == evidence(), "run `python scripts/update_evidence.py`"


POINTS = evidence()["noise_map"]["points"]


@pytest.mark.parametrize("base", ["none", "half", "most"])
def test_the_first_target_is_the_one_of_least_regret_on_the_map(base):
    clean = next(point for point in POINTS if point["base"] == base and not point["rate"])
    advice = which_target(facts(clean["favourite_share"]))
    assert advice.verdict == "suggestion"
    near = {point["base"] for point in POINTS if abs(point["favourite_share"] - clean["favourite_share"]) <= 0.05}
    mine = [point["accuracy_percent"] for point in POINTS if point["base"] in near]
    names = set.intersection(*(set(accuracy) for accuracy in mine))
    regret = dict.fromkeys(names, 0.0)
    for accuracy in mine:
        top = max(mean for mean, _, _ in accuracy.values())
        for name in names:
            regret[name] = max(regret[name], top - accuracy[name][0])
    shown = [statement.targets[0] for statement in advice.ranked]
    assert [regret[name] for name in shown] == sorted(value for value in regret.values() if value <= regret["sft"] + 5)[
        :3
    ]
    assert {"sft", "consensus"} & set(shown)
    assert f"{regret[shown[0]]:.1f} points" in advice.ranked[0].reason
    assert {name for statement in advice.avoid for name in statement.targets} == {
        name for name in names if regret[name] > regret["sft"] + 5
    }
    assert f"has {shown[0]} least behind" in advice.summary
    assert advice.summary.startswith("No verdict on your rows")


def test_a_base_that_knows_little_is_not_told_from_noise_by_one_share():
    """About 0.3 is both the clean rows of a base that knows none of the format and the noisiest rows of one that knows most."""
    shares = {(point["base"], point["kind"], point["rate"]): point["favourite_share"] for point in POINTS}
    little, noisy = shares["none", "random_tokens", 0.0], shares["most", "random_tokens", 0.4]
    assert abs(little - noisy) < 0.05
    tried = which_target(facts((little + noisy) / 2)).ranked[0].reason
    assert "base that knows none" in tried and "base that knows most" in tried


def test_prior_surprise_is_advised_against_where_the_base_knows_the_format():
    known = next(point["favourite_share"] for point in POINTS if point["base"] == "most" and not point["rate"])
    assert "prior_surprise" in {name for statement in which_target(facts(known)).avoid for name in statement.targets}


@pytest.mark.parametrize("known", [None, 1.0])
def test_elsewhere_there_is_not_enough_evidence(known):
    assert max(point["favourite_share"] for point in POINTS) < 0.85  # so 1.0 is off the map
    advice = which_target(facts(known))
    assert (advice.verdict, advice.ranked, advice.avoid) == ("not enough evidence", (), ())
    assert "Not enough evidence" in advice.summary
    assert ("qtarget score" in advice.summary) == (known is None)


def test_a_share_of_few_rows_is_no_evidence():
    advice = which_target(facts(0.15, scored_rows=99))
    assert (advice.verdict, advice.ranked, advice.avoid) == ("not enough evidence", (), ())
    assert "99 rows" in advice.summary and "100" in advice.summary
    assert which_target(facts(0.15, scored_rows=100)).verdict == "suggestion"
    few_of_many = [Finding("base_surprise", "info", 12, (), "", {"favourite_share": 0.1, "mean_surprise": 9.0})]
    assert which_target(facts_of(few_of_many, rows=5000, teacher=False)).verdict == "not enough evidence"


def test_no_name_stands_bare_and_every_name_and_file_exists():
    advice = which_target(facts(0.15))
    for statement in (*advice.ranked, *advice.avoid):
        assert statement.reason and statement.evidence
        assert set(statement.targets) <= set(qtarget.available_targets())
        for entry in statement.evidence:
            assert (ROOT / entry["file"]).is_file()
            assert entry["seeds"] >= 1
    assert advice.as_dict()["ranked"][0]["targets"] == list(advice.ranked[0].targets)


def test_notes_follow_the_facts():
    assert which_target(facts(0.5)).notes == ()
    notes = which_target(
        facts(0.5, teacher=True, duplicate_share=0.1, flawed_prior_share=0.02, suspected_share=0.03)
    ).notes
    assert len(notes) == 4
    assert "10.0% of the rows repeat" in notes[0]
    assert "2.00% of the labels" in notes[1] and "guard: true" in notes[1]
    assert "3.00% of the labels" in notes[2]
    assert "not enough evidence" in notes[3]


def test_facts_are_taken_from_the_findings():
    surprise = {"mean_surprise": 2.0, "median_surprise": 1.0, "mean_entropy": 0.5, "favourite_share": 0.6}
    findings = [
        Finding("base_surprise", "info", 10, (), "", surprise),
        Finding("surprising_tokens", "warning", 2, (1, 2), "", {"share": 0.04}),
        Finding("duplicates", "warning", 5, (1,), ""),
    ]
    found = facts_of(findings, rows=10, teacher=True)
    assert found == surprise | {
        "suspected_share": 0.04, "flawed_prior_share": 0.0, "duplicate_share": 0.5, "contradictory_share": 0.0,
        "bad_rows": None, "rows": 10, "scored_rows": 10, "teacher": True,
    }  # fmt: skip
    unscored = facts_of(findings[2:], rows=10, teacher=False)
    assert [unscored[name] for name in ("mean_surprise", "suspected_share", "flawed_prior_share")] == [None] * 3
    assert unscored["scored_rows"] == 0
    unchecked = facts_of([findings[0], Finding("flawed_prior_unchecked", "info", 10, (), "")], rows=10, teacher=False)
    assert unchecked["flawed_prior_share"] is None
