"""The demo's arithmetic, its picture, and one quick run from end to end."""

from __future__ import annotations

import json

import pytest

from qtarget.benchmarks.demo.bench import TUNED, DemoConfig, quick, summarize
from qtarget.benchmarks.demo.bench import finding as story
from qtarget.benchmarks.figure import regimes_figure, save_figure
from qtarget.benchmarks.generation import accuracy_percent, greedy_completions
from qtarget.benchmarks.seeds import Range, over_seeds, paired_difference
from qtarget.core.errors import QTargetError, ShapeError
from tests import ROOT


def test_mean_range_and_paired_difference_by_hand():
    assert over_seeds([2.0, 4.0, 9.0]) == Range(5.0, 2.0, 9.0, 3)
    # far apart between seeds, one point apart within each
    assert paired_difference([11.0, 51.0, 92.0], [10.0, 50.0, 90.0]) == Range(pytest.approx(4 / 3), 1.0, 2.0, 3)
    for broken in (lambda: over_seeds([]), lambda: paired_difference([1.0], [1.0, 2.0])):
        with pytest.raises(ShapeError):
            broken()


def test_the_summary_pairs_seeds_with_sft():
    def run(accuracy, kept):
        return {"accuracy_percent": accuracy, "kept_percent": kept}

    found = summarize({"sft": [run(10.0, 5.0), run(20.0, 7.0)], "dft": [run(15.0, 0.0), run(21.0, 1.0)]})
    assert found["dft"]["difference_to_sft_points"] == {"mean": 3.0, "low": 1.0, "high": 5.0, "count": 2}
    assert found["sft"]["kept_percent"] == {"mean": 6.0, "low": 5.0, "high": 7.0, "count": 2}


def regime(untrained, **means):
    rows = {
        name.replace("_left_out", ", marks left out"): [{"accuracy_percent": v, "kept_percent": 0.0}]
        for name, v in means.items()
    }
    return {"untrained": {"accuracy_percent": untrained}, "summary": summarize(rows)}


def test_the_story_names_what_is_best_at_both_ends_and_no_oracle():
    told = story(
        {
            "most": regime(63.0, sft=44.0, a=60.0, b=65.0, sft_left_out=99.0),
            "none": regime(0.0, sft=20.0, a=18.0, b=1.0),
        },
        "noise",
    )
    assert told == (
        "noise: sft takes a base from 63 to 44 %, b to 65 %; sft takes a base from 0 to 20 %. "
        "a is within 5 points of the best for both"
    )


def test_the_figure_draws_every_seed_and_the_numbers_it_names(tmp_path):
    found = {"sft": [50.0, 54.0], "dft": [60.0, 70.0]}
    panels = {"one base": (found, 3.0), "another": ({"sft": [1.0, 1.0], "dft": [0.0, 0.0]}, 0.0)}
    figure = regimes_figure(panels, "the finding", "what the points are")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["dft", "sft"]  # from below
    drawn = [list(line.get_xdata()) for line in left.lines]
    for name, values in found.items():
        assert values in drawn, name
    assert [text.get_text() for text in left.texts] == ["65", "52"]
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == ("one base", "another")
    assert "%" in left.get_xlabel()
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_budgets_that_compare_nothing_are_refused():
    for change in ({"seeds": 0}, {"methods": ("consensus",)}, {"methods": ("sft", "dtf")}):
        with pytest.raises(QTargetError):
            DemoConfig(**change)
    assert quick(DemoConfig()).seeds == 1


def test_rates_are_those_that_the_benchmark_chose():
    noise, more = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("noise", "demo_tuning")
    )
    config, seen = DemoConfig(), set()
    for cell in [*noise["cells"], *more["cells"]]:
        if (cell["kind"], cell["rate"]) == (config.kind, config.rate) and cell["base"] in TUNED:
            for name, (rate, value) in TUNED[cell["base"]].items():
                if name in cell["chosen"]:
                    assert cell["chosen"][name] == {"learning_rate": rate, "value": value}, (cell["base"], name)
                    seen.add((cell["base"], name))
    assert seen == {(base, name) for base, methods in TUNED.items() for name in methods}
    assert config.steps == noise["config"]["steps"] == more["config"]["steps"]


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
    assert set(results["regimes"]) == {"most", "none"}
    for regime in results["regimes"].values():
        assert set(regime["runs"]) == {"sft", "target_sft"}
        assert all(len(runs) == 1 for runs in regime["runs"].values())
    untrained = {base: regime["untrained"]["accuracy_percent"] for base, regime in results["regimes"].items()}
    assert untrained["none"] < 5 < 50 < untrained["most"]
    said = " ".join(capsys.readouterr().out.split())
    assert results["finding"] in said
    assert "qtarget init" in said
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.nightly
def test_the_quick_rl_demo_runs_from_the_command_line(tmp_path, capsys):
    from qtarget.benchmarks.demo.rl_runs import WAYS
    from qtarget.cli.main import run

    with pytest.raises(SystemExit) as ended:
        run(["demo", "--rl", "--quick", "--output", str(tmp_path)])
    assert ended.value.code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["runs"]) == set(WAYS)
    rewards = {name: runs[0].get("reward") for name, runs in results["runs"].items()}
    assert rewards.pop("sft") is None  # reads demonstrations
    assert {tuple(reward[:1]) for reward in rewards.values()} == {tuple(rewards["dppo_tv"][:1])}  # one start, one draw
    summary = results["summary"]
    assert abs(summary["dppo_tv"]["kl_k3"]["mean"]) < 1e-6 < summary["stale dppo_tv"]["kl_k3"]["mean"]
    assert summary["dppo_tv"]["blocked"]["mean"] == summary["stale policy_gradient"]["blocked"]["mean"] == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "sampled" in said and "greedy" in said and "(teacher)" in said
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_samples_of_the_rl_demo_end_where_the_model_ends_and_are_scored_by_the_sampler():
    import torch

    from qtarget.benchmarks.sampling import GROUP, NEW_TOKENS, sample_round
    from qtarget.benchmarks.start import Start
    from qtarget.benchmarks.tasks import generated_demonstrations

    model, tokenizer = Start().load(), Start().tokenizer()
    asked = generated_demonstrations(3, "test")
    drawn = sample_round(model, tokenizer, asked, seed=1)
    assert len(drawn.rows) == len(drawn.rewards) == 3 * GROUP
    for index, (row, log_probs) in enumerate(zip(drawn.rows, drawn.log_probs, strict=True)):
        assert row.prompt == tokenizer(asked[index // GROUP]["prompt"])["input_ids"]
        assert tokenizer.eos_token_id not in row.completion[:-1]
        assert row.completion[-1] == tokenizer.eos_token_id or len(row.completion) == NEW_TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([row.prompt + row.completion])).logits[0].log_softmax(-1)
        expected = [logits[len(row.prompt) - 1 + t, token] for t, token in enumerate(row.completion)]
        assert torch.allclose(log_probs, torch.stack(expected), atol=1e-4)
    assert torch.allclose(drawn.advantages.view(3, GROUP).sum(1), torch.zeros(3), atol=1e-6)
