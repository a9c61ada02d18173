"""Problems, their two formats, and exact checkers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from qtarget.core.errors import DataError
from qtarget.data.tasks.skills import SKILLS, Skill

TEST_SHARE_PERCENT = 10
INSTRUCTION_TEMPLATE = "Instruction: {instruction}\nResponse:\n"

# Frames of the base model's corpus. None has the demonstrations' marks: "Instruction", "Response" and square brackets.
OPENINGS = (
    "", "Task: ", "Exercise: ", "Please help me. ", "Hello! ", "Problem 7: ", "Now we go on. ", "Quiz\n", "(b) ",
    "Dear reader, here is one: ",
)  # fmt: skip
BRIDGES = (
    " =", " ->", "\nSolution:", "\nWe get", "\nThe solution is", "\nI think that it must be", "\n>>>", "\nOut:\n",
    "\nSo the result of all this is", "\nThis one is easy:", "\nFrom the above we see",
    "\nReader: let me think.\nIt is",
)  # fmt: skip
ENCLOSURES = (
    ("", ""),
    ("", "."),
    ("(", ")"),
    ('"', '".'),
    ("'", "'"),
    ("<", "> for sure."),
    ("{", "}."),
    ("*", "* in all"),
)

_BRACKETED = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Problem:
    """One question with its only right answer.

    ``question`` holds the fields that a phrasing fills in, in order; ``(skill, question)`` identifies the problem.
    """

    skill: str
    question: tuple[str, ...]
    answer: str


def _skill(name: str) -> Skill:
    if name not in SKILLS:
        raise DataError(f"unknown skill {name!r}; known skills: {', '.join(SKILLS)}")
    return SKILLS[name]


def sample_problem(skill: str, rng: Random) -> Problem:
    """Draw one problem of ``skill``.

    Raises:
        DataError: no skill goes by this name.

    Example:
        >>> sample_problem("reverse", Random(0))
        Problem(skill='reverse', question=('YNBI',), answer='IBNY')
    """
    question, answer = _skill(skill).sample(rng)
    return Problem(skill, question, answer)


def problem_split(problem: Problem) -> str:
    """``"test"`` for a tenth of all problems, ``"train"`` for the rest, by a hash of the question.

    The base model's corpus and the training demonstrations hold train problems only, so a test problem is new to both.
    """
    # not Python's own hash, which changes from process to process
    key = "\x1f".join((problem.skill, *problem.question)).encode()
    bucket = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 100
    return "test" if bucket < TEST_SHARE_PERCENT else "train"


def sample_problem_in(skill: str, split: str, rng: Random) -> Problem:
    """Draw one problem of ``skill`` that belongs to ``split`` (``"train"`` or ``"test"``).

    Raises:
        DataError: unknown skill or split.
    """
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}; expected 'train' or 'test'")
    while True:
        problem = sample_problem(skill, rng)
        if problem_split(problem) == split:
            return problem


def pretraining_example(problem: Problem, rng: Random) -> dict[str, str]:
    """``problem`` in the base model's own format, in one of its phrasings.

    Returns:
        ``prompt`` (up to the space in front of the answer), ``completion`` (that space and the answer), ``answer`` and
        ``skill``.
    """
    prompt = rng.choice(_skill(problem.skill).phrasings).format(*problem.question)
    return {"prompt": prompt, "completion": f" {problem.answer}", "answer": problem.answer, "skill": problem.skill}


def pretraining_text(problem: Problem, rng: Random) -> str:
    """One document of the base model's corpus, without the end-of-text token.

    Example:
        >>> pretraining_text(Problem("reverse", ("KDQF",), "FQDK"), Random(1))
        'KDQF reversed = FQDK'
    """
    example = pretraining_example(problem, rng)
    return example["prompt"] + example["completion"]


def framed_example(problem: Problem, rng: Random) -> dict[str, str]:
    """``problem`` as any text may hold it: an opening, a question in any wording, words in between, an enclosed answer.

    The base model reads such documents too, so that it finds the answer whatever surrounds it; the frames of the
    demonstrations are not among them.

    Returns:
        The columns of `pretraining_example`.
    """
    skill = _skill(problem.skill)
    wordings = (*skill.instructions, *(phrasing.removesuffix(" =") for phrasing in skill.phrasings))
    prompt = rng.choice(OPENINGS) + rng.choice(wordings).format(*problem.question) + rng.choice(BRIDGES)
    before, after = rng.choice(ENCLOSURES)
    space = "" if prompt.endswith("\n") else " "
    return {
        "prompt": prompt,
        "completion": f"{space}{before}{problem.answer}{after}",
        "answer": problem.answer,
        "skill": problem.skill,
    }


def demonstration(problem: Problem, rng: Random) -> dict[str, str]:
    """``problem`` as a row in the instruction format.

    Returns:
        ``prompt`` (instruction, ends with a new line), ``completion`` (a sentence with the answer in square brackets),
        ``answer`` and ``skill``.
    """
    skill = _skill(problem.skill)
    instruction = rng.choice(skill.instructions).format(*problem.question)
    return {
        "prompt": INSTRUCTION_TEMPLATE.format(instruction=instruction),
        "completion": rng.choice(skill.responses).format(problem.answer),
        "answer": problem.answer,
        "skill": problem.skill,
    }


def extract_answer(generated_text: str) -> str | None:
    """The text in the only pair of square brackets; None if there is no pair or more than one.

    Example:
        >>> extract_answer("The sum is [42].")
        '42'
    """
    found = _BRACKETED.findall(generated_text)
    return found[0] if len(found) == 1 else None


def check(row: Mapping[str, str], generated_text: str) -> bool:
    """Whether ``generated_text`` answers a demonstration row: exactly one bracketed answer, equal to ``row["answer"]``.

    Raises:
        DataError: the row has no ``answer``.
    """
    return extract_answer(generated_text) == _answer(row)


def check_pretraining(row: Mapping[str, str], generated_text: str) -> bool:
    """Whether ``generated_text`` answers a row in the base model's own format: nothing but the answer.

    Raises:
        DataError: the row has no ``answer``.
    """
    return generated_text.strip() == _answer(row)


def _answer(row: Mapping[str, str]) -> str:
    if "answer" not in row:
        raise DataError(f"row has no 'answer' to check against, only {sorted(row)}; use rows made by demonstration()")
    return row["answer"]
