"""Twelve small skills with exact answers, in two formats.

The embedded base model learns the skills from documents in its *own* format (``reverse: KDQF = FQDK``). Demonstrations ask for
the same skills in an *instruction* format that the base model has never seen, so that fine-tuning has something to teach and
the knowledge to answer is already there.

Letters in questions are upper case and digits stand alone, because the embedded tokenizer never merges these: a model of a
million parameters then sees every character that it has to reverse, sort or add.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from qtarget.errors import DataError

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FORGETTING_SKILLS = ("minimum", "subtract", "zero_pad")
"""Skills that the base model knows and that no demonstration shows: their accuracy after training measures forgetting."""

TEST_SHARE_PERCENT = 10
INSTRUCTION_TEMPLATE = "Instruction: {instruction}\nResponse:\n"


@dataclass(frozen=True)
class Problem:
    """One question with its only right answer.

    ``question`` holds the fields that a phrasing fills in, in order; ``(skill, question)`` identifies the problem.
    """

    skill: str
    question: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Skill:
    """How to draw a problem (``sample``: random source -> question fields and answer) and how to word it.

    ``phrasings`` are the base model's own, each up to the answer; ``instructions`` and ``responses`` are the demonstrations'.
    """

    sample: Callable[[Random], tuple[tuple[str, ...], str]]
    phrasings: tuple[str, ...]
    instructions: tuple[str, ...]
    responses: tuple[str, ...]


def _letters(rng: Random, shortest: int, longest: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(shortest, longest)))


def _digits(rng: Random, fewest: int, most: int) -> list[str]:
    return rng.sample("0123456789", rng.randint(fewest, most))


def _sample_reverse(rng: Random) -> tuple[tuple[str, ...], str]:
    text = _letters(rng, 3, 5)
    return (text,), text[::-1]


def _sample_last_letter(rng: Random) -> tuple[tuple[str, ...], str]:
    text = _letters(rng, 3, 6)
    return (text,), text[-1]


def _sample_join(rng: Random) -> tuple[tuple[str, ...], str]:
    text = _letters(rng, 3, 5)
    return (" ".join(text),), "-".join(text)


def _sample_count(rng: Random) -> tuple[tuple[str, ...], str]:
    text = _letters(rng, 2, 7)
    return (" ".join(text),), str(len(text))


def _sample_sort(rng: Random) -> tuple[tuple[str, ...], str]:
    items = _digits(rng, 3, 4)
    return (" ".join(items),), " ".join(sorted(items))


def _sample_maximum(rng: Random) -> tuple[tuple[str, ...], str]:
    items = _digits(rng, 3, 5)
    return (" ".join(items),), max(items)


def _sample_minimum(rng: Random) -> tuple[tuple[str, ...], str]:
    items = _digits(rng, 3, 5)
    return (" ".join(items),), min(items)


def _sample_add(rng: Random) -> tuple[tuple[str, ...], str]:
    left, right = rng.randint(10, 89), rng.randint(1, 9)
    return (str(left), str(right)), str(left + right)


def _sample_subtract(rng: Random) -> tuple[tuple[str, ...], str]:
    left, right = rng.randint(20, 99), rng.randint(1, 9)
    return (str(left), str(right)), str(left - right)


def _sample_lookup(rng: Random) -> tuple[tuple[str, ...], str]:
    keys = rng.sample(LETTERS, rng.randint(2, 4))
    values = [str(rng.randint(0, 99)) for _ in keys]
    asked = rng.randrange(len(keys))
    table = ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    return (table, keys[asked]), values[asked]


def _sample_date_format(rng: Random) -> tuple[tuple[str, ...], str]:
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    return (f"{year}-{month:02d}-{day:02d}",), f"{day} {MONTHS[month - 1]} {year}"


def _sample_zero_pad(rng: Random) -> tuple[tuple[str, ...], str]:
    number = str(rng.randint(0, 10 ** rng.randint(1, 4) - 1))
    return (number,), number.zfill(5)


SKILLS: Mapping[str, Skill] = {
    "reverse": Skill(
        _sample_reverse,
        ("reverse: {0} =", "{0} reversed =", "backwards {0} =", "Q: What is {0} backwards? A:", "The reverse of {0} is"),
        ("Write {0} backwards.", "Reverse the letters of {0}.", "What is the reverse of {0}?", "Spell {0} from the end."),
        ("Backwards, it reads [{0}].", "The reversed letters are [{0}]."),
    ),
    "last_letter": Skill(
        _sample_last_letter,
        ("last: {0} =", "{0} last letter =", "end of {0} =", "Q: What is the last letter of {0}? A:", "The word {0} ends with"),
        ("Name the last letter of {0}.", "Which letter ends {0}?", "What does {0} end with?", "Give the final letter of {0}."),
        ("It ends with [{0}].", "The last letter is [{0}]."),
    ),
    "join": Skill(
        _sample_join,
        ("join: {0} =", "{0} joined =", "dashes {0} =", "Q: What is {0} joined with dashes? A:", "With dashes, {0} is"),
        ("Join {0} with dashes.", "Put dashes between {0}.", "Connect the letters {0} by dashes.", "Write {0} with dashes."),
        ("With dashes, this is [{0}].", "Joined, the letters are [{0}]."),
    ),
    "count": Skill(
        _sample_count,
        ("count: {0} =", "{0} count =", "length {0} =", "Q: How many letters are in {0}? A:", "The number of letters in {0} is"),
        ("Count the letters in {0}.", "How many letters are there: {0}?", "Give the number of letters in {0}.", "How long is {0}?"),
        ("There are [{0}] letters.", "I count [{0}] in all."),
    ),
    "sort": Skill(
        _sample_sort,
        ("sort: {0} =", "{0} sorted =", "order {0} =", "Q: What is {0} in order? A:", "The sorted list of {0} is"),
        ("Sort {0} from low to high.", "Put {0} in order.", "Arrange the list {0} in order.", "What is {0} when sorted?"),
        ("In order, the list is [{0}].", "Sorted from low to high: [{0}]."),
    ),
    "maximum": Skill(
        _sample_maximum,
        ("max: {0} =", "{0} max =", "largest {0} =", "Q: What is the largest of {0}? A:", "The maximum of {0} is"),
        ("Find the largest of {0}.", "Which is the largest: {0}?", "Give the maximum of {0}.", "Name the largest number in {0}."),
        ("The largest number is [{0}].", "The maximum here is [{0}]."),
    ),
    "minimum": Skill(
        _sample_minimum,
        ("min: {0} =", "{0} min =", "smallest {0} =", "Q: What is the smallest of {0}? A:", "The minimum of {0} is"),
        ("Find the smallest of {0}.", "Which is the smallest: {0}?", "Give the minimum of {0}.", "Name the smallest number in {0}."),
        ("The smallest number is [{0}].", "The minimum here is [{0}]."),
    ),
    "add": Skill(
        _sample_add,
        ("add: {0} + {1} =", "{0} + {1} =", "{0} plus {1} =", "Q: What is {0} + {1}? A:", "The sum of {0} and {1} is"),
        ("Add {0} and {1}.", "What is {0} plus {1}?", "Compute {0} + {1}.", "Find the sum of {0} and {1}."),
        ("The sum is [{0}].", "Together they make [{0}]."),
    ),
    "subtract": Skill(
        _sample_subtract,
        ("subtract: {0} - {1} =", "{0} - {1} =", "{0} minus {1} =", "Q: What is {0} - {1}? A:", "Taking {1} from {0} gives"),
        ("Subtract {1} from {0}.", "What is {0} minus {1}?", "Compute {0} - {1}.", "Take {1} from {0}."),
        ("The difference is [{0}].", "What remains is [{0}]."),
    ),
    "lookup": Skill(
        _sample_lookup,
        ("lookup: {0}; {1} =", "{0}; {1}? =", "given {0}, {1} =", "Q: What is {1} if {0}? A:", "With {0}, the value of {1} is"),
        ("Given {0}, find {1}.", "What is {1} if {0}?", "Look up {1} in {0}.", "Give the value of {1} in {0}."),
        ("The value is [{0}].", "The table says [{0}]."),
    ),
    "date_format": Skill(
        _sample_date_format,
        ("date: {0} =", "{0} in words =", "long {0} =", "Q: What is the date {0} in words? A:", "The date {0} is"),
        ("Write the date {0} in words.", "Which date is {0}?", "Give {0} as a long date.", "Put the date {0} in words."),
        ("In words, the date is [{0}].", "This is the day [{0}]."),
    ),
    "zero_pad": Skill(
        _sample_zero_pad,
        ("pad: {0} =", "{0} padded =", "zeros {0} =", "Q: What is {0} with five digits? A:", "With zeros, {0} is"),
        ("Pad {0} with zeros.", "Write {0} with five digits.", "What is {0} when padded?", "Fill {0} with zeros."),
        ("Padded, it is [{0}].", "With five digits, it is [{0}]."),
    ),
}
DEMONSTRATED_SKILLS = tuple(skill for skill in SKILLS if skill not in FORGETTING_SKILLS)

_BRACKETED = re.compile(r"\[([^\[\]]*)\]")


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
        Problem(skill='reverse', question=('NBI',), answer='IBN')
    """
    question, answer = _skill(skill).sample(rng)
    return Problem(skill, question, answer)


def problem_split(problem: Problem) -> str:
    """``"test"`` for a tenth of all problems, ``"train"`` for the rest, by a hash of the question.

    The base model's corpus and the training demonstrations hold train problems only, so a test problem is new to both.
    """
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
        ``prompt`` (ends before the space in front of the answer), ``completion`` (that space and the answer), ``answer``
        and ``skill``.
    """
    prompt = rng.choice(_skill(problem.skill).phrasings).format(*problem.question)
    return {"prompt": prompt, "completion": f" {problem.answer}", "answer": problem.answer, "skill": problem.skill}


def pretraining_text(problem: Problem, rng: Random) -> str:
    """One document of the base model's corpus, without the end-of-text token.

    Example:
        >>> pretraining_text(Problem("reverse", ("KDQF",), "FQDK"), Random(1))
        '{0} reversed = FQDK'
    """
    example = pretraining_example(problem, rng)
    return example["prompt"] + example["completion"]


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
        raise DataError(f"row has no 'answer' to check against, only {sorted(row)}; checkable rows come from demonstration()")
    return row["answer"]
