"""A reward that anybody can check: the answer in brackets is the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BRACKETS = re.compile(r"\[(.*?)\]")


def in_brackets(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the first bracket holds the row's ``answer``, else 0; one number a completion.

    Example:
        >>> in_brackets(["The largest number is [7].", "It is 7."], ["7", "7"])
        [1.0, 0.0]
    """
    found = [BRACKETS.search(text) for text in completions]
    return [float(one is not None and one[1] == right) for one, right in zip(found, answer, strict=True)]
