"""docs/benchmarks.md is what its script writes from the committed results."""

from __future__ import annotations

import importlib.util
import re

from tests import ROOT


def script():
    spec = importlib.util.spec_from_file_location("update_benchmarks", ROOT / "scripts" / "update_benchmarks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_say():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == script().page(), "run `python scripts/update_benchmarks.py`"
    for figure in re.findall(r"\]\((\w+\.png)\)", page):
        assert (ROOT / "docs" / figure).is_file()


def test_what_was_not_measured_is_said():
    module = script()
    assert "Not measured yet: `qtarget bench noise" in module.noise_part(None)
    assert "Not measured yet: `qtarget bench distill" in module.distill_part(None)
    assert "Not measured yet: `qtarget bench prior" in module.prior_part(None)
    assert "Not measured yet: `python scripts/measure_real_noise.py" in module.marked_part(None)
    assert module.real_part(None, module.SCAN) == ""


def test_goals_are_counted_where_they_are_reached():
    def goal(base, rate, ours, sft, untrained=0.0, kind="random_tokens", gap=None, near=True):
        gain = ours / sft - 1
        return {
            "base": base, "kind": kind, "rate": rate, "ours": ours, "sft": sft, "untrained": untrained,
            "relative_gain": gain, "gap_recovered": gap, "within_a_point_of_best": near,
        }  # fmt: skip

    goals = [
        goal("none", 0.0, 59.5, 60.0),
        goal("most", 0.0, 58.0, 60.0, near=False),
        goal("none", 0.4, 36.0, 30.0, gap=0.8),
        goal("most", 0.4, 36.0, 30.0, untrained=50.0, gap=0.5, near=False),  # above sft, below the untrained base
        goal("half", 0.4, 60.0, 30.0),  # not one of the two regimes
        goal("most", 0.4, 34.0, 30.0, kind="wrong_answer"),
    ]
    table = script().goal_lines(goals)[0]
    assert re.findall(r"\| (\d of \d) \|", table) == ["1 of 2", "1 of 1", "1 of 2", "1 of 2", "4 of 6"]
    assert "| 1 of 2 | none: 40 % random tokens |" in table
