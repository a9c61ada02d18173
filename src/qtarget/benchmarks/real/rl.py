"""`qtarget bench rl`: SmolLM2-135M with adapters on samples of its own, by rewards and by a fine-tuned copy, in chat form.

Four models from the package's: a start and a teacher, both taught on demonstrations, and the start after rewards and after
distillation on its own samples. Through the public trainers, as a user would.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.pool import Progress, RunLog, check_settings, one_thread, quiet_libraries, save_results
from qtarget.benchmarks.real.demonstrations import question_of
from qtarget.benchmarks.real.worker import adapters
from qtarget.benchmarks.sampling import NEW_TOKENS, right_answers
from qtarget.benchmarks.start import claim
from qtarget.benchmarks.tables import markdown_table, rounded_interval, with_ends
from qtarget.benchmarks.tasks import Row, embedded_tasks, generated_demonstrations
from qtarget.data import tasks
from qtarget.evaluation.generation import GREEDY, Decoding, prompt_ids
from qtarget.storage.files import write_json
from qtarget.storage.folders import whole_folder

START, TEACHER, RL, OPD = "start", "teacher", "dppo_tv", "distillation on samples"
TAUGHT, SAMPLED = (START, TEACHER), (RL, OPD)
SCORES = ("sampled", "greedy")
SHOWN = ("reward", "kl/start", "entropy", "region/blocked", "completions/mean_length", "loss")
"""Of the training log, kept line by line."""
AT_ONCE = 16
"""Prompts that are answered together: a vocabulary of 49,152 is wide."""
TRAINED = "trained.json"
"""In a model's folder: how its training went, for a call that goes on from there."""


@dataclass(frozen=True)
class RealRLConfig:
    """The defaults are about half an hour of two cores.

    Attributes:
        start_steps, teacher_steps: supervised steps of 16 rows; the teacher goes on from the start.
        steps: of sampling and learning, one update each.
        prompts, samples: of a step, and of each prompt.
        test_rows, draws: held-out prompts, and samples of each at temperature 1.
        sft_rate, rl_rate, opd_rate: learning rates of the adapters; not tuned.
        seed: of adapters, order and draws.
    """

    start_steps: int = 20
    teacher_steps: int = 60
    steps: int = 24
    prompts: int = 8
    samples: int = 8
    test_rows: int = 150
    draws: int = 4
    sft_rate: float = 1e-3
    rl_rate: float = 2e-4
    opd_rate: float = 5e-4
    rank: int = 16
    seed: int = 0


SHORT = RealRLConfig(start_steps=16, teacher_steps=24, steps=8, samples=4, test_rows=60, draws=2)
"""A quarter of an hour of one core."""
QUICK = RealRLConfig(start_steps=1, teacher_steps=1, steps=1, prompts=1, samples=2, test_rows=2, draws=1)
"""A minute: enough to see that it runs."""
SIZES = {"full": RealRLConfig(), "short": SHORT, "quick": QUICK}


def run_real_rl(config: RealRLConfig, base: Path, output: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Train and ask the four models, one by one; results are saved after each.

    Args:
        base: the folder of `qtarget bench base`.
        output: JSON; what is finished stands beside it in ``.runs.jsonl``, the models in ``.models``.
        resume: go on with what is finished there.
        progress: called with models done, models in all, and what was done last.

    Raises:
        ConfigError: results or models are there that were made with other settings.
    """
    check_settings(output, resume, asdict(config))
    log, models = RunLog(output.with_suffix(".runs.jsonl"), resume), output.with_suffix(".models")
    claim(models, {"base": str(base.resolve()), **asdict(config)})  # a stopped run may have left models and no results
    results: dict[str, Any] = {
        "benchmark": "rl --base smollm2", "config": asdict(config), "models": {}, "machine": machine_facts(),
        "versions": versions(),
    }  # fmt: skip
    with quiet_libraries(), one_thread():
        for done, name in enumerate((*TAUGHT, *SAMPLED), 1):
            if name not in log.runs:
                log.add(name, made(config, name, base, models))
            results["models"][name] = log.runs[name]
            results["summary"] = summarize(results["models"], config.draws)
            save_results(output, results)
            progress(done, len(TAUGHT) + len(SAMPLED), name)
    return results


def made(config: RealRLConfig, name: str, base: Path, models: Path) -> dict[str, Any]:
    """Train one model into a folder of ``models``, unless it is there, and ask it; CPU seconds are of whoever did it."""
    folder = models / name.replace(" ", "_")
    if not folder.is_dir():
        begin = time.process_time()
        scratch = models / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        train = taught if name in TAUGHT else sampled
        trainer = train(config, name, models / START if name != START else base, models, scratch)
        trainer.train()
        log = trainer.state.log_history
        found: dict[str, Any] = {
            "log": [{key: line[key] for key in SHOWN if key in line} for line in log if "loss" in line]
        }
        with whole_folder(folder) as beside:
            trainer.model.merge_and_unload().save_pretrained(beside)
            trainer.processing_class.save_pretrained(beside)
            found["train_cpu_seconds"] = round(time.process_time() - begin, 1)
            write_json(beside / TRAINED, found)
        shutil.rmtree(scratch, ignore_errors=True)
    begin = time.process_time()
    scores = asked(config, folder, base)
    trained = json.loads((folder / TRAINED).read_text(encoding="utf-8"))
    return {**scores, **trained, "test_cpu_seconds": round(time.process_time() - begin, 1)}


def in_turns(row: Row) -> dict[str, Any]:
    """A demonstration as a chat: the question is a user's turn.

    Example:
        >>> in_turns({"prompt": "Instruction: Add 1 1.\\nResponse:\\n", "completion": "[2]", "answer": "2"})["answer"]
        '2'
    """
    return {
        "prompt": [{"role": "user", "content": question_of(row)}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
        "answer": row["answer"],
    }


def fresh_rows(count: int, seed: str) -> list[dict[str, Any]]:
    """Demonstrations of training problems in chat form, none of which is held out."""
    held_out = {row["prompt"] for row in embedded_tasks().test}
    return [in_turns(row) for row in generated_demonstrations(count, f"real {seed}", held_out)]


def right(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for exactly one bracketed answer that is right; completions are lists of messages."""
    texts = [turns[-1]["content"] for turns in completions]
    return [float(tasks.check({"answer": one}, text)) for text, one in zip(texts, answer, strict=True)]


def common(config: RealRLConfig, steps: int, rate: float) -> dict[str, Any]:
    """Settings of all four trainings."""
    return {
        "max_steps": steps, "learning_rate": rate, "lr_scheduler_type": "constant", "logging_steps": 1, "bf16": False,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": config.seed,
    }  # fmt: skip


def taught(config: RealRLConfig, name: str, model: Path, models: Path, scratch: Path) -> Any:
    """The trainer of start or teacher, on clean demonstrations."""
    from datasets import Dataset

    from qtarget.integrations.sft.config import QTargetConfig
    from qtarget.integrations.sft.trainer import QTargetTrainer

    steps = {START: config.start_steps, TEACHER: config.teacher_steps}[name]
    rows = fresh_rows(16 * steps, f"{name} {config.seed}")
    args = QTargetConfig(
        str(scratch), target="sft", per_device_train_batch_size=16, max_length=256, activation_checkpointing=False,
        **common(config, steps, config.sft_rate),
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    return QTargetTrainer(str(model), args, None, data, peft_config=adapters(config.rank, "CAUSAL_LM"))


def sampled(config: RealRLConfig, name: str, model: Path, models: Path, scratch: Path) -> Any:
    """The trainer that goes on from the start with rewards, or with the teacher."""
    from datasets import Dataset

    from qtarget.integrations.rl.config import QTargetGRPOConfig
    from qtarget.integrations.rl.trainer import QTargetGRPOTrainer

    rows = fresh_rows(config.steps * config.prompts, f"samples {config.seed}")
    data = Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows])
    rewarded: dict[str, Any] = {"trust_region": "dppo_tv"}
    by_teacher = {"trust_region": None, "target": "reverse_kl", "teacher_model_name_or_path": str(models / TEACHER)}
    args = QTargetGRPOConfig(
        str(scratch), per_device_train_batch_size=config.prompts * config.samples, num_generations=config.samples,
        max_completion_length=NEW_TOKENS, **(rewarded if name == RL else by_teacher),
        **common(config, config.steps, config.rl_rate if name == RL else config.opd_rate),
    )  # fmt: skip
    return QTargetGRPOTrainer(
        str(model), right if name == RL else None, args, data, peft_config=adapters(config.rank, "CAUSAL_LM")
    )


def asked(config: RealRLConfig, folder: Path, base: Path) -> dict[str, list[int]]:
    """Right answers to each held-out prompt: of those drawn at temperature 1, and of the likeliest tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    rows = embedded_tasks().test[: config.test_rows]
    ids = [prompt_ids(tokenizer, in_turns(row)["prompt"]) for row in rows]
    ways = (Decoding(1.0, config.draws, config.seed), GREEDY)
    return {
        score: right_answers(model.eval(), tokenizer, rows, decoding, ids, AT_ONCE)
        for score, decoding in zip(SCORES, ways, strict=True)
    }


def summarize(models: Mapping[str, Mapping[str, Any]], draws: int) -> dict[str, Any]:
    """Per model: percent of right answers, sampled and greedy, and the paired difference to the start.

    Intervals are over held-out prompts; there is one seed, and how far another would be off is not in them.
    """
    percent = {
        name: {score: np.array(one[score]) * 100 / (draws if score == "sampled" else 1) for score in SCORES}
        for name, one in models.items()
    }
    out: dict[str, Any] = {}
    for name, scores in percent.items():
        out[name] = {score: rounded_interval(values[None], 1) for score, values in scores.items()}
        if name != START:
            gains = {score: scores[score] - percent[START][score] for score in SCORES}
            out[name] |= {f"{score}_to_start": rounded_interval(gain[None], 1) for score, gain in gains.items()}
    return out


def real_rl_table(results: Mapping[str, Any]) -> str:
    """A line a model."""
    lines = []
    for name, one in results["summary"].items():
        gains = [one.get(f"{score}_to_start") for score in SCORES]
        lines.append(
            [
                name,
                *(with_ends(one[score], ends=".1f") for score in SCORES),
                *("" if gain is None else with_ends(gain, "+.1f", "+.1f") for gain in gains),
            ]
        )
    head = ["model", *(f"{score}, %" for score in SCORES), *(f"{score}, to start" for score in SCORES)]
    return markdown_table(head, lines)
