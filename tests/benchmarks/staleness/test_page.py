"""docs/staleness.md: its tables are those of the committed results, and its sentences hold in them."""

from __future__ import annotations

import json

import pytest

from qtarget.benchmarks.staleness.results import drpo_table, penalties_table, rules_table, summarize
from tests import ROOT

PAGE = (ROOT / "docs/staleness.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results():
    found = json.loads((ROOT / "benchmarks/results/staleness.json").read_text())
    assert found["summary"] == summarize(found["points"], found["penalties"])
    return found


def test_the_tables_are_those_of_the_results(results):
    for table in (rules_table, penalties_table, drpo_table):
        assert table(results) in PAGE, table.__name__
    for word in ("RULES", "TABLE", "READING", "PROVENANCE"):
        assert word not in PAGE


def test_as_many_intervals_as_the_page_says(results):
    rows = results["summary"]["points"]
    assert f"There are {sum(len(row['rules']) for row in rows)} intervals" in PAGE
    assert all(len(run) == 10 for row in results["points"] for run in row["runs"].values())


def test_what_is_said_of_penalties(results):
    for one in results["summary"]["penalties"]:
        free, k1, whole = (one["settings"][name] for name in ("none 0", "k1 0.2", "full vocabulary 0.2"))
        assert whole["kl_to_start"]["mean"] < free["kl_to_start"]["mean"]
        if one["lag"]:
            assert k1["kl_to_start"]["low"] > 10 * free["kl_to_start"]["high"]
            assert k1["success_percent"]["high"] < free["success_percent"]["low"]
