"""A real instruct model through every door: `make real`. Needs the package with its weights; skipped without.

Rows are short and steps few: what is tested is that a real template, a real vocabulary, a pad token that is the end token, and
weights in bfloat16 on disk go through, not that the model learns.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from qtarget.benchmarks.real import model as real
from tests import ROOT

MISSING = "" if real.SMOLLM2.is_installed else f"not installed: {real.SMOLLM2.install}"
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

PLACES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
          "Norway": "Oslo", "Cuba": "Havana"}  # fmt: skip
SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
    "max_steps": 1, "per_device_train_batch_size": 2, "max_length": 96, "activation_checkpointing": False, "seed": 0,
}  # fmt: skip
PARAMETERS = real.SMOLLM2.parameters


def asked(country: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is the capital of {country}?"}]


ROWS = [
    {"prompt": asked(country), "completion": [{"role": "assistant", "content": f"{city}, of course."}]}
    for country, city in PLACES.items()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return real.prepared(tmp_path_factory.mktemp("real") / "smollm2")


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def loaded(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def frozen(folder):
    return loaded(folder).eval()


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def sft(folder: Path, output: Path, tokenizer, adapter=None, rows=ROWS, **settings):
    from qtarget import QTargetConfig, QTargetTrainer

    args = QTargetConfig(str(output), **{**SETTINGS, **settings})
    data = Dataset.from_list(rows)
    return QTargetTrainer(loaded(folder), args, None, data, data, tokenizer, peft_config=adapter)


def command(*arguments: object, folder: Path) -> list[str]:
    return [sys.executable, "-m", "qtarget.cli.main", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def qtarget(*arguments: object, folder: Path) -> str:
    """A verb in a process of its own, in this folder; what it printed."""
    done = subprocess.run(
        command(*arguments, folder=folder), cwd=folder, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def written(folder: Path, rows=ROWS) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- the model itself ------------------------------------------------------------------------------------------------


def test_the_folder_is_whole_and_made_once(folder, tokenizer):
    from qtarget.storage.models import check_whole

    check_whole("model", str(folder))
    config = json.loads((folder / "config.json").read_text())
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert (config["vocab_size"], config["num_hidden_layers"], config["dtype"]) == (49152, 30, "bfloat16")
    assert tokenizer.convert_ids_to_tokens(ends) == tokenizer.eos_token == "<|im_end|>"
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert real.prepared(folder) == folder and (folder / "model.safetensors").stat().st_mtime_ns == made


def test_weights_are_those_of_the_package_rounded_to_bfloat16(folder):
    """An independent reading of two tensors by the ``gguf`` package: one kept in float32, one packed in four bits."""
    from gguf import GGUFReader, dequantize

    packed = {tensor.name: tensor for tensor in GGUFReader(str(real.weights_files()[0])).tensors}
    saved = load_file(folder / "model.safetensors")
    for theirs, ours in (
        ("output_norm.weight", "model.norm.weight"),
        ("blk.3.ffn_up.weight", "model.layers.3.mlp.up_proj.weight"),
    ):
        plain = torch.from_numpy(dequantize(packed[theirs].data, packed[theirs].tensor_type).copy())
        assert torch.equal(plain.reshape(saved[ours].shape).to(torch.bfloat16), saved[ours]), ours


def test_the_head_is_plain(frozen):
    from qtarget.integrations.shared.heads import HeadSpec, probe_head

    assert probe_head(frozen) == HeadSpec()
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight


def test_answers_end_at_the_end_of_the_turn_and_padding_on_the_left_changes_none(frozen, tokenizer):
    from qtarget.evaluation.generation import complete, prompt_ids, rows_at_once

    prompts = [prompt_ids(tokenizer, asked(country)) for country in ("France", "the United Kingdom of Great Britain")]
    assert len(prompts[0]) != len(prompts[1]) and rows_at_once(frozen, tokenizer, 2) == 2
    ends = [tokenizer.eos_token_id]
    together = complete(frozen, tokenizer, prompts, max_new_tokens=24, stops=ends)
    alone = [complete(frozen, tokenizer, [prompt], max_new_tokens=24, stops=ends)[0] for prompt in prompts]
    assert together == alone
    assert together[0][0].stopped and "Paris" in together[0][0].text and "<|im_end|>" not in together[0][0].text


# -- steps of every trainer ------------------------------------------------------------------------------------------


def plain_loss(model, tokenizer, rows) -> float:
    """Mean NLL of the answers and of the mark behind them, by transformers alone: no collator, no trainer of ours."""
    total, count = 0.0, 0
    for row in rows:
        start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=True)["input_ids"]
        ids = torch.tensor([whole])
        labels = ids.masked_fill(torch.arange(len(whole)) < len(start), -100)
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * (len(whole) - len(start))
        count += len(whole) - len(start)
    return total / count


@pytest.mark.parametrize("adapter", [None, "lora"], ids=["all weights", "lora"])
def test_one_step_of_sft_begins_at_the_models_own_loss(folder, tokenizer, frozen, tmp_path, adapter):
    trainer = sft(folder, tmp_path, tokenizer, lora() if adapter else None, rows=ROWS[:2], learning_rate=1e-4)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["nll"] for entry in trainer.state.log_history if "nll" in entry]
    # the last token of a row is the line break behind <|im_end|>
    assert losses[0] == pytest.approx(plain_loss(frozen, tokenizer, ROWS[:2]), rel=1e-4)
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_B" in name} if adapter else len(changed) == len(before)


@pytest.mark.parametrize("adapter", [None, "lora"], ids=["all weights", "lora"])
def test_one_step_of_grpo(folder, tokenizer, tmp_path, adapter):
    from qtarget import QTargetGRPOConfig, QTargetGRPOTrainer

    settings = {key: value for key, value in SETTINGS.items() if key != "max_length"}
    args = QTargetGRPOConfig(
        str(tmp_path), **{**settings, "per_device_train_batch_size": 4}, num_generations=4, max_completion_length=12,
        learning_rate=1e-4, temperature=1.5,
    )  # fmt: skip

    def length(completions, **_):
        return [float(len(turns[-1]["content"])) for turns in completions]

    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS[:2]])
    trainer = QTargetGRPOTrainer(
        loaded(folder), length, args, rows, processing_class=tokenizer, peft_config=lora() if adapter else None
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_B" in name} if adapter else len(changed) == len(before)
    logged = trainer.state.log_history[0]
    assert logged["reward_std"] > 0 and logged["grad_norm"] > 0


def test_packed_rows_stay_apart(folder, tokenizer, tmp_path):
    losses = []
    for packing in (False, True):
        trainer = sft(folder, tmp_path / str(packing), tokenizer, packing=packing, eval_packing=packing, max_length=256)
        losses.append(trainer.evaluate()["eval_nll"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(folder, tmp_path_factory) -> Path:
    """A folder with rows and the config that `qtarget init` writes for them."""
    here = tmp_path_factory.mktemp("started")
    qtarget("init", written(here), "--model", folder, "--output", "run.yaml", "--validation", "0", folder=here)
    return here


def test_a_cache_has_the_size_that_was_announced_and_verifies(started):
    from qtarget.scoring.cache.schema import Manifest

    said = qtarget("score", "run.yaml", "--output", "cache", "--top-k", "16", folder=started)
    qtarget("cache", "verify", "cache", folder=started)
    manifest = Manifest.read(started / "cache")
    assert f"{manifest.tokens:,} supervised tokens" in said
    size = sum(path.stat().st_size for path in (started / "cache").iterdir() if path.is_file())
    assert f"{size / manifest.tokens:.1f} bytes a token" in said
    # 16 ids of 2 bytes, as 49,152 fit, and 16 float16; the label's own log-prob, entropy and tail; headers of few rows
    assert 16 * 4 / 2 < size / manifest.tokens < 16 * 4 + 400


def test_memory_is_what_init_says(started, folder):
    """Within half and twice: the estimate knows neither the allocator's holes nor the libraries themselves."""
    from qtarget.starting.choices import memory, row_length
    from qtarget.starting.model import size_of

    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    qtarget("train", "run.yaml", "--max_steps", "2", "--save_strategy", "no", "--output_dir", "memory", folder=started)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak > before * 1024, "another child was larger, and this one cannot be told"
    size = size_of(str(folder))
    assert size.parameters == PARAMETERS
    expected = memory(size, row_length([60], None), adapter=False, checkpointing=False, bf16=False)
    print(f"peak {peak / 1e9:.2f} GB, estimate {expected / 1e9:.2f} GB")
    assert 0.5 < peak / expected < 2


def test_killed_and_resumed_is_the_undisturbed_run(started):
    """SIGKILL behind the second checkpoint; adapters, so that a checkpoint is small."""
    options = ("train", "run.yaml", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1", "--use_peft",
               "true", "--lora_target_modules", "all-linear", "--learning_rate", "1e-3")  # fmt: skip
    qtarget(*options, "--output_dir", "whole", folder=started)
    process = subprocess.Popen(
        command(*options, "--output_dir", "cut", folder=started), cwd=started, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (started / "cut/checkpoint-2/qtarget_complete").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    qtarget(*options, "--output_dir", "cut", "--resume", "true", folder=started)
    whole, cut = (load_file(started / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_merged_adapter_answers_as_the_adapter_does(started, tokenizer, folder):
    from peft import PeftModel

    qtarget(
        "train", "run.yaml", "--max_steps", "2", "--use_peft", "true", "--lora_target_modules", "all-linear",
        "--learning_rate", "1e-3", "--output_dir", "adapter", folder=started,
    )  # fmt: skip
    qtarget("merge", "adapter", "--output", "merged", folder=started)
    ids = torch.tensor(
        [tokenizer.apply_chat_template(asked("France"), add_generation_prompt=True, return_dict=True)["input_ids"]]
    )
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(loaded(folder), started / "adapter")(input_ids=ids).logits
        merged = loaded(started / "merged")(input_ids=ids).logits
        plain = loaded(folder)(input_ids=ids).logits
    moved = (adapted - plain).abs().max()
    # a merged model is saved in the base's bfloat16, which is coarser than the adapter
    assert (adapted - merged).abs().max() < moved


def test_rewards_and_a_teacher_go_on_from_a_taught_start_and_where_they_stopped(folder, tmp_path):
    """`bench rl --quick`: four models, sampled and greedy; a finished one is not made again."""
    options = ("bench", "rl", "--quick", "--base", folder, "--output", "rl.json")
    qtarget(*options, folder=tmp_path)
    whole, log = json.loads((tmp_path / "rl.json").read_text()), (tmp_path / "rl.runs.jsonl").read_text().splitlines()
    assert list(whole["models"]) == ["start", "teacher", "dppo_tv", "distillation on samples"]
    for name, model in whole["models"].items():
        assert len(model["sampled"]) == len(model["greedy"]) == 2 and len(model["log"]) == 1, name
    rewarded, distilled = whole["models"]["dppo_tv"]["log"][0], whole["models"]["distillation on samples"]["log"][0]
    assert rewarded["kl/start"] == pytest.approx(0, abs=1e-5) and "reward" not in distilled and distilled["loss"] > 0
    (tmp_path / "rl.runs.jsonl").write_text("\n".join(log[:3]) + "\n")
    qtarget(*options, "--resume", folder=tmp_path)  # asks the last model again, and trains nothing
    again = json.loads((tmp_path / "rl.json").read_text())
    assert again["summary"] == whole["summary"] and "log" not in again["models"]["distillation on samples"]
