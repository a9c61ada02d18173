"""Two data sets whose noise people marked, as a small model sees them: the pages of docs/inspect.md.

    python scripts/measure_marked_rows.py --data ../shared/data --output runs/inspect

`gsm8k/model_solutions` (5,276 solutions by language models, 62 % marked wrong) and `halueval_general` (4,507 answers, 18 %
marked as hallucinated, with spans). The base is `tinystories-656k`, which has read children's stories alone; the second
model of each page is the same one after a short training on clean rows of the same kind (`gsm8k/train`, `dolly_3k`). Both
are far too small to know the facts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from qtarget import QTargetConfig, QTargetTrainer
from qtarget.benchmarks.marked_data import MARKED_DATA, load_story_tokenizer
from qtarget.cli.main import run

START = "<|start_story|>"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/inspect"))
    parser.add_argument("--limit", type=int, help="first so many rows of each; default: all")
    parser.add_argument(
        "--steps", type=int, default=100, help="of the second model's training, 8 rows each; 0: no second model"
    )
    parser.add_argument("--page-megabytes", type=float, default=2.9)
    options = parser.parse_args()
    torch.manual_seed(0)
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
