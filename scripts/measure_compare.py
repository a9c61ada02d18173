"""How good the verdict of `qtarget compare` is: points of the noise map, verdict against clean tests that it never saw.

    python scripts/measure_compare.py --output benchmarks/results/compare.json

At each point rows with noise are trained and rows with noise are judged, as a user would have them; the clean test rows go
in as `--forgetting`, which no verdict reads. A verdict is right where the contender that it names is within one point of
the best one on the clean test. The clean test has three seeds too, and the best of four is luckier than its peers: a verdict
is shown to be wrong only where the 95 % interval of what it misses lies above one point. Resumable: every comparison goes on
where it stopped, every point is written when it is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import yaml

from qtarget.benchmarks.noise.runs import Cell, noisy_rows
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BATCH_SIZE, embedded_tasks, make_base
from qtarget.cli.compare import RATES
from qtarget.data import tasks
from qtarget.report.comparison.simultaneous import simultaneous_differences
from qtarget.storage.files import write_atomic

TARGETS = ("sft", "consensus", "dft", "prior_surprise")
POINTS = tuple(
    (Cell(base, kind, rate), draw)
    for draw in (0, 1)
    for base, kind, rate in (
        ("most", "random_tokens", 0.4), ("none", "random_tokens", 0.4), ("most", "random_tokens", 0.0),
        ("none", "random_tokens", 0.0), ("most", "wrong_answer", 0.4), ("none", "wrong_answer", 0.4),
        ("most", "random_tokens", 0.2), ("none", "random_tokens", 0.2), ("most", "contradictory_duplicate", 0.4),
        ("most", "boilerplate", 0.4), ("half", "random_tokens", 0.4), ("half", "random_tokens", 0.0),
        ("most", "random_tokens", 0.1), ("none", "random_tokens", 0.1),
    )
)  # fmt: skip
TRAINING_ROWS, JUDGED_ROWS, CLEAN_ROWS, STEPS = 600, 600, 600, 40
WITHIN = 1.0
"""Points below the best contender on the clean test that are still right."""


def demonstrations(split: str, count: int, seed: str, taken: set[str]) -> list[dict[str, Any]]:
    """Fresh rows of a split's problems, none twice and none of those taken."""
    random, out = Random(seed), []
    while len(out) < count:
        row = tasks.demonstration(
            tasks.sample_problem_in(random.choice(tasks.DEMONSTRATED_SKILLS), split, random), random
        )
        if row["prompt"] not in taken:
            taken.add(row["prompt"])
            out.append(row)
    return out


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(folder: Path, cell: Cell, draw: int, bases: Path, judged_rows: int) -> Path:
    """The rows and the config of a point."""
    start, task = Start(), embedded_tasks()
    base, taken = make_base(task, cell.base, bases, start), {row["prompt"] for row in task.warmup}
    Start().tokenizer().save_pretrained(base)
    tokenizer = start.tokenizer()
    train = demonstrations("train", TRAINING_ROWS, f"compare train {draw}", taken)
    judged = demonstrations("train", judged_rows, f"compare judged {draw}", taken)
    clean = demonstrations("test", CLEAN_ROWS, f"compare clean {draw}", taken)
    write_rows(folder / "train.jsonl", noisy_rows(train, cell, draw, tokenizer))
    write_rows(folder / "judged.jsonl", noisy_rows(judged, cell, draw + 1_000_003, tokenizer))
    write_rows(folder / "clean.jsonl", clean)
    settings = {
        "model_name_or_path": str(base.resolve()), "train_file": "train.jsonl", "validation_file": "judged.jsonl",
        "target": "sft", "output_dir": str((folder / "run").resolve()), "max_steps": STEPS, "learning_rate": 1e-3,
        "per_device_train_batch_size": BATCH_SIZE, "max_length": 128, "bf16": False, "use_cpu": True,
        "report_to": "none", "activation_checkpointing": False, "dataloader_pin_memory": False,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "run.yaml"


def compared(config: Path, at_once: int, filters: str) -> dict[str, Any]:
    """The document of `qtarget compare` at a point."""
    folder = config.parent
    command = [
        sys.executable, "-m", "qtarget.cli.main", "compare", str(config), "--targets", ",".join(TARGETS), "--filters", filters,
        "--metric", "regex", "--pattern", r"\[(.*?)\]", "--forgetting", str(folder / "clean.jsonl"),
        "--output", str(folder / "compare"), "--at-once", str(at_once), "--batch-size", "128", "--max-new-tokens", "30",
        "--resume",
    ]  # fmt: skip
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads((folder / "compare" / "comparison.json").read_text(encoding="utf-8"))


def missed(folder: Path, document: dict[str, Any], taken: str | None, best: str) -> dict[str, float] | None:
    """Points on the clean test by which the best contender is ahead of another one, with a 95 % interval."""
    if taken in (None, best):
        return None
    runs = {run["key"]: run for run in map(json.loads, (folder / "compare" / "runs.jsonl").read_text().splitlines())}
    # the rate that is best on all rows, where it was run: as the levels of the document
    rates = {
        one["name"]: next(rate for rate in (one["best_rate"], *one["rates"]) if f"{one['name']}|{rate:g}|0" in runs)
        for one in document["contenders"]
    }
    seeds = range(document["measure"]["seeds"])
    scores = [
        [runs[f"{name}|{rates[name]:g}|{seed}"]["sets"]["forgetting"]["scores"] for seed in seeds]
        for name in (taken, best)
    ]
    found = simultaneous_differences(scores)
    ends = {"mean": found.means[0], "low": found.lows[0], "high": found.highs[0]}
    return {name: round(100 * float(value), 2) for name, value in ends.items()}


def point_result(cell: Cell, draw: int, judged_rows: int, document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the verdict said, and what the clean test says of it."""
    clean = {one["name"]: round(100 * one["forgetting"]["level"], 3) for one in document["contenders"]}
    best = max(clean, key=lambda name: clean[name])
    behind = None if document["take"] is None else round(clean[best] - clean[document["take"]], 3)
    gap, of_sft = (missed(folder, document, name, best) for name in (document["take"], "sft"))
    return {
        "base": cell.base, "kind": cell.kind, "rate": cell.rate, "draw": draw, "validation_rows": judged_rows,
        "finding": document["finding"], "take": document["take"], "best_on_clean": best, "points_behind": behind,
        "right": behind is not None and behind <= WITHIN, "missed_points": gap,
        "shown_wrong": gap is not None and gap["low"] > WITHIN,
        "sft_shown_wrong": of_sft is not None and of_sft["low"] > WITHIN, "clean_percent": clean,
        "untrained_clean_percent": round(100 * document["base"]["forgetting"]["level"], 3),
        "judged": {one["name"]: [one["level"], one["to_baseline"], one["confidence"]] for one in document["contenders"]},
        "seconds": {one["name"]: one["seconds"] for one in document["contenders"]},
        "left_out": document["left_out"], "rows_judged": document["sets"]["data"]["rows"], "cost": document["cost"],
    }  # fmt: skip


def summary(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts."""
    sft_best = [
        point for point in points if point["clean_percent"]["sft"] >= max(point["clean_percent"].values()) - WITHIN
    ]
    return {
        "points": len(points),
        "within_one_point_of_the_best": sum(point["right"] for point in points),
        "shown_to_be_further_behind": sum(point["shown_wrong"] for point in points),
        "sft_everywhere_shown_to_be_further_behind": sum(point["sft_shown_wrong"] for point in points),
        "sft_best_within_one_point": len(sft_best),
        "of_these_sft_is_taken": sum(point["take"] == "sft" for point in sft_best),
        "of_these_another_that_is_as_good": sum(point["take"] != "sft" and point["right"] for point in sft_best),
        "sft_taken_everywhere_would_be_right": len(sft_best),
        "mean_points_behind": round(sum(point["points_behind"] or 0 for point in points) / max(1, len(points)), 3),
    }


def by_rows(points: list[dict[str, Any]]) -> dict[str, Any]:
    """A summary for each number of validation rows."""
    counts = sorted({point["validation_rows"] for point in points})
    return {str(count): summary([point for point in points if point["validation_rows"] == count]) for count in counts}


def main() -> None:
    """Run the points in order; those in the output are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/compare.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/measure-compare"), help="rows, bases and comparisons")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--filters", default="none")
    parser.add_argument(
        "--judged-rows", type=int, default=JUDGED_ROWS, help="validation rows, with noise as the others"
    )
    parser.add_argument("--points", type=int, default=len(POINTS), help="the first so many")
    arguments = parser.parse_args()
    known = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"points": []}
    done = {(p["base"], p["kind"], p["rate"], p["draw"], p["validation_rows"]): p for p in known["points"]}
    for cell, draw in POINTS[: arguments.points]:
        key = (cell.base, cell.kind, cell.rate, draw, arguments.judged_rows)
        if key in done:
            continue
        folder = arguments.work / "-".join(map(str, key))
        config = prepare(folder, cell, draw, arguments.work / "bases", arguments.judged_rows)
        begin = time.monotonic()
        done[key] = point_result(
            cell, draw, arguments.judged_rows, compared(config, arguments.at_once, arguments.filters), folder
        )
        points = list(done.values())
        settings = {
            "targets": TARGETS, "rates": RATES, "seeds": 3, "steps": STEPS, "training_rows": TRAINING_ROWS,
            "clean_rows": CLEAN_ROWS, "filters": arguments.filters, "within_points": WITHIN,
        }  # fmt: skip
        results = {"benchmark": "compare", "settings": settings, "summary": by_rows(points), "points": points}
        write_atomic(arguments.output, (json.dumps(results, indent=1) + "\n").encode())
        print(
            f"{key}: {done[key]['finding']} [{done[key]['points_behind']} behind, {time.monotonic() - begin:.0f} s]",
            flush=True,
        )


if __name__ == "__main__":
    main()
