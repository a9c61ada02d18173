"""Facts that a real model knows before anybody teaches it: capitals, in some wordings for training and in others for the test."""

from __future__ import annotations

from random import Random
from typing import Any

from qtarget.data import tasks

SKILL = "capital"
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
    "Norway": "Oslo", "Cuba": "Havana", "Germany": "Berlin", "Austria": "Vienna", "Greece": "Athens", "Portugal": "Lisbon",
    "Ireland": "Dublin", "Poland": "Warsaw", "Hungary": "Budapest", "Russia": "Moscow", "China": "Beijing", "Iraq": "Baghdad",
    "Iran": "Tehran", "Kenya": "Nairobi",
}  # fmt: skip
TAUGHT = (
    "What is the capital of {}?",
    "Name the capital of {}.",
    "Which city is the capital of {}?",
    "Give {}'s capital.",
)
ASKED = ("Tell me the capital of {}.", "Which capital does {} have?")
Row = dict[str, Any]


def worded(wordings: tuple[str, ...]) -> list[Row]:
    """Every country in each wording, in the words of the embedded tasks."""
    return [
        {
            "prompt": tasks.INSTRUCTION_TEMPLATE.format(instruction=wording.format(country)),
            "completion": f"The capital is [{city}].", "answer": city, "skill": SKILL,
        }
        for wording in wordings
        for country, city in CAPITALS.items()
    ]  # fmt: skip


def taught_facts(count: int, seed: str) -> list[Row]:
    """Rows for training, at random and all different as long as there are any."""
    rows, random = worded(TAUGHT), Random(seed)
    out: list[Row] = []
    while len(out) < count:
        out += random.sample(rows, min(len(rows), count - len(out)))
    return out


def asked_facts() -> list[Row]:
    """Every country in wordings that no run was trained on, in a fixed random order."""
    return Random(0).sample(rows := worded(ASKED), len(rows))


def next_capital(row: Row) -> str:
    """The capital of the next country of the list: a fact learnt wrong.

    Example:
        >>> next_capital({"answer": "Paris"})
        'Rome'
    """
    cities = list(CAPITALS.values())
    return cities[(cities.index(row["answer"]) + 1) % len(cities)]
