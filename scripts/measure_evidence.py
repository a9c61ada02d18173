"""How well copies that have not seen the rows tell bad rows from hard ones, with and without other rows' prompts.

    python scripts/measure_evidence.py --data ../shared/data --output benchmarks/results/evidence.json

Points of `qtarget bench noise`: 640 rows, two folds of 40 steps at the rate of docs/crossfit.md's map (0.002 where the base
knows none of the format, 0.001 where it knows most). The rule was designed on the embedded tasks, seeds 0 and 1; SCAN, word
problems, COGS, ListOps and caesar were not looked at before it stood.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import qtarget
from qtarget.benchmarks.finetune import Recipe
from qtarget.benchmarks.noise.crossfitting import crossfit_of, with_crossfit
from qtarget.benchmarks.noise.runs import Cell, NoiseWorker, Setting
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BATCH_SIZE, make_base
from qtarget.data.roc import roc_auc
from qtarget.filtering import ScoredRows, decide

RATES = {"none": 2e-3, "most": 1e-3}
CLEAN, WRONG = ("random_tokens", 0.0), ("wrong_answer", 0.4)


def said(rows: ScoredRows, marks: Any, rule: str) -> dict[str, Any]:
    """A verdict and, with marks, what it is worth."""
    found = decide(rows, rule)
    line: dict[str, Any] = {
        "verdict": found.verdict,
        "rule": found.rule,
        "dropped": found.dropped,
        "summary": found.summary,
    }
    if marks.any():
        line |= {
            "roc": roc_auc(found.score, marks),
            "precision": float(marks[~found.keep].mean()) if found.dropped else None,
            "recall": float((~found.keep)[marks].mean()),
        }
    return line


def measured(worker: NoiseWorker, cell: Cell, seed: int, steps: int) -> dict[str, Any]:
    """One point: the base's surprise, copies alone, copies with other prompts."""
    import numpy as np

    material = worker.material(cell, seed)
    base = lambda: worker.base(cell.base)  # noqa: E731
    told = crossfit_of(material.rows, base, Recipe(RATES[cell.base], BATCH_SIZE, steps, seed))
    _, rows = with_crossfit(material.rows, material.known, told, base)
    marks = np.array([any(row.noise) for row in material.rows])
    nobody = replace(rows, contradiction=None)
    return {
        **vars(cell), "seed": seed, "rows": len(rows), "marked": int(marks.sum()),
        "rules": {
            "surprise": said(rows, marks, "surprise"), "copies alone": said(nobody, marks, "crossfit"),
            "crossfit": said(rows, marks, "crossfit"),
        },
    }  # fmt: skip


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bases", type=Path, required=True, help="Folder of the bases, made if absent.")
    parser.add_argument("--tasks", nargs="+", default=["embedded"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"points": []}
    if options.output.is_file():  # points that stand there are not measured again
        results = json.loads(options.output.read_text())
    results |= {
        "benchmark": "evidence", "qtarget": qtarget.__version__, "torch": torch.__version__, "machine": platform.machine(),
        "steps": options.steps,
    }  # fmt: skip
    start = Start()
    for task in options.tasks:
        worker = NoiseWorker(Setting(task, options.data, options.bases, options.steps, start))
        done = {tuple(point[key] for key in ("task", "base", "kind", "rate", "seed")) for point in results["points"]}
        for seed in range(options.seeds):
            for base in ("none", "most"):
                make_base(worker.task, base, options.bases, start)
                for kind, rate in (WRONG, CLEAN):
                    if (task, base, kind, rate, seed) in done:
                        continue
                    point = {"task": task} | measured(worker, Cell(base, kind, rate), seed, options.steps)
                    results["points"].append(point)
                    options.output.write_text(json.dumps(results, indent=1) + "\n")
                    print(task, base, kind, rate, seed, point["rules"]["crossfit"], flush=True)


if __name__ == "__main__":
    main()
