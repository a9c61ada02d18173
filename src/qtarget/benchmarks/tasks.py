"""What the proof benchmarks train and ask: rows in the instruction format, and bases that know more or less of it."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from qtarget.benchmarks.finetune import Recipe, encode, fine_tune
from qtarget.benchmarks.start import Start
from qtarget.core.errors import ConfigError, DataError
from qtarget.data import tasks
from qtarget.data.embedded import load_demonstrations
from qtarget.registry import get_target
from qtarget.storage.models import save_whole

Row = dict[str, Any]
Check = Callable[[Any, str], bool]
BASES: Mapping[str, int] = {"none": 0, "half": 25, "most": 50}
"""How much a base knows of the instruction format -> steps of SFT on clean rows that no benchmark trains on."""
BATCH_SIZE = 16
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

    Args:
        data: the folder that holds ``compositional/scan_simple_{train,test}.txt.gz``.

    Raises:
        DataError: the files are not there.
    """
    train, test = (_scan_pairs(data / "compositional" / f"scan_simple_{split}.txt.gz") for split in ("train", "test"))
    return _paired("scan", train, test, "Do this: {}.", "The steps are [{}].", 500, train_rows)


def _scan_pairs(path: Path) -> list[tuple[str, str]]:
    with gzip.open(_present(path), "rt", encoding="utf-8") as file:
        pairs = [line.strip().removeprefix("IN: ").split(" OUT: ") for line in file]
    short = [(command, actions.split()) for command, actions in pairs if len(actions.split()) <= LONGEST_ACTIONS]
    return [(command, " ".join(ACTIONS[action] for action in actions)) for command, actions in short]


NUMBERS = {"number0": "X", "number1": "Y", "number2": "Z"}
"""The placeholders of MAWPS as letters, one token each."""
LONGEST_QUESTION = 30
"""Words: the embedded tokenizer takes three tokens a word of everyday English."""
TEST_SHARE = 5


def math_tasks(data: Path, train_rows: int = 640) -> TaskSet:
    """Word problems of MAWPS and ASDiv with the expression that answers them, in prefix form: real questions, short answers.

    Questions that differ in case and punctuation alone are one, and left out if they are answered differently. Every fifth
    is for the test.

    Args:
        data: the folder that holds ``math_small/mawps_asdiv_train.csv.gz``.

    Raises:
        DataError: the file is not there.
    """
    with gzip.open(_present(data / "math_small" / "mawps_asdiv_train.csv.gz"), "rt", encoding="utf-8") as file:
        rows = [(row["Question"], row["Equation"]) for row in csv.DictReader(file)]
    answers: dict[str, set[str]] = {}
    for question, answer in rows:
        answers.setdefault(_words(question), set()).add(answer)
    found = {_words(question): (question, answer) for question, answer in rows if len(answers[_words(question)]) == 1}
    pairs = []
    for question, answer in found.values():
        for name, letter in NUMBERS.items():
            question, answer = question.replace(name, letter), answer.replace(name, letter)
        if len(question.split()) <= LONGEST_QUESTION and "number" not in question + answer:
            pairs.append((question, answer))
    # not Python's own hash, which changes from process to process
    in_test = [zlib.crc32(_words(question).encode()) % TEST_SHARE == 0 for question, _ in pairs]
    test = [pair for pair, held_out in zip(pairs, in_test, strict=True) if held_out]
    train = [pair for pair, held_out in zip(pairs, in_test, strict=True) if not held_out]
    return _paired("math", train, test, "Solve this: {}", "The plan is [{}].", 450, train_rows)


def _words(question: str) -> str:
    return " ".join(re.findall("[a-z0-9]+", question.lower()))


def _present(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} is missing; name the folder with --data, or run --tasks embedded")
    return path


ROLES = {"agent": "A", "theme": "T", "recipient": "R"}
LONGEST_FORM = 6
"""Words and numbers of a logical form: the embedded tokenizer takes up to six tokens a word."""


def cogs_tasks(data: Path, train_rows: int = 640) -> TaskSet:
    """COGS sentences and their logical forms, the shortest ones, written as ``captain 1, eat A 2 1``.

    Args:
        data: the folder that holds ``compositional/cogs_{train,test}.tsv.gz``.

    Raises:
        DataError: the files are not there.
    """
    train, test = (_cogs_pairs(data / "compositional" / f"cogs_{split}.tsv.gz") for split in ("train", "test"))
    return _paired(
        "cogs", train, [p for p in test if p not in set(train)], "Parse: {}", "It means [{}].", 500, train_rows
    )


def _cogs_pairs(path: Path) -> list[Pair]:
    with gzip.open(_present(path), "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    pairs = {sentence: _short_form(form) for sentence, form, kind in rows if kind == "in_distribution"}
    return [pair for pair in pairs.items() if len(pair[1].split()) <= LONGEST_FORM]


def _short_form(form: str) -> str:
    """A logical form without its variables' letters and brackets, its commonest roles as letters, one token each.

    Example:
        >>> _short_form("* captain ( x _ 1 ) ; eat . agent ( x _ 2 , x _ 1 )")
        'captain 1, eat A 2 1'
    """
    for role, letter in ROLES.items():
        form = form.replace(f". {role} (", f". {letter} (")
    parts = re.split(r" (?:;|AND) ", form.removeprefix("* "))
    return ", ".join(" ".join(re.findall(r"\b(?!x\b)[A-Za-z]+|[0-9]+", part)) for part in parts)


OPERATIONS = {"MIN": "N", "MAX": "X", "MED": "D", "FIRST": "F", "LAST": "L", "SM": "S"}
"""ListOps' operations as letters, one token each."""
MOST_OPERANDS = 6


def listops_tasks(data: Path, train_rows: int = 640) -> TaskSet:
    """ListOps expressions of at most six digits, written as ``X 2 (F 9 6)``; the answer is one digit. Every fifth is a test.

    Args:
        data: the folder that holds ``compositional/listops_test_d8.tsv.gz``.

    Raises:
        DataError: the file is not there.
    """
    pairs: dict[str, str] = {}
    with gzip.open(_present(data / "compositional" / "listops_test_d8.tsv.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            answer, expression = line.rstrip("\n").split("\t")
            if len(re.findall("[0-9]", expression)) <= MOST_OPERANDS:
                pairs[_short_expression(expression)] = answer
    in_test = {question: zlib.crc32(question.encode()) % TEST_SHARE == 0 for question in pairs}
    train, test = ([pair for pair in pairs.items() if in_test[pair[0]] == side] for side in (False, True))
    return _paired("listops", train, test, "Reduce {}.", "The result is [{}].", 600, train_rows)


def _short_expression(expression: str) -> str:
    """ListOps without the brackets of its binary trees.

    Example:
        >>> _short_expression("( ( ( [MAX 2 ) ( ( ( [FIRST 9 ) 6 ) ] ) ) ] )")
        'X 2 (F 9 6)'
    """
    tokens = [token for token in expression.split() if token not in "()"]
    words = [
        "(" + OPERATIONS[token[1:]] if token.startswith("[") else ")" if token == "]" else token for token in tokens
    ]
    return " ".join(words).replace(" )", ")")[1:-1]


SHIFTS = (1, 2, 3)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def caesar_tasks(train_rows: int = 640) -> TaskSet:
    """Three or four letters, each moved on in the alphabet: a task that was made after the rules stood. Every fifth is a test."""
    random, pairs = Random("caesar"), {}
    while len(pairs) < 6000:
        word, shift = random.choices(LETTERS, k=random.choice((3, 4))), random.choice(SHIFTS)
        moved = [LETTERS[(LETTERS.index(letter) + shift) % len(LETTERS)] for letter in word]
        pairs[f"{' '.join(word)} by {shift}"] = " ".join(moved)
    in_test = {question: zlib.crc32(question.encode()) % TEST_SHARE == 0 for question in pairs}
    train, test = ([pair for pair in pairs.items() if in_test[pair[0]] == side] for side in (False, True))
    return _paired("caesar", train, test, "Move on {}.", "They become [{}].", 500, train_rows)


Pair = tuple[str, str]
"""A question and its answer."""


def _paired(
    name: str, train: list[Pair], test: list[Pair], asking: str, answering: str, steps: int, train_rows: int
) -> TaskSet:
    """Pairs of question and answer as tasks: the base is taught `question = answer` and asked for ``[answer]``.

    What the demonstrations do not take of the training pairs is for the base alone.

    Args:
        asking, answering: how an instruction and a response word them.
        steps: of teaching the base all training pairs.

    Raises:
        DataError: fewer than a hundred pairs are left for the base.
    """

    def demonstration(pair: Pair) -> Row:
        prompt = tasks.INSTRUCTION_TEMPLATE.format(instruction=asking.format(pair[0]))
        return {"prompt": prompt, "completion": answering.format(pair[1]), "answer": pair[1], "skill": name}

    def document(pair: Pair) -> Row:
        return {"prompt": f"{pair[0]} =", "completion": f" {pair[1]}", "answer": pair[1], "skill": name}

    train = list(train)
    Random(0).shuffle(train)
    needed = train_rows + VALIDATION_ROWS
    if len(train) < needed + 100:
        raise DataError(f"{len(train)} short {name} questions for {needed} rows and a base; lower train_rows")
    rows = [demonstration(pair) for pair in train]
    asked = Random(1).sample(test, 200)
    return TaskSet(
        name=name,
        train=rows[:train_rows],
        validation=rows[train_rows:needed],
        test=[demonstration(pair) for pair in asked],
        kept=[document(pair) for pair in asked[:60]],
        warmup=rows[needed:],
        check=tasks.check,
        check_kept=tasks.check_pretraining,
        pretraining=[document(pair) for pair in train],
        pretraining_steps=steps,
    )


REAL = {"scan": scan_tasks, "math": math_tasks, "cogs": cogs_tasks, "listops": listops_tasks}
"""Tasks from files that are not part of the package."""
GENERATED = {"embedded": embedded_tasks, "caesar": caesar_tasks}


def task_set(name: str, data: Path | None) -> TaskSet:
    """By name.

    Raises:
        ConfigError: no such name, or real tasks without their folder.
    """
    if name in GENERATED:
        return GENERATED[name]()
    if name not in REAL:
        raise ConfigError(f"--tasks {name!r} is unknown; expected one of {', '.join((*GENERATED, *REAL))}")
    if data is None:
        raise ConfigError(f"--tasks {name} reads files that are not part of the package; name their folder with --data")
    return REAL[name](data)


def make_base(task: TaskSet, name: str, folder: Path, start: Start) -> Path:
    """The folder of a base: the start, taught the skill if need be, then ``BASES[name]`` steps of the format.

    Made once: a base that stands in ``folder`` is taken as it is.
    """
    path = folder / f"{task.name}-{name}"
    if (path / "config.json").is_file():
        return path
    skilled = folder / f"{task.name}-skilled"
    if not (skilled / "config.json").is_file():
        model = start.load()
        teach(model, start, task.pretraining, task.pretraining_steps)
        save_whole(model, skilled)
    model = start.load(skilled)
    teach(model, start, task.warmup, BASES[name])
    save_whole(model, path)
    return path


def teach(model: Any, start: Start, rows: list[Row], steps: int, seed: int = 0) -> None:
    """Plain SFT on clean rows, the recipe of all bases."""
    if steps:
        recipe = Recipe(start.learning_rate, BATCH_SIZE, steps, seed)
        fine_tune(model, encode(start.tokenizer(), rows), get_target("sft"), recipe)
