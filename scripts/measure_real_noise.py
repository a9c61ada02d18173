"""Real text, a real tiny model, real noise: five targets on the same rows, held-out NLL on clean ones.

    python scripts/measure_real_noise.py --data ../shared/data --output runs/real

Two data sets: `dolly_3k` (human answers) and `gsm8k/model_solutions` (answers by language models, 62 % marked wrong; the
marks split the training rows in the report, never the training). The base is scored once; the teacher of target_sft is a
copy of the base trained further on clean rows, and is scored once as well.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import shutil
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM

import qtarget
from qtarget import QTargetConfig, QTargetTrainer
from qtarget.benchmarks.marked_data import SOLVERS, load_story_tokenizer
from qtarget.integrations.sft.score import score
from qtarget.integrations.shared.checkpoints import last_complete_checkpoint

TARGETS = ("sft", "prior_surprise", "dft", "asft", "target_sft")


def read(path: Path) -> list[dict]:
    """Rows of a gzipped JSON array or of JSON lines."""
    text = gzip.decompress(path.read_bytes()).decode()
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


def row(question: str, answer: str, **marks) -> dict:
    return {"prompt": f"<|start_story|>{question}\n", "completion": answer, **marks}


def dolly(data: Path, count: int) -> dict[str, list[dict]]:
    """Training rows, rows for the teacher, and held-out rows; all human answers."""
    rows = [
        row(f"{r['instruction']} {r['input']}".strip(), r["output"]) for r in read(data / "dolly_3k/dolly_3k.json.gz")
    ]
    return {"train": rows[:count], "teacher": rows[count : 2 * count], "clean": rows[-200:]}


def gsm8k(data: Path, count: int) -> dict[str, list[dict]]:
    """Model-written solutions with their marks; teacher rows and held-out rows are the clean ones, of other questions."""
    questions = read(data / "gsm8k/model_solutions.jsonl.gz")
    noisy = [
        row(q["question"], q[solver]["solution"], is_correct=q[solver]["is_correct"])
        for q in questions[:-200]
        for solver in SOLVERS
    ]
    teacher = [row(r["question"], r["answer"].replace("####", "A:")) for r in read(data / "gsm8k/train.jsonl.gz")]
    return {
        "train": noisy[:count],
        "teacher": teacher[:count],
        "clean": [row(q["question"], q["ground_truth"]) for q in questions[-200:]],
    }


def settings(output: Path, **changes) -> dict:
    """One budget for every target."""
    return {
        "output_dir": str(output),
        "max_length": 192,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "logging_steps": 10,
        "save_strategy": "steps",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "seed": 0,
        **changes,
    }


def run(name: str, rows: dict[str, list[dict]], model_path: Path, output: Path, steps: int) -> dict:
    """Score, train every target, evaluate; one of the runs is stopped half-way and resumed."""
    tokenizer = load_story_tokenizer(model_path)
    data = {split: Dataset.from_list(part) for split, part in rows.items()}

    def base():
        return AutoModelForCausalLM.from_pretrained(model_path)

    started = time.perf_counter()
    plain = QTargetConfig(**settings(output / "score"))
    caches = {"reference": output / "base-cache", "teacher": output / "teacher-cache"}
    manifest = score(base(), plain, data["train"], data["clean"], tokenizer, directory=caches["reference"], top_k=32)
    teaching = QTargetConfig(**settings(output / "teacher", max_steps=2 * steps, save_strategy="no"))
    teacher = QTargetTrainer(base(), teaching, None, data["teacher"], data["clean"], tokenizer)
    teacher.train()
    score(teacher.model, plain, data["train"], data["clean"], tokenizer, directory=caches["teacher"], top_k=32)

    untrained = QTargetTrainer(base(), plain, None, data["train"], data["clean"], tokenizer)
    nll = {"untrained": untrained.evaluate()["eval_nll"], "teacher": teacher.evaluate()["eval_nll"]}
    for target in TARGETS:
        folder = output / target
        args = settings(folder, target=target, max_steps=steps, save_steps=steps // 2)
        args |= {f"{role}_cache": str(cache) for role, cache in caches.items()}
        trainer = QTargetTrainer(base(), QTargetConfig(**args), None, data["train"], data["clean"], tokenizer)
        if target == TARGETS[-1]:  # as after a power cut: forget the second half, start a new trainer, go on
            trainer.train()
            shutil.rmtree(folder / f"checkpoint-{steps}")
            trainer = QTargetTrainer(base(), QTargetConfig(**args), None, data["train"], data["clean"], tokenizer)
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        else:
            trainer.train()
        nll[target] = trainer.evaluate()["eval_nll"]
    return {
        "data": name,
        "rows": {split: len(part) for split, part in rows.items()},
        "marked_wrong": sum(not r.get("is_correct", True) for r in rows["train"]),
        "steps": steps,
        "base_cache_bytes_a_token": sum(f.stat().st_size for f in caches["reference"].iterdir()) / manifest.tokens,
        "clean_nll": nll,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/real"))
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    model = options.data / "models/tinystories-656k"
    if not model.is_dir():
        parser.error(f"{model} is missing; --data is a folder with models/tinystories-656k, dolly_3k and gsm8k")
    torch.manual_seed(0)
    results = {
        "command": f"python scripts/measure_real_noise.py --rows {options.rows} --steps {options.steps}",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "qtarget": qtarget.__version__,
        },
        "runs": [
            run(name, load(options.data, options.rows), model, options.output / name, options.steps)
            for name, load in (("dolly_3k", dolly), ("gsm8k_model_solutions", gsm8k))
        ],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    names = list(results["runs"][0]["clean_nll"])
    print("NLL on held-out clean rows, nats a token")
    print(f"{'':24}" + "".join(f"{r['data']:>24}" for r in results["runs"]))
    for name in names:
        print(f"{name:24}" + "".join(f"{r['clean_nll'][name]:24.4f}" for r in results["runs"]))


if __name__ == "__main__":
    main()
