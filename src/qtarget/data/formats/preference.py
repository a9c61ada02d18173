"""Rows of two answers, or of answers that were judged: what they are, and how to make rows that teach one answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qtarget.core.errors import counted
from qtarget.data.formats.hints import HALVES, OTHER_NAMES
from qtarget.data.formats.messages import CALL_ROLES, CERTAIN_ROLES
from qtarget.data.formats.shape import ReadOptions, Row, present

TURNS = ("messages", "conversations")
MARKS = ("label", "kto_tag")
"""Columns of TRL's and LLaMA-Factory's KTO rows: whether an answer was wanted."""


def is_pair(row: Row, options: ReadOptions) -> bool:
    """Whether a row holds two answers, ``chosen`` and ``rejected``, and none of its own to train on.

    A conversation with an answer in it is trained as it is, unless the two are the turn that comes next in it.

    Example:
        >>> is_pair({"prompt": "a", "chosen": "b", "rejected": "c"}, ReadOptions())
        True
        >>> is_pair({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}, ReadOptions())
        False
    """
    if not all(isinstance(row.get(name), str | list | dict) for name in ("chosen", "rejected")):
        return False
    if any(present(row, *names) for names in (("input_ids",), ("prompt", "completion"), ("instruction", "output"))):
        return False
    # the text column is read before other people's conversations where the user named it, and after them where not
    if present(row, options.text_field) and (options.text_field != "text" or not any(present(row, n) for n in TURNS)):
        return False
    follows = _answers(_listed(row["chosen"])[:1], options)
    return not any(_answers(turns[-1:] if follows else turns, options) for turns in _conversations(row))


def refusal(row: Row, options: ReadOptions) -> str:
    """What is said of a pair, with the next steps."""
    answered = any(_answers(turns, options) for turns in _conversations(row))
    more = ", and to train on the answers before them alone, remove both columns" * answered
    return (
        "a preference pair (`chosen` and `rejected`); answers are trained here, not pairs. Next: to train on the chosen "
        f"answers, {next_step(row)}; to train on pairs, take TRL's DPOTrainer{more}"
    )


def next_step(row: Row) -> str:
    """What makes a demonstration of a pair.

    Example:
        >>> next_step({"prompt": "a", "chosen": "b", "rejected": "c"})
        "rename 'chosen' to 'completion' and leave 'rejected' out"
    """
    chosen, turns = row["chosen"], next((name for name in TURNS if present(row, name)), None)
    if any(_role(turn) == "user" for turn in _listed(chosen)):
        others = f"{turns!r} and " if turns else ""
        return f"rename 'chosen' to 'messages' and leave {others}'rejected' out"
    if turns is not None:
        return f"put 'chosen' at the end of {turns!r}, as the assistant's turn, and leave 'rejected' out"
    askers = ("prompt", "instruction", *(name for name, ours in OTHER_NAMES.items() if ours == "prompt"))
    asked = next((name for name in askers if present(row, name)), None)
    if asked is None and isinstance(chosen, str):
        return (
            "split the last answer off 'chosen': call it 'completion' and what stands before it 'prompt', and leave "
            "'rejected' out"
        )
    if asked is None:
        return "rename 'chosen' to 'completion', add 'prompt', a list of messages too, and leave 'rejected' out"
    renamed = f"{asked!r} to 'prompt' and " if asked not in HALVES else ""
    answer = HALVES.get(asked, "completion")
    text = isinstance(row[asked], str)
    same = isinstance(chosen, str) if text else isinstance(chosen, list)
    form = "" if same else f" (as {asked!r}: {'text' if text else 'a list of messages'})"
    return f"rename {renamed}'chosen' to {answer!r}{form} and leave 'rejected' out"


def is_rejected(mark: str, row: Row, made: Row) -> bool:
    """Whether a row marks its own answer as one that was not wanted.

    Args:
        mark: name of the column.
        made: the row as training takes it.
    """
    return ("completion" in made or "messages" in made) and str(row.get(mark)).lower() == "false"


def rejected_lines(rejected: Mapping[str, int]) -> list[str]:
    """What is said of answers that were not wanted: one sentence for each column that marks them.

    Example:
        >>> rejected_lines({"label": 2})[0][:32]
        '2 rows with `label` false, train'
    """
    return [
        f"{counted(n, 'row')} with `{name}` false, trained like the others: if that marks rejected answers (KTO), take "
        "these rows out"
        for name, n in rejected.items()
    ]


def _conversations(row: Row) -> list[list[Any]]:
    return [_listed(row.get(name)) for name in TURNS]


def _listed(value: Any) -> list[Any]:
    """Messages, which a table holds as JSON text; one that stands alone, too."""
    if isinstance(value, dict):
        return [value]
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def _role(turn: Any, roles: Mapping[str, str] | None = None) -> str | None:
    name = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(name, str):
        return None
    return (roles or {}).get(name) or CERTAIN_ROLES.get(name.lower(), name.lower())


def _answers(turns: list[Any], options: ReadOptions) -> bool:
    """Whether one of these turns is an answer."""
    return any(_role(turn, options.roles) in ("assistant", *CALL_ROLES) for turn in turns)
