"""`bench distill`: the quick setting end to end, and its arithmetic against values worked out by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from qtarget.benchmarks.distill.bench import DistillConfig, chosen_rates, long, quick, work_folder
from qtarget.benchmarks.distill.data import Sizes, read_rows, read_teacher, split_rows
from qtarget.benchmarks.distill.results import compared, data_needed, distill_table, goals, summarize
from qtarget.benchmarks.distill.runs import FULL, METHODS, CacheKind, Job, TaidSchedule, chosen_rows, right_answers
from qtarget.benchmarks.finetune import Trained, completion_log_probs, encode
from qtarget.benchmarks.pool import RunLog, Workers
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import generated_demonstrations
from qtarget.cli.app import app
from qtarget.core.errors import ConfigError
from qtarget.data import tasks
from qtarget.data.embedded import base_model_path, load_demonstrations


def run(output, *options):
    done = CliRunner().invoke(app, ["bench", "distill", "--quick", "--workers", "1", "--output", str(output), *options])
    assert done.exit_code == 0, done.output
    return json.loads(output.read_text()), done.output


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("distill") / "distill.json"
    return output, *run(output)


# -- the quick setting -------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_orderings_with_a_wide_margin(quick_run):
    _, results, _ = quick_run
    methods = results["methods"]
    few, many = ({name: row["kl_to_teacher"][i]["mean"] for name, row in methods.items()} for i in (0, 1))
    assert few["sft"] > 1.25 * few["distillation"]  # a tenth of the rows: labels are learnt by heart
    assert few["sft"] > few["top8_bucket"]
    for name, row in methods.items():
        assert few[name] > 1.5 * many[name], name
        assert row["accuracy_percent"][1]["mean"] > row["accuracy_percent"][0]["mean"] + 8, name
    assert methods["top8_bucket"]["bytes_per_token"] < 40 < methods["distillation"]["bytes_per_token"]
    assert results["teacher"]["teacher_percent"] > 50


@pytest.mark.nightly
def test_figure_and_output_tell_the_finding(quick_run):
    output, results, printed = quick_run
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert results["finding"] in printed and "6/6" in printed


@pytest.mark.nightly
def test_a_stopped_run_goes_on_and_finds_the_same(quick_run):
    output, before, _ = quick_run
    log = output.with_suffix(".runs.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    log.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote the last one
    after, printed = run(output, "--resume")
    assert printed.count("of the rows\n") == 1 and "training the teacher" not in printed
    assert after["runs"] == before["runs"] and after["methods"] == before["methods"]
    refused = CliRunner().invoke(app, ["bench", "distill", "--quick", "--output", str(output)])
    assert isinstance(refused.exception, ConfigError) and "--resume" in str(refused.exception)
    with pytest.raises(ConfigError, match="other settings"):
        work_folder(DistillConfig(), output.with_suffix(".work"), resume=True)


@pytest.mark.nightly
def test_the_caches_hold_what_the_teacher_says(quick_run):
    folder = quick_run[0].with_suffix(".work")
    rows, tokenizer = read_rows(folder, "train"), AutoTokenizer.from_pretrained(base_model_path())
    expected = completion_log_probs(Start().load(folder / "teacher"), rows)
    full = read_teacher(folder / "caches", FULL, "bucket", len(tokenizer))
    few = read_teacher(folder / "caches", CacheKind(top_k=8), "spread", len(tokenizer))
    assert len(full) == len(few) == len(rows) == 160
    for known, listed, values, row in zip(full, few, expected, rows, strict=True):
        assert row.completion[-1] == tokenizer.eos_token_id
        assert torch.allclose(known.log_probs.exp(), values.exp(), atol=1e-5)
        assert torch.allclose(listed.topk_log_probs.exp(), values.topk(8).values.exp(), atol=1e-3)
        assert listed.tail_policy == "spread"
        rest = 1 - values.topk(8).values.exp().sum(-1)
        assert torch.allclose(listed.tail_log_mass.exp(), rest, atol=1e-4)


# -- data --------------------------------------------------------------------------------------------------------


def test_the_teacher_sees_no_question_of_the_students():
    prompts = {row["prompt"] for row in load_demonstrations("train")}
    free, barred = generated_demonstrations(1500, "x"), generated_demonstrations(1500, "x", prompts)
    assert any(row["prompt"] in prompts for row in free)
    assert not any(row["prompt"] in prompts for row in barred)
    asked = {question_of(row) for row in load_demonstrations("train")}
    assert len(asked) > 900 and not asked & {question_of(row) for row in barred}


def question_of(row):
    """Skill and fields of a prompt, whatever its wording."""
    wanted = row["prompt"].removeprefix("Instruction: ").removesuffix("\nResponse:\n")
    for words in tasks.SKILLS[row["skill"]].instructions:
        if found := re.fullmatch("(.+)".join(map(re.escape, re.split(r"\{\d*\}", words))), wanted):
            return row["skill"], *found.groups()
    raise AssertionError(wanted)


def test_parts_are_apart_and_fractions_are_nested():
    rows = split_rows(Sizes(160, 200, 300, 1))
    prompts = {name: {row["prompt"] for row in part} for name, part in rows.items()}
    assert not prompts["train"] & prompts["validation"] and not prompts["train"] & prompts["test"]
    assert len(rows["test"]) == 300 and 150 < len(rows["validation"]) <= 200
    with pytest.raises(ConfigError, match="1000 are embedded"):
        split_rows(Sizes(900, 200, 300, 1))
    few, many = chosen_rows(160, 0.1, 3), chosen_rows(160, 0.4, 3)
    assert len(few) == 16 and len(many) == len(set(many)) == 64 and set(few) < set(many)
    assert chosen_rows(160, 0.1, 4) != few and sorted(chosen_rows(160, 1.0, 3)) == list(range(160))


def test_taid_moves_from_its_start_to_the_teacher():
    schedule, trained, seen = TaidSchedule(10), Trained(), []
    for step in range(10):
        seen.append(schedule(trained).interpolation)  # pyright: ignore[reportAttributeAccessIssue]
        trained.losses.append(2.0 - 0.1 * step)
    assert seen[0] == 0.4 and seen == sorted(seen) and seen[-1] == pytest.approx(0.4 + 0.6 * 0.9, abs=0.01)


def test_an_oracle_leaves_out_the_rows_that_are_answered_wrongly():
    tokenizer = Start().tokenizer()
    asked = split_rows(Sizes(20, 20, 20, 1))["train"][:4]
    said = [row["completion"] for row in asked[:2]] + [asked[0]["completion"] + " or not", "no idea"]
    rows = encode(tokenizer, [{**row, "completion": text} for row, text in zip(asked, said, strict=True)])
    expected = [tasks.check(row, text) for row, text in zip(asked, said, strict=True)]
    assert right_answers(rows, asked, tokenizer) == expected and expected[:2] == [True, True] and not expected[3]
    oracles = [name for name, plan in METHODS.items() if plan.right_rows]
    assert len(oracles) == 2 and not set(oracles) & set(DistillConfig().methods)


def test_every_method_of_the_benchmark_can_be_built():
    policies = {
        (plan.cache.top_k, plan.policy) for plan in METHODS.values() if plan.cache and plan.target == "distillation"
    }
    assert {(k, p) for k in (2, 8, 32) for p in ("bucket", "spread", "renormalize")} < policies
    etas = [plan.hyperparameters["eta"] for plan in METHODS.values() if plan.target == "target_sft"]
    assert etas == [0.0, 0.1, 0.3, 0.5, 0.7, 1.0]
    for plan in METHODS.values():
        built = plan.build(5)
        assert plan.scheduled or built.name == plan.target  # pyright: ignore[reportAttributeAccessIssue]


# -- arithmetic --------------------------------------------------------------------------------------------------


def test_data_needed_by_hand():
    curve = np.array([20.0, 40.0, 30.0, 60.0])
    fractions = [0.1, 0.2, 0.4, 1.0]
    found = [float(data_needed(fractions, curve, np.array(level))) for level in (10, 30, 40, 45, 61)]
    assert found == pytest.approx([0.1, 0.15, 0.2, 0.4 + 0.6 * 0.5, np.inf])


def hand_made(sft, full):
    """Runs of two seeds and four prompts: how many are answered, by fraction."""
    runs = {}
    for name, counts in {"sft": sft, "distillation": full}.items():
        for fraction, count in zip((0.2, 1.0), counts, strict=True):
            for seed in (0, 1):
                answered = "1" * count + "0" * (4 - count)
                runs[name, fraction, seed] = {"answered": answered, "kl_to_teacher": 1.0 - count / 8}
    caches = {"whole": {"bytes_per_token": 1800.0}}
    rates = {"sft": 1e-3, "distillation": 2e-3}
    return summarize(["sft", "distillation"], [0.2, 1.0], 2, runs, caches, rates, {})


def test_results_by_hand():
    found = hand_made(sft=(0, 2), full=(1, 4))
    row = found["methods"]["distillation"]
    assert [cell["mean"] for cell in row["accuracy_percent"]] == [25, 100]
    assert [cell["mean"] for cell in row["to_sft_points"]] == [25, 50]
    assert row["data_needed"]["mean"] == pytest.approx(0.2 + 0.8 / 3, abs=1e-3)
    assert [cell["mean"] for cell in row["kl_to_teacher"]] == [0.875, 0.5]
    assert row["data_needed_for_kl"]["mean"] == pytest.approx(0.2 + 0.8 / 3, abs=1e-3)
    assert found["methods"]["sft"]["to_full_logits_points"]["mean"] == -37.5
    assert found["methods"]["sft"]["data_needed"]["mean"] == 1.0
    assert found["goals"]["accuracy_of_sft_with_0.4_of_the_rows"]["reached"] == []
    assert "0.47" in found["finding"]
    never = hand_made(sft=(0, 2), full=(0, 1))["methods"]["distillation"]["data_needed"]
    assert never["mean"] is None and never["high"] is None


def test_goals_name_those_that_reach_them():
    def method(target, size, points, needed):
        ends = {"mean": points, "low": points - 1, "high": points + 1}
        share = {"mean": needed, "low": needed, "high": None if needed is None else needed + 0.05}
        return {
            "target": target, "bytes_per_token": size, "to_full_logits_points": ends, "data_needed": share,
            "data_needed_for_kl": share,
        }  # fmt: skip

    found = goals(
        {
            "sft": method("sft", 0.0, -5.0, 1.0),
            "distillation": method("distillation", 1800.0, 0.0, 0.38),
            "top8_bucket": method("distillation", 30.0, 0.5, 0.3),
            "top2_bucket": method("distillation", 15.0, -0.5, None),
            "top32_bucket": method("distillation", 70.0, 0.5, 0.3),
        }
    )
    assert found["accuracy_of_sft_with_0.4_of_the_rows"] == {
        "reached": ["distillation", "top8_bucket", "top32_bucket"],
        "reached_with_interval": ["top8_bucket", "top32_bucket"],
    }
    assert found["within_1_point_of_full_logits_at_40_bytes_a_token"] == {
        "reached": ["top8_bucket", "top2_bucket"],
        "reached_with_interval": ["top8_bucket"],
    }


def test_differences_are_paired_over_seeds():
    rough = np.array([[[0.0]], [[50.0]]])  # one fraction, two seeds that differ a lot
    values = np.stack([rough.reshape(1, 2, 1), rough.reshape(1, 2, 1) + 3])
    found = compared(["sft", "distillation"], [1.0], values)["distillation"]
    assert found["to_sft"] == [{"mean": 3.0, "low": 3.0, "high": 3.0}]
    assert found["curve"][0]["high"] - found["curve"][0]["low"] == 50


def test_table_is_markdown_with_a_row_a_method():
    results = hand_made(sft=(0, 2), full=(1, 4))
    lines = distill_table(results).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| sft | text only | 0.001 | 0.0 (0.0..0.0) |")
    assert lines[3].startswith("| distillation | 1800.0 | 0.002 | 25.0 (")


class Fixed:
    """Answers as many of ten prompts as its table says."""

    def __init__(self, table) -> None:
        self.table = table

    def __call__(self, job: Job):
        count = self.table[job.method, job.learning_rate]
        return {"answered": "1" * count + "0" * (10 - count)}


def test_each_method_gets_its_best_rate_and_of_equals_the_grids_first(tmp_path):
    config = DistillConfig(methods=("sft", "distillation"), learning_rates=(2e-3, 1e-3))
    table = {("sft", 1e-3): 6, ("sft", 2e-3): 6, ("distillation", 1e-3): 3, ("distillation", 2e-3): 4}
    log = RunLog(tmp_path / "x.runs.jsonl", resume=False)
    with Workers(1, Fixed, table) as workers:
        rates, scores = chosen_rates(config, workers, log, lambda _: None)
    assert rates == {"sft": 2e-3, "distillation": 2e-3}
    assert scores["distillation"] == {"0.001": 30.0, "0.002": 40.0}
    assert all("|1000|tuning" in key for key in log.runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("sft",)}, "distillation"),
        ({"methods": ("sft", "distillation", "sgt")}, "'sgt' is unknown"),
        ({"fractions": (0.4, 0.1, 1.0)}, "ascending"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**change)


def test_quick_is_one_seed_of_three_methods():
    config = quick(DistillConfig(workers=3))
    assert (config.seeds, len(config.methods), config.workers) == (1, 3, 3)


def test_the_long_setting_changes_steps_rates_and_methods_only(tmp_path):
    full, longer = DistillConfig(), long(DistillConfig())
    assert longer.steps > 3 * full.steps
    assert min(longer.learning_rates) < min(full.learning_rates)
    same = {"steps": full.steps, "learning_rates": full.learning_rates, "methods": full.methods}
    assert replace(longer, **same) == full
    assert set(longer.methods) < set(full.methods)
    found = CliRunner().invoke(app, ["bench", "distill", "--quick", "--long", "--output", str(tmp_path / "d.json")])
    assert "contradict each other" in str(found.exception)
