"""The demo's arithmetic, its picture, and one quick run from end to end."""

from __future__ import annotations

import json

import pytest

from qtarget.benchmarks.demo.bench import quick, summarize
from qtarget.benchmarks.demo.runs import DemoConfig, sample_rows
from qtarget.benchmarks.figure import comparison_figure, save_figure
from qtarget.benchmarks.generation import accuracy_percent, greedy_completions
from qtarget.benchmarks.seeds import Range, finding, over_seeds, paired_difference
from qtarget.core.errors import ConfigError, QTargetError, ShapeError


def test_mean_range_and_paired_difference_by_hand():
    assert over_seeds([2.0, 4.0, 9.0]) == Range(5.0, 2.0, 9.0, 3)
    # far apart between seeds, one point apart within each
    assert paired_difference([11.0, 51.0, 92.0], [10.0, 50.0, 90.0]) == Range(pytest.approx(4 / 3), 1.0, 2.0, 3)
    for broken in (lambda: over_seeds([]), lambda: paired_difference([1.0], [1.0, 2.0])):
        with pytest.raises(ShapeError):
            broken()


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({"sft": [50.0, 60.0], "a": [51.0, 62.0], "b": [40.0, 40.0]},
         "a is best: 56.5 % against 55.0 % for sft, ahead in each"),
        ({"sft": [50.0, 60.0], "a": [45.0, 70.0]}, "a is best: 57.5 % against 55.0 % for sft, but the seeds disagree"),
        ({"sft": [50.0, 60.0], "a": [45.0, 55.0]},
         "beats sft: 55.0 % against 50.0 % for a, ahead in each of 2 seeds"),
        ({"sft": [50.0], "a": [60.0]}, "ahead in the only seed"),
        ({"sft": [50.0], "a": [50.0]}, "a tie"),
        ({"sft": [50.0]}, "sft reaches 50.0 %"),
    ],
)  # fmt: skip
def test_the_finding_says_what_the_numbers_say(accuracies, expected):
    assert expected in finding(accuracies, "noise")


def test_the_summary_pairs_seeds_with_sft():
    def run(accuracy, kept, seconds):
        return {"accuracy_percent": accuracy, "kept_percent": kept, "training_seconds": seconds}

    found = summarize(
        {"sft": [run(10.0, 5.0, 1.0), run(20.0, 7.0, 3.0)], "dft": [run(15.0, 0.0, 1.0), run(21.0, 1.0, 1.0)]}
    )
    assert found["dft"]["difference_to_sft_points"] == {"mean": 3.0, "low": 1.0, "high": 5.0, "count": 2}
    assert found["sft"]["kept_percent"] == {"mean": 6.0, "low": 5.0, "high": 7.0, "count": 2}
    assert found["sft"]["training_seconds"] == 2.0


def test_the_figure_draws_every_seed_and_the_numbers_it_names(tmp_path):
    accuracies = {"sft": [50.0, 54.0], "dft": [60.0, 70.0]}
    figure = comparison_figure(accuracies, 3.0, "the finding", "what the points are")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sft", "dft"]
    drawn = [list(line.get_xdata()) for line in axes.lines]
    for name, values in accuracies.items():
        assert values in drawn, name
    assert {"52.0", "65.0", "untrained 3.0"} == {text.get_text() for text in axes.texts}
    assert axes.get_title(loc="left") == "the finding"
    assert "%" in axes.get_xlabel()
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_budgets_that_compare_nothing_are_refused():
    for change in ({"seeds": 0}, {"targets": ("dft",)}, {"targets": ("sft", "sft")}, {"targets": ("sft", "dtf")}):
        with pytest.raises(QTargetError):
            DemoConfig(**change)
    with pytest.raises(ConfigError, match="3 test rows asked for, 2 are embedded"):
        sample_rows([{}, {}], 3, "test")
    assert quick(DemoConfig()).seeds == 1


def test_every_seed_trains_on_the_same_rows_and_samples_do_not_repeat():
    rows = [{"id": i} for i in range(10)]
    assert sample_rows(rows, 6, "train") == sample_rows(rows, 6, "train")
    assert len({row["id"] for row in sample_rows(rows, 10, "train")}) == 10


def test_greedy_completions_are_those_of_one_prompt_at_a_time(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    prompts = ["1+1=", "a long prompt: ", "x", "12+34="]
    found = greedy_completions(model, tokenizer, prompts, max_new_tokens=5, batch_size=3)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
    assert accuracy_percent([{"a": 1}] * 4, ["x", "y", "x", "x"], lambda row, text: text == "x") == 75.0


@pytest.mark.slow
def test_the_quick_demo_runs_from_the_command_line(tmp_path, capsys):
    from qtarget.cli.main import run

    with pytest.raises(SystemExit) as ended:
        run(["demo", "--quick", "--output", str(tmp_path)])
    assert ended.value.code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    config = quick(DemoConfig())
    assert set(results["runs"]) == set(config.targets)
    for runs in results["runs"].values():
        assert [run["seed"] for run in runs] == [0]
        assert runs[0]["steps"] == -(-config.train_rows // config.batch_size)
    assert results["scoring"]["rows"] == config.train_rows
    assert results["untrained"]["kept_percent"] > 50  # the base knows its skills, and not the instruction format
    assert results["untrained"]["accuracy_percent"] < 30
    assert results["finding"] in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "results.png").stat().st_size > 10_000
