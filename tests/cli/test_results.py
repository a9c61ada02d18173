"""What plain transformers does with saved runs, checkpoints, adapters and merged folders, and docs/results.md, run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from qtarget.data.embedded import base_model_path, load_demonstrations
from tests import ROOT
from tests.cli.test_train import qtarget, refused

TEMPLATE = (
    "{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] + '<|end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
)
MOST = 40


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """A base that knows ``<|end|>``, and runs on chats that end with it: `full` with checkpoints, `lora`, `lora-merged`."""
    folder = tmp_path_factory.mktemp("results")
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    model = AutoModelForCausalLM.from_pretrained(base_model_path())
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "chat.jinja").write_text(TEMPLATE)
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in load_demonstrations("train")[:400]
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(folder / "base"), "train_file": str(folder / "chats.jsonl"),
        "chat_template_path": str(folder / "chat.jinja"), "output_dir": str(folder / "full"), "max_steps": 40,
        "learning_rate": 0.003, "per_device_train_batch_size": 16, "save_strategy": "steps", "save_steps": 20,
        "logging_steps": 10, "report_to": "none", "bf16": False, "use_cpu": True, "activation_checkpointing": False,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    qtarget("train", folder / "run.yaml")
    # a base that knows the token, and whose generation config does not: LoRA hardly learns a new one
    left = shutil.ignore_patterns("checkpoint-*", "qtarget_*", ".qtarget")
    shutil.copytree(folder / "full", folder / "known", ignore=left)
    shutil.copy(base_model_path() / "generation_config.json", folder / "known")
    lora = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "[q_proj, v_proj]", "--save_strategy", "no")
    more = ("--model_name_or_path", folder / "known", "--learning_rate", "0.005", "--max_steps", "8")
    qtarget("train", folder / "run.yaml", "--output_dir", folder / "lora", *lora, *more)
    qtarget("merge", folder / "lora")
    return folder


def ids_said(folder: Path, **settings) -> list[int]:
    """New tokens of plain transformers for one chat, with nothing but what the folder says."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": load_demonstrations("test")[0]["prompt"]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=MOST, do_sample=False, **settings)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["full", "full/checkpoint-40", "lora-merged"])
def test_a_saved_model_stops_at_the_end_of_its_turn(chats, name):
    folder = chats / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    said = ids_said(folder)
    assert said[-1] == end and len(said) < MOST and end not in said[:-1]
    generator = pipeline("text-generation", model=str(folder))
    chat = [{"role": "user", "content": load_demonstrations("test")[1]["prompt"]}]
    (answer,) = generator(chat, max_new_tokens=MOST, return_full_text=False)
    assert "user:" not in answer["generated_text"]  # it goes on with a turn of the user where it does not stop


@pytest.mark.parametrize("name", ["full", "full/checkpoint-40", "lora-merged"])
def test_a_saved_folder_has_what_servers_read(chats, name):
    folder = chats / name
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] == 513
    generation = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert set(generation.eos_token_id) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    assert generation.pad_token_id == tokenizer.pad_token_id == config["pad_token_id"]
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE and (folder / "tokenizer.json").is_file()
    with (
        safe_open(folder / "model.safetensors", "pt") as stored,
        safe_open(chats / "base/model.safetensors", "pt") as base,
    ):
        assert set(stored.keys()) == set(base.keys())


def test_an_adapter_says_where_it_ends(chats, capsys):
    end = AutoTokenizer.from_pretrained(chats / "lora").convert_tokens_to_ids("<|end|>")
    assert end in ids_said(chats / "lora")[:-1]  # transformers takes the base's generation config, and goes on
    said = ids_said(chats / "lora", generation_config=GenerationConfig.from_pretrained(chats / "lora"))
    assert said[-1] == end and said == ids_said(chats / "lora-merged")
    warnings = json.loads((chats / "lora/train_summary.json").read_text())["warnings"]
    assert any("rows end with '<|end|>'" in line and "qtarget merge" in line for line in warnings)


def test_merged_it_is_evaluated_as_the_adapter_is(chats, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in load_demonstrations("test")[:8]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "e.json"
    qtarget("evaluate", chats / "lora", chats / "lora-merged", "--data", tmp_path / "rows.jsonl", "--output", output)
    base, lora, merged = json.loads(output.read_text())["contenders"]
    assert lora["base"] == merged["base"] == base["name"] == "known"
    assert lora["sets"]["data"]["nll"]["mean"] == pytest.approx(merged["sets"]["data"]["nll"]["mean"], abs=1e-4)
    assert lora["sets"]["data"]["completion"] == merged["sets"]["data"]["completion"]


def test_what_merge_refuses(chats, tmp_path, capsys):
    assert "is no adapter: its weights are whole" in refused(capsys, "merge", chats / "full")
    assert "is not empty; choose a new folder" in " ".join(refused(capsys, "merge", chats / "lora").split())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert "holds what qtarget did not write" in refused(capsys, "merge", chats / "lora", "--output", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert "lies in" in refused(capsys, "merge", chats / "lora", "--output", chats / "lora/inside")
    assert "there is no folder" in refused(
        capsys, "merge", chats / "lora", "--base", "/nowhere", "--output", tmp_path / "a"
    )
    assert "there is no folder" in refused(capsys, "merge", chats / "laro")


def test_the_commands_and_the_python_of_the_page_run(tmp_path, monkeypatch, capsys):
    for part in ("examples", "src"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/results.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [command[1] for command in commands] == ["train", "train", "merge", "evaluate", "card"]
    quick = ["--max_steps", "6", "--eval_strategy", "no", "--eval_on_start", "false", "--save_strategy", "no"]
    for command in commands:
        extra = {"train": quick, "evaluate": ["--limit", "20"]}.get(command[1], [])
        qtarget(*command[1:], *extra)
    capsys.readouterr()
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) >= 2
    card = ModelCard.load("runs/live/sft/README.md")
    document = json.loads(Path("runs/live/evaluation.json").read_text())
    mine = next(one for one in document["contenders"] if one["name"] == "runs/live/sft")["sets"]["data"]
    assert f"{mine['nll']['mean']:.3f} ({mine['nll']['low']:.3f} .. {mine['nll']['high']:.3f})" in card.text
    values = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert values == {
        "nll": pytest.approx(mine["nll"]["mean"], abs=1e-6),
        document["sets"]["data"]["metric"]: pytest.approx(mine["completion"]["mean"], abs=1e-6),
    }
    assert document["finding"] in card.text


def test_the_table_of_a_comparison_goes_into_the_card(chats, capsys):
    line = {"name": "sft", "level": -1.25, "to_baseline": None}
    other = {"name": "dft", "level": -1.5, "to_baseline": {"mean": -0.25, "low": -0.3, "high": -0.2}}
    document = {
        "kind": "qtarget comparison", "finding": "sft is best", "baseline": "sft", "measure": {"seeds": 3},
        "sets": {"data": {"file": "own.jsonl", "rows": 1200, "metric": "nll"}},
        "base": {"level": -2.0, "to_baseline": {"mean": -0.75, "low": -0.8, "high": -0.7}}, "contenders": [line, other],
    }  # fmt: skip
    (chats / "full-compare").mkdir()
    (chats / "full-compare/comparison.json").write_text(json.dumps(document))
    qtarget("card", chats / "full", "--name", "me/mine")
    text = ModelCard.load(chats / "full/README.md").text
    assert "### Compared with other targets: own.jsonl, 1,200 rows, 3 seeds\n\nsft is best." in text
    assert "| **sft** | 1.250 |  |\n| dft | 1.500 | -0.250 (-0.300 .. -0.200) |" in text
    assert 'place = "me/mine"' in text
    (chats / "other.json").write_text("{}")
    assert "is no evaluation" in refused(capsys, "card", chats / "full", "--evaluation", chats / "other.json")
    assert "qtarget_run.json is missing" in refused(capsys, "card", chats / "base")
