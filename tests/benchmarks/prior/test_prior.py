"""`bench prior`: the planted flaws, the doses, the sums, and that the guard gives the correction back."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from qtarget.benchmarks.prior.bench import (
    FLAWS,
    Condition,
    PriorConfig,
    always_may,
    asked_problems,
    dosed,
    smallest,
    spoilt,
)
from qtarget.benchmarks.prior.results import prior_figure, prior_table, summarize
from qtarget.benchmarks.tasks import embedded_tasks
from qtarget.cli.bench.app import app
from qtarget.core.errors import ConfigError
from qtarget.data import tasks


def test_the_flaws_answer_wrongly_and_a_spoilt_row_states_it():
    row = {
        "prompt": "Instruction: Which is the largest: 3 9 1?\nResponse:\n",
        "completion": "It is [9].",
        "answer": "9",
    }
    assert smallest(row) == "1"
    assert spoilt(row, "1") == {**row, "completion": "It is [1].", "answer": "1"}
    assert always_may({"answer": "3 October 1999"}) == "3 May 1999"


@pytest.mark.parametrize("flaw", FLAWS)
def test_asked_problems_are_new_and_tell_flaw_from_correction(flaw):
    skill, wrong = FLAWS[flaw]
    rows = asked_problems(skill)
    assert len(rows) == 100 and {row["skill"] for row in rows} == {skill}
    assert all(wrong(row) != row["answer"] for row in rows)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in embedded_tasks().train}
    assert all(tasks.check(row, row["completion"]) for row in rows)


def test_a_dose_is_a_share_of_the_flawed_skills_rows_and_of_no_other():
    rows = embedded_tasks().train
    of_skill = sum(row["skill"] == "maximum" for row in rows)
    some = dosed(rows, Condition("wrong skill", 0.25, 0.0), seed=1)
    assert sum(row["skill"] == "maximum" for row in some) == round(of_skill / 4)
    assert len(some) == len(rows) - of_skill + round(of_skill / 4)
    assert len(dosed(rows, Condition("none", 1.0, 0.0), seed=1)) == len(rows)


def test_the_sums_by_hand():
    def runs(accuracy, corrected=None):
        more = {} if corrected is None else {"corrected_percent": corrected, "flawed_percent": 1.0}
        return [{"accuracy_percent": accuracy, "noise_share": 0.0, **more}] * 2

    flawed = {"sft": runs(70.0, 80.0), "dft": runs(60.0, 20.0), "dft, guarded": runs(68.0, 78.0)}
    sound = {"sft": runs(75.0), "dft": runs(70.0), "dft, guarded": runs(66.5)}
    results = {
        "conditions": [
            {"flaw": "wrong skill", "dose": 1.0, "noise_rate": 0.0, "runs": flawed},
            {"flaw": "none", "dose": 1.0, "noise_rate": 0.2, "runs": sound},
        ],
        "untrained": {
            "wrong skill": {"accuracy_percent": 60.0, "corrected_percent": 0.0}, "none": {"accuracy_percent": 63.0}
        },
    }  # fmt: skip
    results["summary"] = summarize(results)
    assert results["summary"]["goals"] == {
        "dft": {
            "corrects": 0.975, "corrects_without": 0.25, "accuracy_change": {"20 % noise": -0.05}, "reached": True
        }
    }  # fmt: skip
    assert results["summary"]["finding"] == (
        "Share of SFT's correction, without -> with guard, least to most target: "
        "wrong skill, 100 % of its rows: 25..25 % -> 98..98 %"
    )
    assert "| dft, guarded | 78.0 (78..78) | 66.5 (66..66) |" in prior_table(results)
    assert len(prior_figure(results).axes) == 1


def test_settings_without_their_baseline_are_refused():
    with pytest.raises(ConfigError, match="add sft"):
        PriorConfig(targets=("dft",))
    with pytest.raises(ConfigError, match="known: sft"):
        PriorConfig(targets=("sft", "magic"))


def test_the_quick_setting_finds_that_the_guard_corrects_what_the_anchor_does_not(tmp_path):
    output = tmp_path / "prior.json"
    done = CliRunner().invoke(app, ["prior", "--quick", "--output", str(output)])
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text())
    assert found["untrained"]["wrong skill"]["flawed_percent"] > 80
    rows = found["summary"]["conditions"][0]["methods"]
    corrected = {name: row["corrected_percent"]["mean"] for name, row in rows.items()}
    assert corrected["asft, guarded"] > corrected["asft"] + 20
    assert corrected["sft"] > corrected["asft"] + 20
