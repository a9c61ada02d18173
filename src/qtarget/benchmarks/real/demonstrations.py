"""What the real model is shown: the embedded skills or SCAN, whose answers a program checks, or what people and models wrote.

What was written has no answer that a program completes. Its noise is put in by us, but for GSM8K: models solved its questions,
and the data marks who was wrong.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from qtarget.benchmarks.marked_data import load_gsm8k_solutions
from qtarget.benchmarks.real.instructions import FILE
from qtarget.benchmarks.tasks import VALIDATION_ROWS, Row, TaskSet, embedded_tasks, scan_tasks
from qtarget.core.errors import ConfigError, DataError
from qtarget.data import tasks
from qtarget.data.noise import NOISE_KINDS

WRITTEN = {
    "dolly": "dolly_3k/dolly_3k.json.gz",
    "alpaca": "alpaca_9k/random_9k.json.gz",
    "gsm8k": "gsm8k/model_solutions.jsonl.gz",
}
"""Instructions with answers in words: by people, by text-davinci-003, and solutions of GPT-3 models."""
SOLVED, MARKED = "gsm8k", "wrong_solution"
"""The demonstrations that have marks of their own, and the one kind of noise that these have: solutions that are wrong."""
WORKED = "gsm8k/train.jsonl.gz"
"""Other questions of the same kind, solved by people."""
CHECKED = ("embedded", "scan")
SCAN = "compositional/scan_simple_train.txt.gz"
ELSEWHERE = ("text_corpora/wikitext2_valid.txt.gz", WRITTEN["dolly"])
"""What a model should not forget: running text, and what people answered."""
LONGEST_ANSWER = 160
"""Characters of a written answer, for memory's sake; a question may be twice that."""
LONGEST_SOLUTION, SOLVED_ROWS, MOST_MARKED = 300, 480, 0.6
"""Characters of a solution; for how many rows there are questions that some model solved rightly; and for which share of them
another model's wrong solution."""


def kinds_of(name: str) -> tuple[str, ...]:
    """Kinds of noise that these demonstrations can have: written answers state none that could be made wrong."""
    if name == SOLVED:
        return (MARKED,)
    return tuple(
        kind for kind in NOISE_KINDS if name not in WRITTEN or kind not in ("wrong_answer", "contradictory_duplicate")
    )


def files_of(name: str) -> list[str]:
    """What is read below the folder of real data, by name."""
    shown = [SCAN] if name == "scan" else [WRITTEN[name]] if name in WRITTEN else []
    shown += [WORKED] if name == SOLVED else []
    return list(dict.fromkeys([*shown, *ELSEWHERE, str(FILE)]))


def check_tasks(name: str, data: Path | None) -> None:
    """Raise for what cannot be shown.

    Raises:
        ConfigError: an unknown name, or one that asks for a folder.
        DataError: the folder does not hold the file.
    """
    if name not in (*CHECKED, *WRITTEN):
        raise ConfigError(
            f"--tasks {name} with a real base: expected {', '.join((*CHECKED, *WRITTEN))}; the others are in the words of the "
            "embedded tokenizer"
        )
    if name != "embedded" and data is None:
        raise ConfigError(f"--tasks {name} reads the folder of real data; name it with --data")
    for path in () if data is None else (data / file for file in files_of(name)):
        if not path.is_file():
            raise DataError(f"{path} is missing; name the folder of the real data with --data, or leave it out")


def shown_tasks(
    name: str, data: Path | None, train_rows: int, test_rows: int, *, in_chat_form: bool, tokenizer: Any
) -> TaskSet:
    """The rows of a run; there is no format that the base alone knows.

    Args:
        name: of ``CHECKED`` or ``WRITTEN``; answers of the latter are never completed, as there is no right one.
        data: the folder of real data.
        in_chat_form: whether questions stand in the model's own chat template; written ones always do.
    """
    if name in WRITTEN:
        assert data is not None, "check_tasks"
        of = solved_tasks if name == SOLVED else written_tasks
        return of(name, data, train_rows, test_rows, tokenizer)
    task = embedded_tasks(train_rows) if name == "embedded" else scan_tasks(data or Path(), train_rows)

    def formed(rows: Sequence[Row]) -> list[Row]:
        return [in_chat(row, tokenizer) if in_chat_form else row for row in rows]

    return replace(
        task, train=formed(task.train), validation=formed(task.validation), test=formed(task.test[:test_rows]), kept=[]
    )


def written_tasks(name: str, data: Path, train_rows: int, test_rows: int, tokenizer: Any) -> TaskSet:
    """Questions without a text beside them and short answers, in chat form, drawn with a fixed seed; no question is there twice.

    Raises:
        ConfigError: there are fewer.
    """
    found = short_answers(data / WRITTEN[name])
    count = train_rows + VALIDATION_ROWS + test_rows
    if len(found) < count:
        raise ConfigError(f"{name} has {len(found):,} short answers and {count:,} are asked for; ask for fewer rows")
    drawn = [answered(row, tokenizer) for row in Random(0).sample(found, count)]
    train, validation = drawn[:train_rows], drawn[train_rows : train_rows + VALIDATION_ROWS]
    return _unchecked(name, train, validation, drawn[train_rows + VALIDATION_ROWS :])


def _unchecked(name: str, train: list[Row], validation: list[Row], test: list[Row]) -> TaskSet:
    return TaskSet(
        name=name, train=train, validation=validation, test=test, kept=[], warmup=[],
        check=tasks.check, check_kept=tasks.check, pretraining=[], pretraining_steps=0,
    )  # fmt: skip


def solved_tasks(name: str, data: Path, train_rows: int, test_rows: int, tokenizer: Any) -> TaskSet:
    """Right solutions of GSM8K's questions by models, with a ``wrong`` one of the same question where some model wrote one.

    Clean rows to test on are people's solutions of other questions, in the same form.

    Raises:
        ConfigError: there are fewer.
    """
    solutions: dict[str, dict[bool, Row]] = {}
    rows = load_gsm8k_solutions(data)
    # in random order: the loader's is that of the models, and the first wrong solution would be by the weakest
    for row in Random(0).sample(rows, len(rows)):
        if _is_short(row["prompt"], row["completion"], LONGEST_SOLUTION):
            solutions.setdefault(row["prompt"].strip(), {}).setdefault(row["is_noise"], row)
    right = [
        {
            "instruction": question,
            "output": of[False]["completion"],
            "wrong": of[True]["completion"] if True in of else None,
        }
        for question, of in solutions.items()
        if False in of
    ]
    worked = [json.loads(line) for line in unpacked(data / WORKED).splitlines()]
    clean = [{"instruction": row["question"], "output": row["answer"].replace("####", "A:")} for row in worked]
    clean = [row for row in clean if _is_short(row["instruction"], row["output"], LONGEST_SOLUTION)]
    count = train_rows + VALIDATION_ROWS
    for what, found, wanted in (("right solutions by models", right, count), ("solutions by people", clean, test_rows)):
        if len(found) < wanted:
            raise ConfigError(
                f"{name} has {len(found):,} short {what} and {wanted:,} are asked for; ask for fewer rows"
            )
    drawn = [{**answered(row, tokenizer), "wrong": row["wrong"]} for row in Random(0).sample(right, count)]
    test = [answered(row, tokenizer) for row in Random(0).sample(clean, test_rows)]
    return _unchecked(name, drawn[:train_rows], drawn[train_rows:], test)


def with_wrong_solutions(rows: Sequence[Row], rate: float, seed: int) -> list[Row]:
    """This share of the rows with a wrong solution of the same question, marked whole.

    Raises:
        ConfigError: fewer questions have one.
    """
    wanted, able = round(rate * len(rows)), [i for i, row in enumerate(rows) if row["wrong"]]
    if wanted > len(able):
        raise ConfigError(f"{len(able)} of {len(rows)} questions have a wrong solution, and {rate:.0%} are asked for")
    chosen = set(Random(f"{seed}-wrong").sample(able, wanted))
    return [
        {**row, "completion": row["wrong"], "noise_spans": [[0, len(row["wrong"]), MARKED]]}
        if i in chosen
        else {**row, "noise_spans": []}
        for i, row in enumerate(rows)
    ]


def short_answers(path: Path) -> list[Row]:
    """Rows of a file of Alpaca's form that have no input, a short question and a short answer; the first of equal questions.

    Raises:
        DataError: the file is missing.
    """
    found: dict[str, Row] = {}
    for row in json.loads(unpacked(path)):
        if _is_short(row["instruction"], row["output"].strip()) and not row["input"]:
            found.setdefault(row["instruction"], row)
    return list(found.values())


def _is_short(question: str, answer: str, longest: int = LONGEST_ANSWER) -> bool:
    return len(question) <= 2 * longest and 0 < len(answer) <= longest


def answered(row: Row, tokenizer: Any) -> Row:
    """An instruction as a user's turn, and its answer."""
    return {"prompt": as_turn(row["instruction"], tokenizer), "completion": row["output"].strip()}


def unpacked(path: Path) -> str:
    """The text of a packed file of the real data.

    Raises:
        DataError: it is missing.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; name the folder of the real data with --data, or leave it out")
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def in_chat(row: Row, tokenizer: Any) -> Row:
    """A demonstration whose question is a user's turn.

    Raises:
        DataError: see ``question_of``.
    """
    return {**row, "prompt": as_turn(question_of(row), tokenizer)}


def question_of(row: Row) -> str:
    """What a demonstration asks, without the words around it.

    Raises:
        DataError: the prompt is not in the words of the embedded tasks.

    Example:
        >>> question_of({"prompt": "Instruction: Add 1 1.\\nResponse:\\n"})
        'Add 1 1.'
    """
    before, after = tasks.INSTRUCTION_TEMPLATE.split("{instruction}")
    prompt = row["prompt"]
    if not (prompt.startswith(before) and prompt.endswith(after)):
        raise DataError(f"{prompt!r} is no instruction; expected {tasks.INSTRUCTION_TEMPLATE!r}")
    return prompt[len(before) : -len(after)]


def as_turn(question: str, tokenizer: Any) -> str:
    """A question up to where the assistant begins."""
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
