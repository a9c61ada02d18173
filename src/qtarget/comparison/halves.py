"""Rows that choose a learning rate never judge what was chosen by them: two halves, each tuned on the other."""

from __future__ import annotations

from collections.abc import Sequence

from qtarget.storage.files import digest


def groups_of(questions: Sequence[str]) -> list[int]:
    """A number a row, equal for rows of one question.

    Args:
        questions: see ``qtarget.data.prompts.questions_of``.

    Example:
        >>> groups_of(["a", "b", "a"])
        [0, 1, 0]
    """
    known: dict[str, int] = {}
    return [known.setdefault(question, len(known)) for question in questions]


def halves(questions: Sequence[str]) -> list[int]:
    """0 or 1 a row: by question, so that duplicates stay together, and the same whatever the order of the rows.

    Example:
        >>> parts = halves("abca")
        >>> sorted(parts[:3]) in ([0, 0, 1], [0, 1, 1]), parts[0] == parts[3]
        (True, True)
    """
    ordered = sorted(set(questions), key=lambda question: digest(question.encode("utf-8", "surrogatepass")))
    part = {question: i % 2 for i, question in enumerate(ordered)}
    return [part[question] for question in questions]
