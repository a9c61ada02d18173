"""docs/staleness.md: its tables are those of the committed results, and its sentences hold in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from qtarget.benchmarks.staleness.model_bench import model_table, summarize_model
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


def leaves(value: Any) -> Iterator[Any]:
    """What stands at the ends of nested mappings and lists, in their order, with the keys that lead there."""
    if not isinstance(value, dict | list):
        yield value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield str(key)
        yield from leaves(part)


def test_the_table_of_the_model_is_that_of_its_results():
    found = json.loads((ROOT / "benchmarks/results/staleness_model.json").read_text())
    again = summarize_model(found["points"], found["config"]["draws"])
    assert again["finding"] == found["summary"]["finding"]
    stored, computed = (list(leaves(one["points"])) for one in (found["summary"], again))
    # an end just between two last digits goes one way or the other with the processor's order of sums
    assert computed == [pytest.approx(one, abs=0.1 + 1e-9) if isinstance(one, float) else one for one in stored]
    assert model_table(found) in PAGE
    for point in found["points"]:
        counts = {len(runs) for runs in point["runs"].values()}
        assert len(counts) == 1 and min(counts) > 1, "a point whose rules have not the same seeds"
    config = found["config"]
    sizes = (config["sft_steps"], config["rounds"], config["prompts"], config["test_rows"], config["draws"])
    assert sizes == (100, 20, 8, 200, 4) and config["learning_rates"] == [1e-4, 2e-4, 4e-4]


def test_what_is_said_of_the_model():
    found = json.loads((ROOT / "benchmarks/results/staleness_model.json").read_text())
    rows = found["summary"]["points"]
    start = rows[0]["start"]
    gains = 0
    for row in rows:
        is_both = (row["lag"], row["epochs"]) == (8, 4)
        for name, one in row["settings"].items():
            gains += sum(key.endswith("to_no_region") for key in one)
            if not is_both:
                assert one["sampled"]["mean"] > start["sampled"] and one["greedy"]["mean"] < start["greedy"]
                assert one["collapsed"] == 0 and one.get("sampled_to_no_region", {"low": 0})["low"] <= 0
            elif name.startswith(("ppo_clip", "dppo_tv")):
                assert one["sampled_to_no_region"]["low"] > 0
            elif name.startswith("policy_gradient"):
                assert one["sampled"]["mean"] < start["sampled"]
    assert f"of {gains} differences" in PAGE
    log = (ROOT / "benchmarks/results/staleness_model.runs.jsonl").read_text().splitlines()
    ends = {run["key"]: run["runs"][0]["end"] for run in map(json.loads, log)}
    for percent, key in ((20.5, "8/1/0.0/policy_gradient/inf"), (38.2, "0/4/0.0/policy_gradient/inf"),
                         (44.8, "8/1/0.0/dppo_tv/0.15"), (54.8, "8/1/0.0/drpo/0.5"),
                         (49.8, "0/4/0.0/drpo/0.5"), (61.2, "0/4/0.0/ppo_clip/0.2")):  # fmt: skip
        assert 100 * ends[f"{key}/0.0004/1000"] == pytest.approx(percent, abs=0.051) and f"{percent}" in PAGE
