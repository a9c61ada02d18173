"""What the proof benchmarks train and ask: rows in the instruction format, and bases that know more or less of it."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from qtarget.benchmarks.finetune import Recipe, encode, fine_tune
from qtarget.data import tasks
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.errors import ConfigError, DataError
from qtarget.registry import get_target

Row = dict[str, Any]
Check = Callable[[Any, str], bool]
BASES: Mapping[str, int] = {"none": 0, "half": 25, "most": 50}
"""How much a base knows of the instruction format -> steps of SFT on clean rows that no benchmark trains on."""
WARMUP = Recipe(learning_rate=1e-3, batch_size=16, steps=0)
VALIDATION_ROWS = 128


@dataclass(frozen=True)
class TaskSet:
    """One source of exactly checkable rows.

    Attributes:
        train, validation: clean demonstrations; noise is put into both.
        test: clean demonstrations of questions that no model was trained on; ``check`` says whether a text answers one.
        kept: prompts of the base's own format whose answers training can only make it forget, with ``check_kept``.
        warmup: clean demonstrations for the bases alone.
        pretraining: documents that teach the base the skill itself in another format; empty where it knows it.
        pretraining_steps: how long.
    """

    name: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    kept: list[Row]
    warmup: list[Row]
    check: Check
    check_kept: Check
    pretraining: list[Row]
    pretraining_steps: int


def embedded_tasks(train_rows: int = 640) -> TaskSet:
    """The embedded instruction tasks, nine skills; the embedded base knows all of them in another format."""
    rows = Random(0).sample(load_demonstrations("train"), train_rows + VALIDATION_ROWS)
    test = load_demonstrations("test")
    taken = {row["prompt"] for row in load_demonstrations("train") + test}
    return TaskSet(
        name="embedded",
        train=rows[:train_rows],
        validation=rows[train_rows:],
        test=Random(0).sample(test, 200),
        kept=Random(0).sample(load_demonstrations("heldout_skills_test"), 60),
        warmup=[row for row in generated_demonstrations(1000, "warmup") if row["prompt"] not in taken],
        check=tasks.check,
        check_kept=tasks.check_pretraining,
        pretraining=[],
        pretraining_steps=0,
    )


def generated_demonstrations(count: int, seed: str, taken: Collection[str] = ()) -> list[Row]:
    """Fresh demonstrations of training problems, skills at random; none that one of the prompts ``taken`` asks for."""
    random, out = Random(seed), []
    while len(out) < count:
        problem = tasks.sample_problem_in(random.choice(tasks.DEMONSTRATED_SKILLS), "train", random)
        wordings = (words.format(*problem.question) for words in tasks.SKILLS[problem.skill].instructions)
        if not any(tasks.INSTRUCTION_TEMPLATE.format(instruction=words) in taken for words in wordings):
            out.append(tasks.demonstration(problem, random))
    return out


ACTIONS = {
    "I_TURN_LEFT": "L", "I_TURN_RIGHT": "R", "I_JUMP": "J", "I_WALK": "W", "I_RUN": "N", "I_LOOK": "K"
}  # fmt: skip
"""SCAN's actions as letters, which the embedded tokenizer holds as one token each."""
LONGEST_ACTIONS = 6


def scan_tasks(data: Path, train_rows: int = 640) -> TaskSet:
    """SCAN commands of at most six actions: data that no target here was designed on.

    The base is taught `command = actions` and asked, like the embedded tasks, for ``[actions]`` after an instruction. Half
    of the commands of the training split are for the base alone.

    Args:
        data: the folder that holds ``compositional/scan_simple_{train,test}.txt.gz``.

    Raises:
        DataError: the files are not there.
    """
    train, test = (_scan_pairs(data / "compositional" / f"scan_simple_{split}.txt.gz") for split in ("train", "test"))
    Random(0).shuffle(train)
    needed = train_rows + VALIDATION_ROWS
    if len(train) < needed + 100:
        raise DataError(f"{len(train)} short SCAN commands for {needed} rows and a base; lower train_rows")
    rows = [_scan_demonstration(*pair) for pair in train]
    own = [_scan_document(*pair) for pair in train]
    asked = Random(1).sample(test, 200)
    return TaskSet(
        name="scan",
        train=rows[:train_rows],
        validation=rows[train_rows:needed],
        test=[_scan_demonstration(*pair) for pair in asked],
        kept=[_scan_document(*pair) for pair in asked[:60]],
        warmup=rows[needed:],
        check=tasks.check,
        check_kept=tasks.check_pretraining,
        pretraining=own,
        pretraining_steps=500,
    )


def _scan_pairs(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise DataError(f"{path} is missing; name the folder with --data, or run --tasks embedded")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        pairs = [line.strip().removeprefix("IN: ").split(" OUT: ") for line in file]
    short = [(command, actions.split()) for command, actions in pairs if len(actions.split()) <= LONGEST_ACTIONS]
    return [(command, " ".join(ACTIONS[action] for action in actions)) for command, actions in short]


def _scan_demonstration(command: str, actions: str) -> Row:
    prompt = tasks.INSTRUCTION_TEMPLATE.format(instruction=f"Do this: {command}.")
    return {"prompt": prompt, "completion": f"The steps are [{actions}].", "answer": actions, "skill": "scan"}


def _scan_document(command: str, actions: str) -> Row:
    return {"prompt": f"{command} =", "completion": f" {actions}", "answer": actions, "skill": "scan"}


def task_set(name: str, data: Path | None) -> TaskSet:
    """By name.

    Raises:
        ConfigError: no such name, or SCAN without its folder.
    """
    if name == "embedded":
        return embedded_tasks()
    if name != "scan":
        raise ConfigError(f"--tasks {name!r} is unknown; expected embedded or scan")
    if data is None:
        raise ConfigError("--tasks scan reads files that are not part of the package; name their folder with --data")
    return scan_tasks(data)


def load_model(folder: Path | str) -> Any:
    """A causal model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def make_base(task: TaskSet, name: str, folder: Path) -> Path:
    """The folder of a base: the embedded model, taught the skill if need be, then ``BASES[name]`` steps of the format.

    Made once: a base that stands in ``folder`` is taken as it is.
    """
    from transformers import AutoTokenizer

    path = folder / f"{task.name}-{name}"
    if (path / "config.json").is_file():
        return path
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    skilled = folder / f"{task.name}-skilled"
    if not (skilled / "config.json").is_file():
        model = load_model(base_model_path())
        teach(model, tokenizer, task.pretraining, task.pretraining_steps)
        model.save_pretrained(skilled)
    model = load_model(skilled)
    teach(model, tokenizer, task.warmup, BASES[name])
    model.save_pretrained(path)
    return path


def teach(model: Any, tokenizer: Any, rows: list[Row], steps: int, seed: int = 0) -> None:
    """Plain SFT on clean rows, the recipe of all bases."""
    if steps:
        recipe = Recipe(WARMUP.learning_rate, WARMUP.batch_size, steps, seed)
        fine_tune(model, encode(tokenizer, rows), get_target("sft"), recipe)
