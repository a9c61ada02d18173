"""CPU time to construct ``QTargetTrainer`` and TRL's ``SFTTrainer`` on tokenised rows, in turns: medians and their ratio."""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from typing import Any

import datasets
import torch
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qtarget import QTargetTrainer
from qtarget.benchmarks.speed.trainer import TrainerBenchConfig, build_model, build_tokenizer

SMALL = TrainerBenchConfig(vocab=80, width=32, layers=2, intermediate=64, heads=4, kv_heads=2, length=512)


def build_rows(count: int, seed: int) -> Dataset:
    """Rows of 50 to 300 random tokens; another seed is another data set, so that nothing comes from a cache."""
    rng = random.Random(seed)
    return Dataset.from_dict(
        {"input_ids": [[rng.randrange(3, 80) for _ in range(rng.randrange(50, 300))] for _ in range(count)]}
    )


def construction(cls: Any, rows: Dataset) -> float:
    """CPU seconds of one constructor."""
    args = SFTConfig(tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], max_length=SMALL.length)
    model, tokenizer = build_model(SMALL), build_tokenizer()
    start = time.process_time()
    cls(model, args, train_dataset=rows, processing_class=tokenizer)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    contenders = (SFTTrainer, QTargetTrainer)
    taken: dict[str, list[float]] = {cls.__name__: [] for cls in contenders}
    for turn in range(options.rounds + 1):  # the first one is not counted
        for place, cls in enumerate(contenders):
            seconds = construction(cls, build_rows(options.rows, 2 * turn + place))
            if turn:
                taken[cls.__name__].append(seconds)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, value in medians.items():
        print(f"{name}: {value:.2f} CPU s")
    print(f"ratio: {medians['QTargetTrainer'] / medians['SFTTrainer']:.2f}")


if __name__ == "__main__":
    main()
