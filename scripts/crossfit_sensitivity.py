"""How far `crossfit_consensus` depends on its two numbers: exact accuracy at points of the noise map, numbers moved.

    python scripts/crossfit_sensitivity.py --output benchmarks/results/crossfit_sensitivity.json --bases runs/noise.bases

Rows, bases, folds and the bare loop are those of `qtarget bench noise`, with 40 steps and one learning rate a base; nothing
is tuned. Finished runs stand in the output and are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch

from qtarget.benchmarks.finetune import Recipe, fine_tune
from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.noise.runs import Cell, NoiseWorker, Setting, crossfit_log_probs, with_crossfit
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BATCH_SIZE, make_base, task_set
from qtarget.data.crossfit import witness
from qtarget.registry import get_target
from qtarget.storage.files import write_json
from qtarget.targets import crossfit_consensus

RATES = {"none": 2e-3, "most": 1e-3}
STEPS = 40
CELLS = [
    Cell(base, kind, rate)
    for base in RATES
    for kind, rate in (("random_tokens", 0.0), ("random_tokens", 0.4), ("wrong_answer", 0.4))
]
VARIANTS = [
    {"caution": 4.0, "density": 0.01},
    *({"caution": caution, "density": 0.01} for caution in (2.0, 8.0)),
    *({"caution": 4.0, "density": density} for density in (0.003, 0.03)),
]


def jobs(seeds: int) -> Iterator[tuple[Cell, int, dict[str, float] | None]]:
    """All runs; without a variant it is plain SFT."""
    for seed in range(seeds):
        for cell in CELLS:
            for variant in (None, *VARIANTS):
                yield cell, seed, variant


@lru_cache(maxsize=1)
def judged(worker: NoiseWorker, cell: Cell, seed: int) -> list[torch.Tensor]:
    """What the copies say; the density only decides what follows from it."""
    recipe = Recipe(RATES[cell.base], BATCH_SIZE, STEPS, seed)
    return crossfit_log_probs(worker.material(cell, seed).rows, lambda: worker.base(cell.base), recipe)


def accuracy(worker: NoiseWorker, cell: Cell, seed: int, variant: dict[str, float] | None) -> float:
    """One run: percent of the clean test prompts that are answered exactly."""
    recipe, material = Recipe(RATES[cell.base], BATCH_SIZE, STEPS, seed), worker.material(cell, seed)
    model, reference, target = worker.base(cell.base), None, get_target("sft")
    if variant is not None:
        target = get_target("crossfit_consensus", caution=variant["caution"])
        for module in (witness, crossfit_consensus):  # both read the number where it is used
            patch.object(module, "NOISE_DENSITY", variant["density"]).start()
        reference = with_crossfit(material, judged(worker, cell, seed)).known
    fine_tune(model, material.rows, target, recipe, reference=reference)
    patch.stopall()
    return worker.test(model, cell)["accuracy_percent"]


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds: a line a variant, a column a point."""
    names = {json.dumps(run["variant"]): run["variant"] for run in runs}
    head = ["", *(f"{cell.base}, {cell.kind} {cell.rate:g}" for cell in CELLS)]
    lines = [head, ["---"] * len(head)]
    for key, variant in names.items():
        label = "sft" if variant is None else f"caution {variant['caution']:g}, density {variant['density']:g}"
        line = [label]
        for cell in CELLS:
            found = [run["accuracy"] for run in runs if json.dumps(run["variant"]) == key and run["cell"] == vars(cell)]
            line.append(f"{fmean(found):.1f}" if found else "")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bases", type=Path, required=True, help="folder of the bases; made where absent")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = task_set("embedded", None)
    for base in RATES:
        make_base(task, base, options.bases, Start())
    worker = NoiseWorker(Setting("embedded", None, options.bases, STEPS))
    said = json.loads(options.output.read_text()) if options.output.is_file() else {"runs": []}
    runs = said["runs"]
    for cell, seed, variant in jobs(options.seeds):
        run = {"cell": vars(cell), "seed": seed, "variant": variant}
        if any(run.items() <= done.items() for done in runs):
            continue
        runs.append(run | {"accuracy": accuracy(worker, cell, seed, variant)})
        facts = {"steps": STEPS, "learning_rates": RATES, "machine": machine_facts(), "versions": versions()}
        write_json(options.output, {"benchmark": "crossfit_sensitivity", **facts, "runs": runs})
    print(table(runs))


if __name__ == "__main__":
    main()
