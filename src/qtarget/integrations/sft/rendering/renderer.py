"""The chat template as training uses it, for one row at a time."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl.data_utils import _tokenize, maybe_convert_to_chatml

Row = dict[str, Any]


@dataclass(frozen=True)
class Renderer:
    """What decides a row's text, tokens and mask.

    Attributes:
        tokenizer: as training uses it.
        chat_template: TRL's training template where it replaces the tokenizer's own, else None.
        text_field: the text column.
        assistant_only, completion_only: the masks in use.
    """

    tokenizer: Any
    chat_template: str | None
    text_field: str
    assistant_only: bool
    completion_only: bool

    def messages(self, row: Row) -> list[Row]:
        """All messages of a row, prompt and completion in one; empty where it has none."""
        if isinstance(row.get("conversations"), list):
            row = maybe_convert_to_chatml(copy.deepcopy(row))
        if isinstance(row.get("prompt"), list):
            return [*row["prompt"], *(row.get("completion") or [])]
        return list(row.get("messages") or []) if isinstance(row.get("messages"), list) else []

    def conversational(self, dataset: Dataset) -> bool:
        """Whether the rows hold messages."""
        columns = dataset.column_names
        named = [c for c in ("prompt", "messages", "conversations") if c in columns]
        return bool(named) and isinstance(dataset[0][named[0]], list)

    def options(self, row: Row) -> dict[str, Any]:
        """Keywords of the template, as TRL passes them."""
        tools = row.get("tools")
        return {
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }

    def text(self, row: Row, messages: list[Row] | None = None) -> str:
        """The rendered conversation, or the row's text."""
        messages = self.messages(row) if messages is None else messages
        if messages:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **self.options(row))
        if isinstance(row.get("prompt"), str):
            return row["prompt"] + row["completion"]
        return row[self.text_field]

    def tokens(self, row: Row, **options: Any) -> Any:
        """TRL's own tokens of the whole conversation."""
        return _tokenize(self.tokenizer, self.messages(row), **self.options(row), **options)
