"""A suggestion comes from measured facts and the files it names, or says that there is not enough evidence."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

import qtarget
from qtarget.data.checks.findings import Finding
from qtarget.report.audit.advice import about_target, facts_of, which_target
from qtarget.report.audit.compared import Compared
from qtarget.report.audit.contenders import Proposal, proposal
from qtarget.report.audit.evidence import evidence
from tests import ROOT


def facts(favourite: float | None, **more) -> dict:
    surprise = None if favourite is None else 9.0
    base = {"favourite_share": favourite, "mean_surprise": surprise, "median_surprise": surprise, "mean_entropy": 1.0,
            "suspected_share": 0.0, "flawed_prior_share": 0.0, "duplicate_share": 0.0, "contradictory_share": 0.0,
            "rows": 600, "scored_rows": 600, "teacher": False, "validation": True}  # fmt: skip
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
    assert advice.summary.startswith("No verdict on your rows yet. On your validation rows `qtarget compare ")
    assert "The order below is the synthetic map's: " in advice.summary
    assert advice.compare.targets[0] == "sft" and set(advice.compare.targets) - {"sft"} <= set(shown)
    assert f"--targets {','.join(advice.compare.targets)} --filters none,auto`" in advice.summary


def test_a_base_that_knows_little_is_not_told_from_noise_by_one_share():
    """About 0.3 is both the clean rows of a base that knows none of the format and the noisiest rows of one that knows most."""
    shares = {(point["base"], point["kind"], point["rate"]): point["favourite_share"] for point in POINTS}
    little, noisy = shares["none", "random_tokens", 0.0], shares["most", "random_tokens", 0.4]
    assert abs(little - noisy) < 0.05
    tried = which_target(facts((little + noisy) / 2)).summary
    assert "bases that know none, most" in tried


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


FLAWS = [flaw["corrected_percent"] for flaw in evidence()["flawed_prior"]["flaws"]]


def mean_corrected(name: str) -> float | None:
    found = [flaw[name] for flaw in FLAWS if name in flaw]
    return sum(found) / len(found) if found else None


@pytest.mark.parametrize("base", ["none", "half", "most"])
def test_a_flawed_prior_puts_what_corrects_it_before_what_keeps_it(base):
    """The order is by the raw percentages of `bench prior` first, by the map second; the reason is said."""
    clean = next(point["favourite_share"] for point in POINTS if point["base"] == base and not point["rate"])
    plain, flawed = which_target(facts(clean)), which_target(facts(clean, flawed_prior_share=0.01))
    sft = mean_corrected("sft")
    assert sft is not None
    keeps = [(mean_corrected(s.targets[0]) or 0) < sft - 5 for s in flawed.ranked]
    assert keeps == sorted(keeps) and not keeps[0] and "sft" in [s.targets[0] for s in flawed.ranked]
    for statement, keeps_it in zip(flawed.ranked, keeps, strict=True):
        measured = mean_corrected(statement.targets[0])
        said = "was not measured" if measured is None else f"corrected {measured:.0f} % of a planted flaw"
        assert (said in statement.reason) or not keeps_it
    changed = [s.targets for s in plain.ranked] != [s.targets for s in flawed.ranked]
    assert ("for what your rows show (`flawed_prior`)" in flawed.summary) == changed
    assert flawed.avoid == plain.avoid
    assert all("flaw" not in statement.reason for statement in plain.ranked)


def test_training_is_told_what_a_flawed_prior_does_to_its_target():
    found = which_target(facts(0.8, flawed_prior_share=0.01))
    told = about_target(found, "consensus")
    assert f"consensus corrected {mean_corrected('consensus'):.0f} % of a planted flaw" in told[1]
    assert "`guard: true` does not make up for it in consensus" in told[1]
    assert "`guard: true` makes up for it in dft" in about_target(found, "dft")[1]
    assert "consensus with guard corrected" in about_target(found, "consensus", guard=True)[1]
    for target, guard in (("sft", False), ("dft", True)):
        assert not any("planted flaw" in line for line in about_target(found, target, guard=guard))
    assert "no verdict on your rows" in about_target(found, "sft")[-1]


def test_one_place_says_what_to_compare():
    assert proposal() == Proposal(("sft", "consensus"), ("none", "auto"))
    for favourite in (None, 0.15, 0.5, 0.8, 1.0):
        for flawed in (0.0, 0.02):
            advice = which_target(facts(favourite, flawed_prior_share=flawed, bad_rows=None))
            avoided = {name for statement in advice.avoid for name in statement.targets}
            assert advice.compare.targets[0] == "sft" and len(advice.compare.targets) >= 2
            assert not avoided & set(advice.compare.targets)
            assert " ".join(advice.compare.options()) in advice.summary
            if advice.ranked:
                assert {advice.ranked[0].targets[0]} <= set(advice.compare.targets)
    assert which_target(facts(0.5, bad_rows=0)).compare.filters == ("none",)
    assert which_target(facts(0.5, bad_rows=9)).compare.filters == ("none", "auto")
    assert "qtarget compare CONFIG" not in which_target(facts(0.5, validation=False)).summary
    assert "set validation_file" in which_target(facts(0.5, validation=False)).summary


def test_a_comparison_of_these_rows_is_the_verdict():
    found = Compared("runs/c/comparison.json", "dft +10.0 points over sft (+2.0 .. +18.0); stop here", "dft",
                     {"target": "dft", "learning_rate": "0.002"}, "runs/dft")  # fmt: skip
    advice = which_target(facts(None, flawed_prior_share=0.02), found)
    assert (advice.verdict, advice.ranked, advice.avoid) == ("compared", (), ())
    assert found.finding in advice.summary and "synthetic" not in advice.summary
    assert "--target dft --learning_rate 0.002 --output_dir runs/dft`" in advice.summary
    said = about_target(advice, "sft")
    assert said[-1].endswith(" What was taken differs from this run: `--target dft --learning_rate 0.002`.")
    same = dataclasses.replace(found, options={})
    assert about_target(which_target(facts(None), same), "dft") == [
        f"Compared on your validation rows (runs/c/comparison.json): {found.finding}."
    ]
    assert "Look at the rows" in which_target(facts(0.5), dataclasses.replace(found, helps=False)).summary
    nothing = dataclasses.replace(found, take=None, options={})
    assert "no verdict" in which_target(facts(0.5), nothing).summary
    assert advice.as_dict()["compared"]["take"] == "dft"
    unfiltered = dataclasses.replace(found, filtered=False)
    told = which_target(facts(0.5, bad_rows=9) | {"crossfit_bad_rows": 58}, unfiltered).summary
    assert (
        "58 rows of these look bad: `qtarget compare CONFIG.yaml --filters none,crossfit --output runs/c --resume` tries it"
        in told
    )
    assert "look bad" not in which_target(facts(0.5, bad_rows=9), found).summary, "the comparison tried it"


def test_notes_follow_the_facts():
    assert which_target(facts(0.5)).notes == ()
    notes = which_target(
        facts(0.5, teacher=True, duplicate_share=0.1, flawed_prior_share=0.02, suspected_share=0.03)
    ).notes
    assert len(notes) == 2, "what a finding says itself is not said again"
    assert "2.00% of the labels" in notes[0] and "sft corrects that" in notes[0]
    assert "not enough evidence" in notes[1]


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
        "bad_rows": None, "crossfit_bad_rows": None, "rows": 10, "scored_rows": 10, "teacher": True, "validation": None,
    }  # fmt: skip
    unknown = [findings[0], dataclasses.replace(findings[1], severity="info")]
    assert facts_of(unknown, rows=10, teacher=False)["suspected_share"] == 0.0  # of a base that does not know the rows
    unscored = facts_of(findings[2:], rows=10, teacher=False)
    assert [unscored[name] for name in ("mean_surprise", "suspected_share", "flawed_prior_share")] == [None] * 3
    assert unscored["scored_rows"] == 0
    unchecked = facts_of([findings[0], Finding("flawed_prior_unchecked", "info", 10, (), "")], rows=10, teacher=False)
    assert unchecked["flawed_prior_share"] is None
