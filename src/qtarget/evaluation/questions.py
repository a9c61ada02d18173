"""Rows as questions with answers: the formats of training, split where the model has to take over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.columns import parsed_weight
from qtarget.evaluation.judges import Judge, UnfitReference, unfit

Prompt = str | list[dict[str, Any]]
"""Text, or the messages before the answer."""


@dataclass(frozen=True)
class Question:
    """One row, asked.

    Attributes:
        number: of the row in its file, from 0.
        prompt: what the model gets.
        reference: the row's own answer, as text.
        row: as read from the file.
        template: keyword arguments for the chat template.
        counts: whether its answer has a weight above 0; one that nobody is to learn judges nobody.
    """

    number: int
    prompt: Prompt
    reference: str
    row: Mapping[str, Any]
    template: Mapping[str, Any]
    counts: bool = True

    @property
    def text(self) -> str:
        """The prompt as people read it."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {content_text(message)}" for message in self.prompt)


def content_text(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, or the text parts of it.

    Example:
        >>> content_text({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})
        'ab'
    """
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def has_answers(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rows, all of one shape, are of one that has answers: prompt and completion, or messages."""
    return ("prompt" in rows[0] and "completion" in rows[0]) or "messages" in rows[0]


def ask(rows: Sequence[Mapping[str, Any]], judge: Judge, name: str) -> list[Question]:
    """The rows as questions, each with an answer that the judge can compare.

    Args:
        name: of the file, for errors.

    Raises:
        DataError: rows without answers, or an answer that the judge cannot compare.
    """
    if not has_answers(rows):
        raise DataError(
            f"{name}: rows without answers (columns {', '.join(rows[0])}); completion needs `prompt` and `completion`, or "
            "`messages` that end with the assistant's; --no-generate scores their likelihood alone"
        )
    questions = []
    for number, row in enumerate(rows):
        where = f"{name}, row {number + 1}"
        prompt, answer = split(row, where)
        if not answer.strip():
            raise DataError(f"{where}: the answer is empty; give it one, or leave the row out")
        try:
            judge.fit(answer)
        except UnfitReference as error:
            raise unfit(judge, where, error) from error
        questions.append(Question(number, prompt, answer, row, _template_arguments(row), answer_counts(row, where)))
    if not any(one.counts for one in questions):
        raise DataError(
            f"{name}: all {len(rows):,} rows have answers of weight 0, which judge nobody; take the weights away, or give rows "
            "with answers to be learned"
        )
    return questions


def answer_counts(row: Mapping[str, Any], where: str) -> bool:
    """Whether the row and its answer have a weight above 0.

    Raises:
        DataError: a weight is no finite number of at least 0.

    Example:
        >>> answer_counts({"prompt": "2+2", "completion": "4", "weight": 0}, "row 1")
        False
    """
    messages = row["messages"] if row.get("prompt") is None else row["completion"]
    said = [] if isinstance(messages, str) else [one for one in messages if one.get("role") == "assistant"][-1:]
    try:
        return all(parsed_weight(one.get("weight"), "weight") != 0 for one in (row, *said))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def split(row: Mapping[str, Any], where: str) -> tuple[Prompt, str]:
    """Prompt and answer of a row; of messages the answer is the assistant's last one, the prompt all before it.

    Raises:
        DataError: there is no such message, or nothing before it.

    Example:
        >>> split({"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}, "row 0")
        ([{'role': 'user', 'content': '2+2'}], '4')
    """
    if row.get("prompt") is not None:
        prompt, answer = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return prompt, answer
        return _messages(prompt), "".join(content_text(message) for message in answer)
    messages = _messages(row["messages"])
    last = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "assistant"), None)
    if not last:
        what = "no message of the assistant" if last is None else "nothing before the assistant's message"
        raise DataError(f"{where}: {what}; expected a question and then its answer, or pass --no-generate")
    return messages[:last], content_text(messages[last])


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Without keys that hold nothing: Parquet gives every message all of them, and templates look which are there."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """As TRL reads them off a row."""
    tools = row.get("tools")
    arguments = {"tools": json.loads(tools) if isinstance(tools, str) else tools} if tools else {}
    return arguments | dict(row.get("chat_template_kwargs") or {})
