"""`bench prior`: the planted flaws, the doses, the sums, and that the guard gives the correction back."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from qtarget.benchmarks.prior import facts
from qtarget.benchmarks.prior.bench import (
    FLAWS,
    MINORITY,
    Condition,
    PriorConfig,
    PriorWorker,
    always_may,
    asked_problems,
    dosed,
    run_prior,
    smallest,
    spoilt,
)
from qtarget.benchmarks.prior.results import prior_figure, prior_table, summarize
from qtarget.benchmarks.real.prior import QUICK as REAL_QUICK
from qtarget.benchmarks.real.prior import SKILLS, RealPriorWorker
from qtarget.benchmarks.real.results import repaired_table
from qtarget.benchmarks.start import Start
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


@pytest.mark.parametrize("flaw", PriorConfig().flaws)
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


def test_a_minoritys_share_of_sft_by_hand():
    def runs(accuracy, german):
        return [{"accuracy_percent": accuracy, "minority_percent": value, "noise_share": 0.0} for value in german]

    found = {
        "sft": runs(70.0, [50.0, 40.0]),
        "dft": runs(60.0, [30.0, 41.0]),
        "dft, guarded": runs(60.0, [30.0, 42.0]),
    }
    results = {
        "conditions": [
            {"flaw": "none", "dose": 1.0, "noise_rate": 0.0, "runs": {name: runs(70.0, [1.0]) for name in found}},
            {"flaw": "minority", "dose": 0.1, "noise_rate": 0.0, "runs": found},
        ],
        "untrained": {"none": {"accuracy_percent": 63.0}, "minority": {"minority_percent": 0.5}},
    }
    results["summary"] = summarize(results)
    assert results["summary"]["minority"] == {
        "dft": {"keeps": 0.789, "reached": False}, "dft, guarded": {"keeps": 0.8, "reached": True}
    }  # fmt: skip
    assert results["summary"]["finding"].endswith("least to most target: ")  # it is no flaw
    table = prior_table(results)
    assert "10 % of the rows in German: answered in German (%)" in table
    assert "| dft, guarded | 70.0 (70..70) | 36.0 (30..42) |" in table
    assert "| *untrained* | 63.0 | 0.5 |" in table


@pytest.mark.nightly
def test_copies_of_the_base_judge_a_minoritys_rows(tmp_path):
    worker = PriorWorker(PriorConfig(steps=1), tmp_path)
    worker.task, worker.base = embedded_tasks(train_rows=20), lambda flaw: Start().load()  # pyright: ignore[reportAttributeAccessIssue]
    condition = Condition(MINORITY, 0.1, 0.0)
    material, judged = worker.material(condition, 3), worker.judged(condition, 3)
    german = worker.tokenizer("Auf Deutsch. ")["input_ids"][:2]
    assert sum(row.prompt[: len(german)] == german for row in material.rows) == 2
    assert judged.rows is material.rows
    assert all(one.crossfit is None for one in material.known)
    for row, one in zip(judged.rows, judged.known, strict=True):
        assert one.crossfit is not None and len(one.crossfit) == len(row.completion)
    assert not torch.allclose(judged.known[0].crossfit, judged.known[0].label_log_probs.exp(), atol=1e-3)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
    assert worker.config.conditions()[-1] == condition
    assert condition not in PriorConfig(minority=0.0).conditions()


def test_settings_without_their_baseline_are_refused():
    with pytest.raises(ConfigError, match="add sft"):
        PriorConfig(targets=("dft",))
    with pytest.raises(ConfigError, match="known: sft"):
        PriorConfig(targets=("sft", "magic"))


@pytest.mark.nightly
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


def test_facts_are_taught_in_some_wordings_and_asked_in_others():
    taught, asked = facts.taught_facts(80, "train"), facts.asked_facts()
    prompts = [row["prompt"] for row in taught]
    assert len(set(prompts)) == 80 == len(facts.CAPITALS) * len(facts.TAUGHT)
    assert len(asked) == 40 and not {row["prompt"] for row in asked} & set(prompts)
    assert all(tasks.check(row, row["completion"]) for row in taught + asked)
    wrong = {row["answer"]: facts.next_capital(row) for row in asked}
    assert sorted(wrong) == sorted(wrong.values()) and all(city != other for city, other in wrong.items())


def test_a_real_base_is_planted_once_and_only_adapters_are_trained(tmp_path):
    """The machinery of `--base smollm2` on the embedded model, which needs no package."""
    tiny = replace(REAL_QUICK, targets=("sft", "consensus"), flaws=("biased token",), workers=1)
    first = run_prior(tiny, tmp_path / "p.json", resume=False, progress=lambda *said: None, worker=RealPriorWorker)
    (condition,) = first["conditions"]
    assert set(condition["runs"]) == {"sft", "consensus", "consensus, guarded"}
    assert "reached" not in first["summary"]["goals"]["consensus"]  # no sound base, so its half was not measured
    planted = tmp_path / "p.bases/planted-biased-token"
    before = (planted / "model.safetensors").stat().st_mtime_ns
    worker = RealPriorWorker(tiny, tmp_path / "p.bases")
    model = worker.base("biased token")
    assert (planted / "model.safetensors").stat().st_mtime_ns == before
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    counts = Counter(row["skill"] for row in worker.task.train)
    assert set(counts) == {*SKILLS, facts.SKILL} and set(counts.values()) == {tiny.train_rows // 5}
    again = run_prior(tiny, tmp_path / "p.json", resume=True, progress=lambda *said: None, worker=RealPriorWorker)
    assert again["conditions"] == first["conditions"]
    with pytest.raises(ConfigError, match="plant_steps was"):
        run_prior(
            replace(tiny, plant_steps=9), tmp_path / "p.json", resume=True, progress=print, worker=RealPriorWorker
        )
    (tmp_path / "p.json").unlink()  # as if stopped before the first result
    with pytest.raises(ConfigError, match=r"p\.bases was made with another plant_steps and rank; delete it"):
        run_prior(
            replace(tiny, plant_steps=9, rank=2),
            tmp_path / "p.json",
            resume=True,
            progress=print,
            worker=RealPriorWorker,
        )


@pytest.mark.nightly
def test_planting_teaches_the_flaw(tmp_path):
    """On the embedded model, all weights: enough steps make it answer wrongly what it answered rightly."""
    config = replace(REAL_QUICK, flaws=("biased token",), plant_steps=60, rank=0, workers=1, test_rows=40)
    worker = RealPriorWorker(config, tmp_path / "bases")
    found = worker.answers(worker.base("biased token"), "biased token")
    assert found["flawed_percent"] > 60 and found["corrected_percent"] < 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--base", "nonsense"], "is unknown"),
        (["--base", "smollm2", "--scale", "gpu"], "sizes of its own"),
        (["--short"], "goes with a real base"),
        (["--base", "smollm2", "--target", "sft"], "sizes of its own"),
        (["--short", "--quick", "--base", "smollm2"], "contradict"),
    ],
)
def test_options_of_a_real_base_that_do_not_go_together_are_refused(tmp_path, options, words):
    done = CliRunner().invoke(app, ["prior", *options, "--output", str(tmp_path / "p.json")])
    assert isinstance(done.exception, ConfigError) and words in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_the_table_of_repairs_by_hand():
    run = {"corrected_percent": 60.0, "flawed_percent": 30.0, "accuracy_percent": 50.0}
    other = {"corrected_percent": 70.0, "flawed_percent": 20.0, "accuracy_percent": 40.0}
    results = {
        "untrained": {"wrong fact": {"corrected_percent": 0.0, "flawed_percent": 90.0, "accuracy_percent": 10.0}},
        "conditions": [
            {"flaw": "wrong fact", "runs": {"sft": [run, other], "dft": [run]}},
            {"flaw": "none", "runs": {}},
        ],
    }
    assert repaired_table(results).splitlines() == [
        "| % | wrong fact: right | wrong fact: as the flaw | wrong fact: all else |",
        "| --- | --- | --- | --- |",
        "| *untrained* | 0.0 | 90.0 | 10.0 |",
        "| sft | 65.0 | 25.0 | 45.0 |",
        "| dft | 60.0 | 30.0 | 50.0 |",
    ]
