"""Data sets whose noise people marked, as a model sees them: the pages of docs/inspect.md, and the areas under ROC curves.

    python scripts/measure_marked_rows.py --data ../shared/data --output runs/inspect
    python scripts/measure_marked_rows.py --data ../shared/data --output runs/inspect_smollm2 --base runs/smollm2

`gsm8k/model_solutions` (5,276 solutions by language models, 62 % marked wrong) and `halueval_general` (4,507 answers, 18 %
marked as hallucinated, with spans). Without `--base` the base is `tinystories-656k`, which has read children's stories alone;
the second model of each page is the same one after a short training on clean rows of the same kind (`gsm8k/train`,
`dolly_3k`). Both are far too small to know the facts.

With `--base`, the folder of `qtarget bench base`, it is SmolLM2-135M-Instruct on a few hundred rows of each in its chat
template, and of `dolly_3k` with the answers of some rows exchanged by us. What is scored already is not scored again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtarget import QTargetConfig, QTargetTrainer
from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.marked_data import MARKED_DATA, load_story_tokenizer
from qtarget.benchmarks.real.worker import as_turn
from qtarget.cli.main import run
from qtarget.data.agreement import agreement
from qtarget.data.noise import inject_noise
from qtarget.data.roc import roc_auc

START = "<|start_story|>"
ROWS = {"gsm8k_model_solutions": 200, "halueval_general": 300, "dolly_other_responses": 200}
"""Of each, for a real model: 20 minutes of one core in all."""
CROSSFITTED = ("gsm8k_model_solutions",)
"""Data that two copies judge, too, each trained once over half of the rows."""
LENGTH, BATCH, OTHERS, RESAMPLES = 320, 4, 0.2, 1000
"""Tokens of a row, rows of a step of a copy, the share of dolly's rows that get another row's answer, and bootstrap draws."""
TARGETS = "sft,prior_surprise,dft,consensus"
PAGE_MEGABYTES = 0.9


def clean_rows(data: Path, name: str, count: int) -> list[dict[str, str]]:
    """Rows of the same kind that nobody marked: worked GSM8K answers in the solutions' format, human answers of Dolly."""
    if name == "gsm8k_model_solutions":
        lines = gzip.decompress((data / "gsm8k/train.jsonl.gz").read_bytes()).decode().splitlines()
        pairs = [(r["question"], r["answer"].replace("####", "A:")) for r in map(json.loads, lines[:count])]
    else:
        rows = json.loads(gzip.decompress((data / "dolly_3k/dolly_3k.json.gz").read_bytes()))
        pairs = [(f"{r['instruction']} {r['input']}".strip(), r["output"]) for r in rows[:count]]
    return [{"prompt": f"{START}{question}\n", "completion": answer} for question, answer in pairs]


def prepare(data: Path, name: str, output: Path, limit: int | None, steps: int) -> Path:
    """Rows, base, the model that has read clean rows, the cache and the config of one data set."""
    output.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "prompt": START + row["prompt"]} for row in MARKED_DATA[name](data)[:limit]]
    (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = data / "models/tinystories-656k"
    tokenizer = load_story_tokenizer(source)
    base, clean = output / "tinystories-656k", output / "after-clean-rows"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(base)
    tokenizer.save_pretrained(base)
    if steps:
        train_on_clean_rows(base, clean, clean_rows(data, name, 8 * steps), tokenizer, steps)
    settings = {
        "model_name_or_path": "tinystories-656k", "train_file": f"{name}.jsonl", "reference_cache": str(output / "cache"),
        "output_dir": str(output / "out"), "max_length": 512, "bf16": False, "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    (output / "run.yaml").write_text(yaml.safe_dump(settings))
    return output / "run.yaml"


def train_on_clean_rows(base: Path, output: Path, rows: list[dict[str, str]], tokenizer, steps: int) -> None:
    """A short plain fine-tuning, batches of 8 rows."""
    training = QTargetConfig(
        output_dir=str(output), max_length=256, per_device_train_batch_size=8, learning_rate=1e-3,
        lr_scheduler_type="cosine", warmup_steps=5, max_steps=steps, save_strategy="no", report_to=[], disable_tqdm=True,
        bf16=False, use_cpu=True, activation_checkpointing=False, seed=0,
    )  # fmt: skip
    trainer = QTargetTrainer(str(base), training, None, Dataset.from_list(rows), None, tokenizer)
    trainer.train()
    trainer.save_model(str(output))


def command(*arguments: object) -> None:
    """One verb of ``qtarget``; stops here if it fails."""
    try:
        run([str(argument) for argument in arguments])
    except SystemExit as stopped:
        if stopped.code:
            raise


def real_rows(data: Path, name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The first rows of a data set, each question a turn in the model's own template."""
    rows = dolly_rows(data) if name == "dolly_other_responses" else MARKED_DATA[name](data)
    return [{**row, "prompt": as_turn(row["prompt"].strip(), tokenizer)} for row in rows[: ROWS[name]]]


def dolly_rows(data: Path) -> list[dict[str, Any]]:
    """Short human answers, some of them to another row's question; the marks are ours, not people's."""
    rows = json.loads(gzip.decompress((data / "dolly_3k/dolly_3k.json.gz").read_bytes()))
    short = [row for row in rows if not row["input"] and len(row["output"]) <= 300]
    kept = [
        {"prompt": row["instruction"], "completion": row["output"], "source": row["category"]}
        for row in short[: ROWS["dolly_other_responses"]]
    ]
    return [
        {**row, "is_noise": bool(row["noise_spans"])}
        for row in inject_noise(kept, kind="other_response", rate=OTHERS, seed=0)
    ]


def measure_real(name: str, rows: list[dict[str, Any]], base: Path, tokenizer: Any, folder: Path, page: Path) -> dict:
    """Score, let copies judge, audit and inspect through the command line; areas from what the page says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin, cross = time.process_time(), len(rows) // (2 * BATCH) if name in CROSSFITTED else None
    settings = {
        "model_name_or_path": str(base.absolute()), "train_file": f"{name}.jsonl", "reference_cache": str(folder / "cache"),
        "output_dir": str(folder / "out"), "max_length": LENGTH, "per_device_train_batch_size": BATCH, "bf16": False,
        "use_cpu": True, "activation_checkpointing": False, "report_to": "none",
    } | ({"witness": str(folder / "witness")} if cross else {})  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    command("score", folder / "run.yaml", "--top_k", 20)
    if cross:
        once = ("--crossfit-steps", cross, "--no-crossfit-prompts")
        command("score", folder / "run.yaml", "--crossfit", 2, *once)
    command("audit-data", folder / "run.yaml", "--json", folder / "audit.json")
    targets = TARGETS + (",crossfit_consensus" if cross else "")
    numbers, whole = folder / "page.json", folder / "whole.html"
    shown = ("--targets", targets, "--mark", "is_noise=true", "--title", f"{name}: as SmolLM2-135M-Instruct reads it")
    command("inspect", folder / "run.yaml", *shown, "--output", whole, "--json", numbers)
    command("inspect", folder / "run.yaml", *shown, "--page_megabytes", PAGE_MEGABYTES, "--output", page)
    return {
        **summary(json.loads(numbers.read_text()), rows), "crossfit_steps": cross,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }  # fmt: skip


def summary(document: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Areas of every score against the marks, from the JSON of ``inspect``."""
    scores, questions = row_scores(document), [row["prompt"] for row in rows]
    return {
        "rows": len(rows), "marked_rows": sum(row["is_noise"] for row in rows),
        "tokens": document["views"][0]["tokens"], "nll_mean": document["views"][0]["nll_mean"],
        "by_row": areas(scores, document["row_marked"], questions),
        "within_questions": within_questions(scores, document["row_marked"], questions),
        "by_token": {s["score"]: s["auc"] for s in document["views"][0]["marks"].get("by_token", [])},
    }  # fmt: skip


def row_scores(document: dict[str, Any]) -> dict[str, np.ndarray]:
    """``[rows]`` of each score that should be high where a row is wrong, from the JSON of ``inspect``."""
    view, rows = document["views"][0], document["rows"]
    assert [row["row"] for row in rows] == document["row_numbers"], "the page left rows out; raise --page_megabytes"
    trained = [np.isin(np.arange(len(row["ids"])), row["trained"]).tolist() for row in rows]
    agreed = agreement([row["ids"] for row in rows], trained)
    scores = {"mean surprise": view["row_nll"], "mean low agreement": [-values.mean() for values in agreed]}
    if view["row_crossfit"] is not None:
        scores["mean surprise of copies that have not seen the question"] = view["row_crossfit"]
        gained = np.array(view["row_crossfit"]) - np.array(view["row_nll"])
        scores["surprise of copies less that of the base"] = gained
    for target, weights in zip(document["targets"], view["row_weight"], strict=True):
        if np.ptp(weights) > 0:
            scores[f"mean low weight under {target}"] = -np.array(weights)
    scores["trained tokens"] = document["row_trained"]
    return {name: np.array(values, dtype=np.float64) for name, values in scores.items()}


def areas(scores: dict[str, np.ndarray], marked: Sequence[bool], questions: Sequence[str]) -> dict[str, list[float]]:
    """Area of each score, and the ends of its 95 % interval: whole questions are drawn again, not rows."""
    marks, number = np.array(marked), {text: i for i, text in enumerate(dict.fromkeys(questions))}
    members = [np.flatnonzero(np.array([number[text] for text in questions]) == i) for i in range(len(number))]
    random, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn.append(np.concatenate([members[i] for i in random.integers(0, len(members), len(members))]))
    out = {}
    for name, values in scores.items():
        found = [area for rows in drawn if (area := roc_auc(values[rows], marks[rows])) is not None]
        area = roc_auc(values, marks)
        assert area is not None, "some rows are marked and some are not"
        out[name] = [round(float(x), 4) for x in (area, *np.percentile(found, [2.5, 97.5]))]
    return out


def within_questions(
    scores: dict[str, np.ndarray], marked: Sequence[bool], questions: Sequence[str]
) -> dict[str, list[float]] | None:
    """Of pairs of a wrong and a right answer to one question, the share in which the wrong one scores higher; and the pairs."""
    pairs = [
        (i, j)
        for i, j in permutations(range(len(marked)), 2)
        if marked[i] and not marked[j] and questions[i] == questions[j]
    ]
    if not pairs:
        return None
    wrong, right = np.array(pairs).T
    return {
        name: [round(float(((v[wrong] > v[right]) + 0.5 * (v[wrong] == v[right])).mean()), 4), len(pairs)]
        for name, v in scores.items()
    }


def real_results(options: argparse.Namespace) -> dict[str, Any]:
    """All data sets under the model of ``--base``."""
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    results: dict[str, Any] = {
        "command": "python scripts/measure_marked_rows.py --base runs/smollm2",
        "base": "SmolLM2-135M-Instruct, four-bit weights (Q4_1)", "max_length": LENGTH, "resamples": RESAMPLES,
        "data": {}, "machine": machine_facts(), "versions": versions(),
    }  # fmt: skip
    for name in ROWS:
        rows = real_rows(options.data, name, tokenizer)[: options.limit]
        page = options.output / f"{name}.html"
        results["data"][name] = measure_real(name, rows, options.base, tokenizer, options.output / name, page)
        (options.output / "auc.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/inspect"))
    parser.add_argument("--limit", type=int, help="first so many rows of each; default: all")
    parser.add_argument(
        "--steps", type=int, default=100, help="of the second model's training, 8 rows each; 0: no second model"
    )
    parser.add_argument("--page-megabytes", type=float, default=2.9)
    parser.add_argument("--base", type=Path, help="the folder of `qtarget bench base`; default: tinystories-656k")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.base is not None:
        print(json.dumps(real_results(options), indent=1))
        return
    results = {}
    for name in MARKED_DATA:
        folder = options.output / name
        shutil.rmtree(folder, ignore_errors=True)
        config = prepare(options.data, name, folder, options.limit, options.steps)
        command("score", config, "--top_k", 20)
        second = ("--checkpoints", folder / "after-clean-rows") if options.steps else ()
        page, numbers = options.output / f"{name}.html", folder / "page.json"
        command(
            "inspect", config, "--rows", 10_000, "--targets", "sft,prior_surprise,dft", *second, "--mark", "is_noise=true",
            "--title", f"{name}: what a tiny story model makes of it", "--page_megabytes", options.page_megabytes,
            "--output", page, "--json", numbers,
        )  # fmt: skip
        document = json.loads(numbers.read_text())
        results[name] = {
            "rows": len(document["row_numbers"]),
            "views": [
                {
                    "model": view["model"], "tokens": view["tokens"], "nll_mean": view["nll_mean"],
                    "marked_rows": view["marks"]["marked_rows"],
                    **{
                        part: {score["score"]: [score["auc"], score.get("interval")] for score in view["marks"].get(part, [])}
                        for part in ("by_row", "by_token")
                    },
                }
                for view in document["views"]
            ],
        }  # fmt: skip
    steps = f"python scripts/measure_marked_rows.py --steps {options.steps}"
    text = json.dumps(
        {"command": steps + (f" --limit {options.limit}" if options.limit else ""), "data": results}, indent=1
    )
    (options.output / "auc.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
