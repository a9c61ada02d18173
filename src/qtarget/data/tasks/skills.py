"""The skills: how a problem is drawn, and how it is worded in the base model's own and in the instruction format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

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
"""Known to the base model and shown by no demonstration: their accuracy after training measures forgetting."""


@dataclass(frozen=True)
class Skill:
    """How to draw a problem and how to word it.

    ``sample`` maps a random source to the question's fields and the answer. ``phrasings`` are the base model's own, up
    to the answer; ``instructions`` and ``responses`` are those of the demonstrations.
    """

    sample: Callable[[Random], tuple[tuple[str, ...], str]]
    phrasings: tuple[str, ...]
    instructions: tuple[str, ...]
    responses: tuple[str, ...]


def _letters(rng: Random, shortest: int, longest: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(shortest, longest)))


def _digits(rng: Random, fewest: int, most: int) -> list[str]:
    # each digit once, so that the largest is one
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
    # the sum has two digits too
    left, right = rng.randint(10, 89), rng.randint(1, 9)
    return (str(left), str(right)), str(left + right)


def _sample_subtract(rng: Random) -> tuple[tuple[str, ...], str]:
    # the difference has two digits too
    left, right = rng.randint(20, 99), rng.randint(1, 9)
    return (str(left), str(right)), str(left - right)


def _sample_lookup(rng: Random) -> tuple[tuple[str, ...], str]:
    keys = rng.sample(LETTERS, rng.randint(2, 4))
    values = [str(rng.randint(0, 99)) for _ in keys]
    asked = rng.randrange(len(keys))
    table = ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    return (table, keys[asked]), values[asked]


def _sample_date_format(rng: Random) -> tuple[tuple[str, ...], str]:
    # days that every month has
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    return (f"{year}-{month:02d}-{day:02d}",), f"{day} {MONTHS[month - 1]} {year}"


def _sample_zero_pad(rng: Random) -> tuple[tuple[str, ...], str]:
    number = str(rng.randint(0, 10 ** rng.randint(1, 4) - 1))
    return (number,), number.zfill(5)


SKILLS: Mapping[str, Skill] = {
    "reverse": Skill(
        _sample_reverse,
        (
            "reverse: {0} =",
            "{0} reversed =",
            "backwards {0} =",
            "Q: What is {0} backwards? A:",
            "The reverse of {0} is",
        ),
        (
            "Write {0} backwards.",
            "Reverse the letters of {0}.",
            "What is the reverse of {0}?",
            "Spell {0} from the end.",
        ),
        ("Backwards, it reads [{0}].", "The reversed letters are [{0}]."),
    ),
    "last_letter": Skill(
        _sample_last_letter,
        (
            "last: {0} =",
            "{0} last letter =",
            "end of {0} =",
            "Q: What is the last letter of {0}? A:",
            "The word {0} ends with",
        ),
        (
            "Name the last letter of {0}.",
            "Which letter ends {0}?",
            "What does {0} end with?",
            "Give the final letter of {0}.",
        ),
        ("It ends with [{0}].", "The last letter is [{0}]."),
    ),
    "join": Skill(
        _sample_join,
        ("join: {0} =", "{0} joined =", "dashes {0} =", "Q: What is {0} joined with dashes? A:", "With dashes, {0} is"),
        (
            "Join {0} with dashes.",
            "Put dashes between {0}.",
            "Connect the letters {0} by dashes.",
            "Write {0} with dashes.",
        ),
        ("With dashes, this is [{0}].", "Joined, the letters are [{0}]."),
    ),
    "count": Skill(
        _sample_count,
        (
            "count: {0} =",
            "{0} count =",
            "length {0} =",
            "Q: How many letters are in {0}? A:",
            "The number of letters in {0} is",
        ),
        (
            "Count the letters in {0}.",
            "How many letters are there: {0}?",
            "Give the number of letters in {0}.",
            "How long is {0}?",
        ),
        ("There are [{0}] letters.", "I count [{0}] in all."),
    ),
    "sort": Skill(
        _sample_sort,
        ("sort: {0} =", "{0} sorted =", "order {0} =", "Q: What is {0} in order? A:", "The sorted list of {0} is"),
        (
            "Sort {0} from low to high.",
            "Put {0} in order.",
            "Arrange the list {0} in order.",
            "What is {0} when sorted?",
        ),
        ("In order, the list is [{0}].", "Sorted from low to high: [{0}]."),
    ),
    "maximum": Skill(
        _sample_maximum,
        ("max: {0} =", "{0} max =", "largest {0} =", "Q: What is the largest of {0}? A:", "The maximum of {0} is"),
        (
            "Find the largest of {0}.",
            "Which is the largest: {0}?",
            "Give the maximum of {0}.",
            "Name the largest number in {0}.",
        ),
        ("The largest number is [{0}].", "The maximum here is [{0}]."),
    ),
    "minimum": Skill(
        _sample_minimum,
        ("min: {0} =", "{0} min =", "smallest {0} =", "Q: What is the smallest of {0}? A:", "The minimum of {0} is"),
        (
            "Find the smallest of {0}.",
            "Which is the smallest: {0}?",
            "Give the minimum of {0}.",
            "Name the smallest number in {0}.",
        ),
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
        (
            "subtract: {0} - {1} =",
            "{0} - {1} =",
            "{0} minus {1} =",
            "Q: What is {0} - {1}? A:",
            "Taking {1} from {0} gives",
        ),
        ("Subtract {1} from {0}.", "What is {0} minus {1}?", "Compute {0} - {1}.", "Take {1} from {0}."),
        ("The difference is [{0}].", "What remains is [{0}]."),
    ),
    "lookup": Skill(
        _sample_lookup,
        (
            "lookup: {0}; {1} =",
            "{0}; {1}? =",
            "given {0}, {1} =",
            "Q: What is {1} if {0}? A:",
            "With {0}, the value of {1} is",
        ),
        ("Given {0}, find {1}.", "What is {1} if {0}?", "Look up {1} in {0}.", "Give the value of {1} in {0}."),
        ("The value is [{0}].", "The table says [{0}]."),
    ),
    "date_format": Skill(
        _sample_date_format,
        ("date: {0} =", "{0} in words =", "long {0} =", "Q: What is the date {0} in words? A:", "The date {0} is"),
        (
            "Write the date {0} in words.",
            "Which date is {0}?",
            "Give {0} as a long date.",
            "Put the date {0} in words.",
        ),
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
