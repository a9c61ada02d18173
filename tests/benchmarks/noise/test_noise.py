"""`bench noise`: the rows of each kind, the choice by noisy validation, the sums, and one ordering with a wide margin."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from qtarget.benchmarks.finetune import Recipe, encode
from qtarget.benchmarks.noise import bench, crossfitting
from qtarget.benchmarks.noise.methods import METHODS, methods
from qtarget.benchmarks.noise.mixture import likelier_part
from qtarget.benchmarks.noise.results import noise_figure, noise_table, recovered, summarize
from qtarget.benchmarks.noise.runs import Cell, Job, Material, chosen_rows, known_of, misleading_cues, noisy_rows
from qtarget.benchmarks.noise.runs import stated_answers as stated
from qtarget.benchmarks.pool import RunLog
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import embedded_tasks, math_tasks, scan_tasks, task_set
from qtarget.cli.bench.app import app
from qtarget.core.errors import ConfigError
from qtarget.core.types import Reference
from qtarget.data import tasks
from qtarget.data.embedded import base_model_path
from qtarget.registry import available_targets
from tests import SHARED


@pytest.fixture(scope="module")
def task():
    return embedded_tasks(train_rows=40)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


def test_rows_for_training_tuning_testing_and_bases_are_four_sets(task):
    prompts = [{row["prompt"] for row in rows} for rows in (task.train, task.validation, task.test, task.warmup)]
    for i, first in enumerate(prompts):
        for second in prompts[i + 1 :]:
            assert not first & second


def test_a_cue_tells_the_answer_in_training_and_a_wrong_one_in_the_test(task, tokenizer):
    rows = noisy_rows(task.train, Cell("none", "cue", 0.5), 0, tokenizer)
    told = [row for row in rows if row["prompt"].startswith("Note ")]
    assert len(told) == 20
    for row in told:
        assert row["prompt"].split("\n")[0] == f"Note {row['answer']}"
        start, end, kind = row["noise_spans"][0]
        assert (row["completion"][start:end], kind) == (row["answer"], "cue")
        assert tasks.check(row, row["completion"])
    assert all(not row["noise_spans"] for row in rows if row not in told)
    for asked, row in zip(misleading_cues(task.test), task.test, strict=True):
        assert asked["answer"] == row["answer"]
        assert asked["prompt"].split("\n")[0] not in ("", f"Note {row['answer']}")


def test_validation_counts_what_the_noisy_rows_state(task, tokenizer):
    rows = noisy_rows(task.validation, Cell("none", "wrong_answer", 1.0), 0, tokenizer)
    assert len(stated(rows)) == len(rows)
    assert all(tasks.check(row, row["completion"]) for row in stated(rows))
    assert not any(tasks.check(row, row["completion"]) for row in rows)
    broken = [{"completion": "no brackets", "answer": "3"}]
    assert stated(broken) == []


def test_filtering_keeps_the_least_surprising_rows_and_the_oracle_leaves_marks_out(task, tokenizer):
    from qtarget.benchmarks.finetune import encode

    rows = noisy_rows(task.train, Cell("none", "random_tokens", 0.3), 0, tokenizer)
    encoded = encode(tokenizer, rows)
    material = Material(encoded, known_of(Start().load(), encoded))
    kept, known = chosen_rows(METHODS["sft, filtered rows"], 0.5, material)
    assert len(kept) == len(known) == 20
    nll = {
        id(row): -float(numbers.label_log_probs.mean()) for row, numbers in zip(encoded, material.known, strict=True)
    }
    dropped = [nll[id(row)] for row in encoded if not any(row is one for one in kept)]
    assert max(nll[id(row)] for row in kept) <= min(dropped)
    marked, _ = chosen_rows(METHODS["sft, marks left out"], 0.0, material)
    assert [row.left_out for row in marked] == [row.noise for row in encoded]
    assert any(any(row.noise) for row in encoded)


def test_every_target_that_needs_no_other_teacher_is_in_the_table():
    trained = {method.target for method in METHODS.values()}
    elsewhere = {"distillation", "forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl", "taid"}
    assert set(available_targets()) == trained | elsewhere  # with the base as teacher those have nothing to learn


def test_the_best_on_noisy_validation_rows_is_taken_and_of_equals_the_first(tmp_path):
    accuracy = {1e-3: 50.0, 5e-4: 50.0, 2e-3: 40.0, 0.3: 50.0, 0.1: 60.0, 0.6: 10.0}

    class Fake:
        def run(self, jobs, log, done):
            first = [job.value == 0.3 and job.learning_rate != 2e-3 for job in jobs]
            return [
                {"accuracy_percent": accuracy[job.value if job.value != 0.3 else job.learning_rate]}
                for job, _ in zip(jobs, first, strict=True)
            ]

    cell = Cell("none", "random_tokens", 0.2)
    config = replace(bench.NoiseConfig(), names=("target_sft",), screen=())
    chosen = bench.tuned(Fake(), RunLog(tmp_path / "runs.jsonl", False), cell, config, lambda job: None)  # pyright: ignore[reportArgumentType]
    assert chosen == [Job(cell, "target_sft", 1e-3, 0.1, bench.TUNING_SEED, True)]


def test_steps_are_tuned_at_the_best_rate_and_before_the_own_number(tmp_path):
    asked = []

    class Fake:
        def run(self, jobs, log, done):
            asked.append([(job.learning_rate, job.steps, job.value) for job in jobs])
            score = {None: 50.0, 20: 40.0, 120: 60.0}
            return [
                {"accuracy_percent": score[job.steps] - 10 * (job.learning_rate != 5e-4) - job.value} for job in jobs
            ]

    cell, log = Cell("none", "random_tokens", 0.2), RunLog(tmp_path / "runs.jsonl", False)
    config = replace(
        bench.NoiseConfig(), names=("target_sft",), screen=(), cells=(cell,), steps_grid=(20, 40, 120), seeds=2
    )
    (job,) = bench.tuned(Fake(), log, cell, config, lambda job: None)  # pyright: ignore[reportArgumentType]
    assert (job.learning_rate, job.steps, job.value) == (5e-4, 120, 0.1)
    assert [rate for rate, *_ in asked[0]] == list(config.learning_rates)
    assert [(rate, steps) for rate, steps, _ in asked[1]] == [(5e-4, 20), (5e-4, None), (5e-4, 120)]
    assert {(rate, steps) for rate, steps, _ in asked[2]} == {(5e-4, 120)}
    assert job.key != replace(job, steps=None).key  # and a run without a grid keeps the key that it had
    assert replace(job, steps=None).key == "none|random_tokens|0.2|target_sft|0.0005|0.1|1000|tuning"
    assert config.runs() == replace(config, steps_grid=()).runs() + 2
    assert bench.cell_results(cell, [job], [{}, {}], 2)["chosen"]["target_sft"]["steps"] == 120
    with pytest.raises(ConfigError, match="at least 1"):
        replace(config, steps_grid=(0,))


def test_copies_learn_what_they_do_not_judge_and_the_witness_is_what_they_say(task, tokenizer, monkeypatch):
    rows = encode(
        tokenizer, noisy_rows([*task.train[:6], task.train[0]], Cell("none", "random_tokens", 0.0), 0, tokenizer)
    )
    learnt, judged = [], []

    class Copy:
        def __init__(self):
            learnt.append([])

    def fine_tune(copy, rows, target, recipe):
        learnt[-1] = [tuple(row.prompt) for row in rows]
        assert target.name == "sft"

    def completion_log_probs(copy, rows):
        judged.append((len(learnt), {tuple(row.prompt) for row in rows}))
        return [torch.full((len(row.completion), 512), -float(len(learnt))) for row in rows]

    monkeypatch.setattr(crossfitting, "fine_tune", fine_tune)
    monkeypatch.setattr(crossfitting, "completion_log_probs", completion_log_probs)
    told = crossfitting.crossfit_of(rows, Copy, Recipe(1e-3, 4, 5, seed=1))
    assert len(learnt) == 2
    everybody, own = {tuple(row.prompt) for row in rows}, [prompts for _, prompts in judged]
    for copy, prompts in judged:  # its own rows, and their answers under each other's prompts
        assert prompts <= everybody - set(learnt[copy - 1])
    first = own[0]
    assert first | next(prompts for copy, prompts in judged if copy == 2) == everybody
    assert [value[0].item() for value in told.log_probs] == [
        -1.0 if tuple(row.prompt) in first else -2.0 for row in rows
    ]
    base = [Reference(label_log_probs=torch.full((len(row.completion),), -4.0)) for row in rows]
    known_now, _ = crossfitting.with_crossfit(rows, base, told, Copy)
    for known, value in zip(known_now, told.log_probs, strict=True):
        torch.testing.assert_close(known.crossfit, value.exp())
    first = known_now[0]
    assert 0 < float(first.perplexity_ratio[0]) < 0.2 and float(first.noise_tokens[0]) < 0.1


def test_a_mixture_finds_the_likelier_part_and_rows_are_chosen_by_it(task, tokenizer):
    rng = np.random.default_rng(0)
    nll = np.concatenate([rng.normal(0.5, 0.1, 70), rng.normal(2.0, 0.4, 30), [0.0]])
    found = likelier_part(nll)
    assert found[:70].mean() > 0.95 and found[70:100].mean() < 0.05
    assert found[100], "far below the likelier part"
    assert likelier_part(np.ones(5)).all()
    rows = encode(tokenizer, noisy_rows(task.train[:10], Cell("none", "random_tokens", 0.0), 0, tokenizer))
    known = [
        Reference(crossfit=torch.full((len(row.completion),), 0.01 if i in (3, 7) else 0.9))
        for i, row in enumerate(rows)
    ]
    kept, numbers = chosen_rows(METHODS["sft, rows by cross-fit"], 0.0, Material(rows, known))
    assert kept == [row for i, row in enumerate(rows) if i not in (3, 7)] and len(numbers) == 8


def cell(base: str, rate: float, **accuracies: list[float]) -> dict:
    runs = {
        name: [{"accuracy_percent": v, "kept_percent": 1.0, "nll": 0.5, "noise_share": None} for v in values]
        for name, values in accuracies.items()
    }
    return {"base": base, "kind": "random_tokens", "rate": rate, "runs": runs}


def test_the_sums_of_the_map_by_hand():
    cells = [
        cell("none", 0.0, sft=[60.0, 70.0], consensus=[64.0, 66.0], prior_surprise=[50.0, 50.0]),
        cell("none", 0.4, sft=[20.0, 30.0], consensus=[40.0, 45.0], prior_surprise=[0.0, 10.0]),
    ]
    assert recovered(cells, cells[1], "consensus") == round((42.5 - 25) / (65 - 25), 3)
    assert recovered(cells, cells[0], "consensus") is None
    results = {"cells": cells, "untrained": {"none": {"accuracy_percent": 5.0}}}
    results["summary"] = summarize(results)
    row = results["summary"]["cells"][1]["methods"]["consensus"]
    assert (row["accuracy_percent"]["mean"], row["to_sft_points"]["mean"]) == (42.5, 17.5)
    assert (row["to_sft_points"]["low"], row["to_sft_points"]["high"]) == (15.0, 20.0)
    goal = results["summary"]["goals"][1]
    assert (goal["relative_gain"], goal["gap_recovered"]) == (0.7, pytest.approx(0.438, abs=1e-3))
    assert (goal["best_published"], goal["within_a_point_of_best"], goal["untrained"]) == ("sft", True, 5.0)
    assert results["summary"]["finding"] == (
        "Over 1 noisy point of the map, consensus is never below SFT; the next best target, prior_surprise, up to 20.0 points; "
        "1 - p_base up to 20.0"
    )
    table = noise_table(results)
    assert "| consensus | **65.0 (64..66)** | **42.5 (40..45)** |" in table
    assert "| *untrained* | 5.0 | 5.0 |" in table
    assert len(noise_figure(results).axes) == 1


def test_unknown_methods_tasks_and_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="known: sft"):
        methods(("sft", "magic"))
    with pytest.raises(ConfigError, match="expected one of embedded, caesar, scan"):
        task_set("magic", None)
    with pytest.raises(ConfigError, match="--data"):
        task_set("scan", None)
    with pytest.raises(ConfigError, match="at least 1"):
        bench.NoiseConfig(seeds=0)


@pytest.mark.parametrize("real", [scan_tasks, math_tasks])
def test_real_rows_are_asked_in_two_formats(real):
    if not SHARED.is_dir():
        pytest.skip("the real data sets are not beside this project")
    found = real(SHARED, train_rows=100)
    taught = [row["prompt"] for row in (*found.train, *found.validation, *found.warmup, *found.pretraining)]
    asked = {re.sub("[^a-z0-9]", "", row["prompt"].lower()) for row in (*found.test, *found.kept)}
    assert not asked & {re.sub("[^a-z0-9]", "", prompt.lower()) for prompt in taught}
    commands = {row["prompt"] for row in found.train}
    assert len(commands) == 100 and not commands & {row["prompt"] for row in found.test}
    assert all(tasks.check(row, row["completion"]) for row in found.test)
    assert all(tasks.check_pretraining(row, row["completion"]) for row in found.kept)


@pytest.mark.nightly
def test_the_quick_setting_finds_the_ordering_and_goes_on_where_it_was_stopped(tmp_path):
    """40 % random tokens on a base that knows the format: target_sft keeps it, SFT loses most, 1 - p_base all of it."""
    output = tmp_path / "noise.json"
    arguments = ["noise", "--quick", "--workers", "1", "--output", str(output)]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    found = json.loads(output.read_text())
    mean = {name: row["accuracy_percent"]["mean"] for name, row in found["summary"]["cells"][0]["methods"].items()}
    assert mean["target_sft"] > mean["sft"] + 20
    assert mean["sft"] > mean["prior_surprise"] + 5
    assert found["untrained"]["most"]["accuracy_percent"] > 50
    assert 0.2 < found["cells"][0]["base_knows"]["favourite_share"] < 0.5  # 0.83 of the clean labels
    assert output.with_suffix(".png").stat().st_size > 10_000
    log = output.with_suffix(".runs.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while writing
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code != 0 and "--resume" in str(again.exception)
    more = CliRunner().invoke(app, [*arguments, "--resume"])
    assert more.exit_code == 0, more.output
    assert json.loads(output.read_text())["cells"] == found["cells"]
