"""Write the embedded demonstrations and two test files in the base model's own format.

    python scripts/make_demonstrations.py --seed 0 --output src/qtarget/data/embedded/demonstrations

`train.jsonl` and `test.jsonl` hold rows in the instruction format; `base_format_test.jsonl` asks for every skill in the
base model's own format, and `heldout_skills_test.jsonl` only for those that no demonstration shows. The same seed
writes the same bytes. Test problems are in neither the training rows nor the base model's corpus.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from qtarget.core.errors import DataError
from qtarget.data import tasks

Row = dict[str, str]


def make_rows(
    render: Callable[[tasks.Problem, Random], Row], skills: Sequence[str], split: str, count: int, rng: Random
) -> list[Row]:
    """``count`` rows of different problems, the skills in turn and then shuffled.

    Raises:
        DataError: a skill has not that many problems in this split.
    """
    rows: list[Row] = []
    seen: set[tasks.Problem] = set()
    draws_in_vain = 0
    while len(rows) < count:
        skill = skills[len(rows) % len(skills)]
        problem = tasks.sample_problem_in(skill, split, rng)
        draws_in_vain = draws_in_vain + 1 if problem in seen else 0
        if draws_in_vain > 10_000:
            raise DataError(f"{skill} has no more {split} problems after {len(rows)} of {count} rows; ask for fewer")
        if problem not in seen:
            seen.add(problem)
            rows.append(render(problem, rng))
    rng.shuffle(rows)
    return rows


def write_jsonl(rows: Sequence[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--heldout-rows", type=int, default=150)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    files = {
        "train": (tasks.demonstration, tasks.DEMONSTRATED_SKILLS, "train", arguments.train_rows),
        "test": (tasks.demonstration, tasks.DEMONSTRATED_SKILLS, "test", arguments.test_rows),
        "base_format_test": (tasks.pretraining_example, tuple(tasks.SKILLS), "test", arguments.test_rows),
        "heldout_skills_test": (tasks.pretraining_example, tasks.FORGETTING_SKILLS, "test", arguments.heldout_rows),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, (render, skills, split, count) in files.items():
        rows = make_rows(render, skills, split, count, Random(f"{name}-{arguments.seed}"))
        write_jsonl(rows, arguments.output / f"{name}.jsonl")


if __name__ == "__main__":
    main()
