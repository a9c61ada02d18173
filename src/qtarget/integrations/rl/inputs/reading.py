"""Rows for a model that writes the answers itself: a prompt, and in other columns what rewards compare with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import DataError, counted, inflected
from qtarget.data.files import Files, Located, Place, Row
from qtarget.data.formats.shape import ReadOptions
from qtarget.data.loading import load_rows, raw_rows, read_dataset
from qtarget.data.nested import as_written, rows_to_dataset

if TYPE_CHECKING:
    from datasets import Dataset

ANSWER = "answer"
"""Column that holds what a demonstration answered."""

logger = logging.getLogger(__name__)


def load_prompts(files: Files, options: ReadOptions | None = None) -> Dataset:
    """Prompts of files: rows that hold a ``prompt`` and no ``completion`` as they are, demonstrations without their answer.

    Args:
        files: as ``qtarget.data.loading.read_files``.
        options: how demonstrations are read.

    Returns:
        ``prompt`` (text, or messages that end with the user), ``answer`` of demonstrations (text), and every other column.

    Raises:
        DataError: as ``read_files``; a prompt that is neither text nor messages; a conversation without a question.
    """
    return _prompts(raw_rows(files, options), lambda: load_rows(files, options=options))


def read_prompts(dataset: Dataset, options: ReadOptions | None = None, name: str = "train data") -> Dataset:
    """The same of a ``Dataset``.

    Example:
        >>> from datasets import Dataset
        >>> read_prompts(Dataset.from_list([{"prompt": "2+2=", "completion": "4"}]))[0]
        {'prompt': '2+2=', 'answer': '4'}
    """
    where = Path(name)
    rows = ((Place(where, f"row {number}"), row) for number, row in enumerate(as_written(dataset)[0], start=1))
    return _prompts(rows, lambda: as_written(read_dataset(dataset, options, name))[0])


def _prompts(rows: Iterable[Located], demonstrations: Callable[[], Sequence[Row]]) -> Dataset:
    """The rows where all are prompts, else what ``demonstrations`` reads of them, each without its answer."""
    located = list(rows)
    if not located:
        raise DataError("there are no rows; expected one prompt a row")
    bare = [
        row for _, row in located if isinstance(row, dict) and row.get("prompt") is not None and "completion" not in row
    ]
    if bare and not any(isinstance(row, dict) and {"completion", "messages"} & set(row) for _, row in located):
        for place, row in located:
            if not isinstance(row, dict) or row.get("prompt") is None:
                raise DataError(
                    f"{place}: no prompt, as {counted(len(bare), 'other row')} {inflected(len(bare), 'have')}; write one, or take "
                    "the row out"
                )
            check_prompt(row["prompt"], str(place))  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
        return rows_to_dataset(bare)
    asked = [without_answer(row, number) for number, row in enumerate(demonstrations(), start=1)]
    logger.warning(
        "%d demonstrations: their prompts are taken, their answers stand in the column %r", len(asked), ANSWER
    )
    return rows_to_dataset(asked)


def check_prompt(prompt: Any, place: str) -> None:
    """Raise for what TRL would stumble over.

    Raises:
        DataError: neither text nor messages with role and content, nothing in it, or an answer at its end.
    """
    if isinstance(prompt, str) and prompt:
        return
    good = (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and "role" in m and "content" in m for m in prompt)
    )
    if not good:
        raise DataError(
            f"{place}: prompt is {str(prompt)[:60]!r}; expected text, or a list of messages with role and content"
        )
    if prompt[-1]["role"] == "assistant":  # pyright: ignore[reportArgumentType, reportCallIssue]
        raise DataError(f"{place}: the prompt ends with the assistant; expected the user or a tool: the model answers")


def without_answer(row: Row, number: int) -> Row:
    """A demonstration as a prompt: the last answer stands in ``answer``, as text.

    Raises:
        DataError: there is no question before it.

    Example:
        >>> asked = {"role": "user", "content": "2+2"}
        >>> without_answer({"messages": [asked, {"role": "assistant", "content": "4"}]}, 1)
        {'prompt': [{'role': 'user', 'content': '2+2'}], 'answer': '4'}
    """
    others = {key: value for key, value in row.items() if key not in ("messages", "prompt", "completion")}
    if "prompt" in row and "completion" in row:
        completion = row["completion"]
        text = completion if isinstance(completion, str) else _text(completion[-1] if completion else {})
        return {"prompt": row["prompt"], ANSWER: text, **others}
    if "messages" not in row:
        raise DataError(
            f"row {number} holds {', '.join(row)} and no question; expected prompt, prompt + completion or messages"
        )
    messages = row["messages"]
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends or not ends[-1]:
        raise DataError(
            f"row {number}: a conversation without an answer after a question; expected user, then assistant"
        )
    return {"prompt": messages[: ends[-1]], ANSWER: _text(messages[ends[-1]]), **others}


def _text(message: Row) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "" if content is None else str(content)
