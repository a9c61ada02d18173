"""What a recipe of cross-fitted copies learns of few rows: their NLL on rows that they have not seen, beside base and SFT.

    python scripts/measure_copies.py --output benchmarks/results/copies.json

The embedded base; rows in a format that it has not seen, and in its own; clean, and with 40 % wrong answers. Every copy is a
LoRA of rank 16 in two folds, batch 8, linear decay. SFT trains all weights on the same rows and is asked about 200 others with
the same noise; its rate is the better of two, 200 steps. Each point is one seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from qtarget import QTargetConfig, QTargetTrainer
from qtarget.data.crossfit.steps import default_steps
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.data.noise import inject_noise
from qtarget.integrations.sft.crossfit import CrossfitRecipe, crossfit_score
from qtarget.integrations.sft.score import score
from qtarget.scoring.cache.reader import ReferenceCache

FOLDS, BATCH, HELD_OUT = 2, 8, 200
FORMATS = {"unknown": ("train", 800), "own": ("base_format_test", 100)}
"""A split of the embedded rows, and how many may be learnt while as many as are asked about are left."""
SFT_RATES, SFT_STEPS = (1e-3, 2e-3), 200


def settings(folder: Path, **more: Any) -> QTargetConfig:
    """Of one run on a CPU."""
    given: dict[str, Any] = {
        "bf16": False, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": BATCH, "disable_tqdm": True,
        "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip
    return QTargetConfig(str(folder), **(given | more))


def rows_of(split: str, count: int, noise: float) -> tuple[Dataset, Dataset]:
    """Rows to learn, and others to ask about, with the same noise."""
    rows = load_demonstrations(split)[: count + HELD_OUT]
    noisy = inject_noise(rows, kind="wrong_answer", rate=noise, seed=0) if noise else rows
    kept = [{key: row[key] for key in ("prompt", "completion")} for row in noisy]
    return Dataset.from_list(kept[:count]), Dataset.from_list(kept[count:])


def said(folder: Path) -> dict[str, float]:
    """Mean NLL of a cache's tokens, and that of the typical row: nats a token; how far the typical row surprises beyond entropy."""
    cache = ReferenceCache.open(folder)
    rows = [cache.row(i) for i in range(len(cache))]
    surprise = [-row["label_log_probs"].astype(np.float64) for row in rows]
    beyond = [s - row["entropy"] for s, row in zip(surprise, rows, strict=True)]
    return {
        "nll": float(np.concatenate(surprise).mean()),
        "row_nll": float(np.median([s.mean() for s in surprise])),
        "row_unexpected": float(np.median([b.mean() for b in beyond])),
    }


def sft(rows: Dataset, others: Dataset, folder: Path) -> dict[str, float]:
    """NLL of the others after plain SFT at the best of some rates."""
    tried = {}
    for rate in SFT_RATES:
        args = settings(folder / "sft", learning_rate=rate, max_steps=SFT_STEPS)
        trainer = QTargetTrainer(str(base_model_path()), args, None, rows, others)
        trainer.train()
        tried[rate] = trainer.evaluate()["eval_nll"]
    best = min(tried, key=lambda rate: tried[rate])
    return {"nll": tried[best], "rate": best, "steps": SFT_STEPS}


def judged(rows: Dataset, folder: Path, recipe: CrossfitRecipe) -> dict[str, Any]:
    """What copies of a recipe say of the rows."""
    tokenizer, begin = AutoTokenizer.from_pretrained(base_model_path()), time.perf_counter()
    crossfit_score(
        str(base_model_path()), settings(folder / "unused"), rows, None, tokenizer,
        directory=folder / "witness", recipe=recipe, progress=False,
    )  # fmt: skip
    return {"steps": recipe.steps, "rate": recipe.learning_rate, "seconds": time.perf_counter() - begin} | said(
        folder / "witness"
    )


def recipes_of(count: int, steps: list[int], rates: list[float]) -> list[tuple[str, int, float]]:
    """Name, steps and rate of the recipes that are tried: that of version 0.1, today's, and others around it."""
    learnt = count // FOLDS
    return [
        ("before", ceil(2 * learnt / BATCH), 5e-4),
        ("default", default_steps(learnt, BATCH), CrossfitRecipe().learning_rate),
        *(("", n, rate) for n, rate in product(steps, rates)),
    ]


def point(split: str, count: int, noise: float, recipes: list[tuple[str, int, float]]) -> dict[str, Any]:
    """One set of rows: base, SFT, and copies of each recipe."""
    rows, others = rows_of(split, count, noise)
    with tempfile.TemporaryDirectory() as named:
        folder = Path(named)
        tokenizer = AutoTokenizer.from_pretrained(base_model_path())
        score(str(base_model_path()), settings(folder / "unused"), rows, None, tokenizer, directory=folder / "base")
        found: dict[str, Any] = {"base": said(folder / "base"), "sft": sft(rows, others, folder), "copies": []}
    for name, n, rate in recipes:
        with tempfile.TemporaryDirectory() as named:
            recipe = CrossfitRecipe(folds=FOLDS, steps=n, learning_rate=rate, prompts=False)
            found["copies"].append({"recipe": name} | judged(rows, Path(named), recipe))
            print(split, count, noise, json.dumps(found["copies"][-1]), flush=True)
    return {"rows": count, "noise": noise} | found


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--rows", type=int, nargs="+", default=[90, 300, 600])
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[], help="Tried beside the recipes of before and of today."
    )
    parser.add_argument("--rates", type=float, nargs="*", default=[5e-4, 1e-3, 2e-3, 4e-3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "torch": torch.__version__, "threads": 1},
        "settings": {"folds": FOLDS, "rank": 16, "batch": BATCH, "held_out": HELD_OUT, "seed": 42},
        "points": [],
    }
    for name, count in product(options.formats, options.rows):
        split, most = FORMATS[name]
        for noise in (0.0, 0.4) if count <= most else ():
            recipes = recipes_of(count, options.steps, options.rates)
            document["points"].append({"format": name} | point(split, count, noise, recipes))
            options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
