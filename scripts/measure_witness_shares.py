"""What share of tokens and rows the copies of a cross-fit take for noise, beside the share that is: `noise_tokens`, `noise_rows`.

    python scripts/measure_witness_shares.py --data ../shared/data --bases runs/shares --output runs/witness_shares.json

Beside it stands the same after each label was given the surprise that its copy expected (the entropy): does that tell hard
tokens from noise? Copies are those of `bench noise`: 40 steps, one rate, one seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtarget.benchmarks.finetune import Recipe
from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.noise.crossfitting import crossfit_of
from qtarget.benchmarks.noise.runs import Cell, NoiseWorker, Setting, parse_cell
from qtarget.benchmarks.pool import one_thread, quiet_libraries, save_results
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BATCH_SIZE, make_base, task_set
from qtarget.data.crossfit.witness import verdict

POINTS = ("cogs most:random_tokens:0", "cogs most:other_response:0.4", "embedded most:random_tokens:0",
          "embedded none:random_tokens:0", "embedded none:random_tokens:0.4", "embedded none:wrong_answer:0.4",
          "embedded most:wrong_answer:0.4")  # fmt: skip
RATE, STEPS, SEED = 1e-3, 40, 0


def shares(tasks: str, cell: Cell, data: Path | None, bases: Path) -> dict[str, Any]:
    """Of one point."""
    make_base(task_set(tasks, data), cell.base, bases, Start())
    worker = NoiseWorker(Setting(tasks, data, bases, STEPS, Start()))
    material = worker.material(cell, SEED)
    recipe = Recipe(RATE, BATCH_SIZE, STEPS, SEED)
    told = crossfit_of(material.rows, lambda: worker.base(cell.base), recipe, other_prompts=False)
    rows = np.repeat(np.arange(len(material.rows)), [len(values) for values in told.log_probs])
    base = np.concatenate([np.asarray(known.label_log_probs) for known in material.known])
    copies, entropy = (torch.cat(list(values)).numpy() for values in (told.log_probs, told.entropy))
    marks = np.concatenate([np.array(row.noise) for row in material.rows])
    found = {
        "as it is": verdict(base, copies, rows),
        "less what was expected": verdict(base, np.minimum(0, copies + entropy), rows),
    }
    return {
        "tasks": tasks, **vars(cell), "marked_tokens": round(float(marks.mean()), 4),
        **{name: {"tokens": one.noise_tokens, "rows": one.noise_rows} for name, one in found.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="what the copies of a cross-fit take for noise")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bases", type=Path, default=Path("runs/shares"))
    parser.add_argument("--output", type=Path, default=Path("runs/witness_shares.json"))
    given = parser.parse_args()
    results: dict[str, Any] = {"points": [], "machine": machine_facts(), "versions": versions()}
    with quiet_libraries(), one_thread():
        for point in POINTS:
            tasks, _, cell = point.partition(" ")
            results["points"].append(shares(tasks, parse_cell(cell), given.data, given.bases))
            print(results["points"][-1], flush=True)
            save_results(given.output, results)


if __name__ == "__main__":
    main()
