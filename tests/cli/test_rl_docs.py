"""docs/rl.md: its rows, reward, config and commands run as they stand there."""

from __future__ import annotations

import json
import re
import shlex

import pytest

pytest.importorskip("trl")

from qtarget.cli.main import run
from qtarget.registry import available_trust_regions, get_target, hyperparameters, target_class
from tests import ROOT

PAGE = (ROOT / "docs/rl.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def there(tmp_path, tiny_model, monkeypatch):
    """A folder with the page's files in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(blocks("json")[0] * 4)
    (tmp_path / "my_rewards.py").write_text(blocks("python")[0])
    (tmp_path / "rl.yaml").write_text(blocks("yaml")[0].replace("path/to/model", str(tiny_model)) + "use_cpu: true\n")
    return tmp_path


def test_the_commands_run(there, tiny_model, recwarn, capsys):
    lines = [shlex.split(line.replace("path/to/teacher", str(tiny_model))) for line in blocks("sh")[0].splitlines()]
    assert [line[:3] for line in lines] == [["qtarget", "rl", "rl.yaml"]] * 4
    for line in lines:
        assert called(*line[1:]) == 0
    for folder, name in (
        ("rl", "dppo_tv"),
        ("drpo", "drpo"),
        ("opd", "reverse_kl"),
        ("taught", "dppo_tv by a teacher"),
    ):
        output = there / "runs" / folder
        summary = json.loads((output / "train_summary.json").read_text())
        assert (summary["target"], summary["steps"]) == (name, 8)
        assert json.loads((output / "qtarget_run.json").read_text())["target"] == name
        lines = [json.loads(line) for line in (output / "qtarget_log.jsonl").read_text().splitlines()]
        assert sum("loss" in line for line in lines) == 8
        assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
        assert (output / "model.safetensors").is_file()
        assert any("ratio/mean" in line for line in lines) == (folder != "opd")
        check_card(output, name)
    assert [w for w in map(str, (one.message for one in recwarn)) if "deprecat" in w or "pin_memory" in w] == []
    assert "tokenizer, README.md, qtarget_config.yaml" in " ".join(capsys.readouterr().out.split())
    report = shlex.split(blocks("sh")[1])
    assert called(*report[1:], "--json", "rl.json") == 0
    found = json.loads((there / "rl.json").read_text())
    assert "Reward of samples" in found["finding"] and "runs/" not in found["finding"]
    for one in found["runs"]:
        assert ("ratio/ess" in one["train"]) == ("reward" in one["train"]) == (one["name"] != "opd")
        assert len(one["train"]["rollout/age"]) == 8
    assert 'alt="samples;' in (there / "rl.html").read_text()
    log = (there / "runs/drpo/qtarget_config.yaml").read_text()
    assert "delta: 0.5" in log and "reward_funcs: my_rewards:exact" in log and "algorithm: rl" in log
    assert all(len(one["completions"]) == 32 for one in found["runs"])
    shown = shlex.split(blocks("sh")[2])
    assert called(*shown[1:]) == 0
    rules = [one["region"] for one in json.loads((there / "samples.json").read_text())["summary"]]
    assert [rule.split("(")[0] for rule in rules] == ["as trained", "ppo_clip", "dppo_tv", "drpo"]
    # a finished run is not written over, and goes on only when asked
    assert called("rl", "rl.yaml") == 2
    assert called("rl", "rl.yaml", "--resume", "true") == 0


def check_card(output, name: str) -> None:
    """What a run's card says; and written anew it is no card of somebody else's."""
    text, record = (output / "README.md").read_text(), json.loads((output / "qtarget_run.json").read_text())
    for words in (
        f"trained on its own samples with `{name}` of qtarget", record["data"]["train"]["fingerprint"], "| learning_rate | 1e-05 |",
        record["fingerprints"]["model"], "| num_generations | 4 |", "| loss |",
    ):  # fmt: skip
        assert words in text, words
    assert "None" not in text and str(output.parent) not in text
    assert ("| rewards | exact |" in text, "\n| reward |" in text) == (output.name in ("rl", "drpo"),) * 2
    assert ("| trust_region_kwargs | delta = 0.5 |" in text) == (output.name == "drpo")
    assert ("| teacher | run live of" in text) == (output.name in ("opd", "taught"))
    assert (output / "checkpoint-4/README.md").is_file()
    assert called("card", output) == 0
    assert list(output.glob("README.kept-*")) == []


def test_the_pages_reward_reads_chats_too_and_a_step_is_a_line(there, capsys):
    page: dict = {}
    exec(blocks("python")[0], page)  # as it stands there
    assert page["exact"]([" 4", "5"], ["4", "4"]) == [1.0, 0.0]
    assert page["exact"]([[{"role": "assistant", "content": "4 "}]], ["4"]) == [1.0]
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "answer": str(i + 1)} for i in range(8)]
    (there / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert called("rl", "rl.yaml", "--max_steps", "4", "--disable_tqdm", "true") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == [f"step {i}" for i in range(1, 5)]
    assert ["reward" in line and "length" in line for line in lines] == [
        True,
        False,
        True,
        False,
    ]  # two steps a sampling
    assert all("KL to sampler" in line and "{" not in line for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reward_funcs", "nowhere:exact"], "UnknownNameError: reward 'nowhere:exact' cannot be imported"),
        (
            ["--trust_region", "ppoclip"],
            "UnknownTrustRegionError: trust_region 'ppoclip' is unknown; did you mean ppo_clip",
        ),
        (["--reward_funcs", "null"], "weighs samples by rewards, and there is none"),
        (["--beta", "0.1"], "target: reverse_kl, target_weight: 0.1"),
        (["--trust_region", "ppo"], "did you mean ppo_clip or spo"),
        (["--trust_region", "reverse_kl"], "set it as target, or choose one"),
        (["--train_file", "absent.jsonl"], "absent.jsonl"),
        (["--num_generation", "4"], "did you mean num_generations?"),
        (["--algorithm", "sft"], "is `qtarget train`'s"),
    ],
)
def test_wrong_settings_say_what_and_how(there, capsys, options, words):
    assert called("rl", "rl.yaml", *options) == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split())
    assert "Traceback" not in said


def test_train_with_an_algorithm_is_the_same_verb(there, capsys):
    """Told by the errors: each verb's own, before a model is loaded."""
    assert called("train", "rl.yaml", "--algorithm", "rl", "--reward_funcs", "null") == 2
    assert "weighs samples by rewards" in " ".join(capsys.readouterr().err.split())
    assert called("train", "rl.yaml", "--algorithm", "ppo") == 2
    assert "expected sft (demonstrations) or rl" in " ".join(capsys.readouterr().err.split())
    assert called("train", "rl.yaml", "--algorithm", "sft") == 2
    assert "unknown keys" in capsys.readouterr().err


def test_the_table_of_rules_is_the_registry():
    rows = "\n".join(re.findall(r"^\| `.*$", PAGE.split("## Trust regions")[1].split("##")[0], flags=re.MULTILINE))
    assert set(re.findall(r"`(\w+)`(?:, `(\w+)`)? \|", rows)) is not None
    for name in available_trust_regions():
        assert f"`{name}`" in rows
        for field, default in hyperparameters(target_class(name)).items():
            if field != "outcomes":
                assert f"`{field}`" in rows and f"{default:g}" in rows, (name, field)
        assert get_target(name).needs.advantages


def test_the_demos_figures_are_those_of_its_results():
    found = json.loads((ROOT / "benchmarks/results/demo_rl.json").read_text())
    section = PAGE.split("## What it does to a small model")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.*) \|$", section, flags=re.MULTILINE))
    for name, row in found["summary"].items():
        scores = [
            f"{row[key]['mean']:.1f} ({row[key]['low']:.1f}..{row[key]['high']:.1f})"
            for key in ("sampled_percent", "greedy_percent")
        ]
        seen = (
            [f"{row['kl_k3']['mean']:.3f}", f"{row['blocked']['mean']:.1%}".replace("%", " %")]
            if "kl_k3" in row
            else []
        )
        assert [cell.strip() for cell in rows[name].split("|") if cell.strip()] == scores + seen, name
    for name, model in found["models"].items():
        assert rows[f"({name})"].startswith(f"{model['sampled_percent']:.1f} | {model['greedy_percent']:.1f}")
    # what the sentences below the table say
    start, ends = found["models"]["start"], found["summary"]
    taught = ("distillation on samples", "dppo_tv", "stale ppo_clip", "stale dppo_tv")
    assert all(ends[name]["sampled_percent"]["low"] > start["sampled_percent"] for name in taught)
    assert all(ends[name]["greedy_percent"]["high"] < start["greedy_percent"] for name in taught)
    assert ends["stale policy_gradient"]["sampled_percent"]["high"] < start["sampled_percent"]
    assert ends["sft"]["greedy_percent"]["low"] > start["greedy_percent"]
    assert round(sum(run["cpu_seconds"] for runs in found["runs"].values() for run in runs)) == 381
    assert found["config"]["rounds"] == 20 and found["samples_per_run"] == 2560
