"""A teacher that sees more than the policy: the same completion behind a prompt that holds the solution."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import pad

from qtarget.core.errors import DataError
from qtarget.core.shapes import Tensor
from qtarget.core.types import FrozenHead

SELF, BASE = "self", "base"
"""Teachers that need no other model: the policy as it is, and the policy as it was before training."""
PROMPT_KEYS = ("teacher_prompt_ids", "teacher_prompt_mask")


def privileged_prompt(row: dict[str, Any], column: str, template: str) -> Any:
    """The prompt of a row as the teacher sees it; of a conversation the last message is changed.

    Raises:
        DataError: the row has no such column, or nothing in it.

    Example:
        >>> privileged_prompt({"prompt": "2+2=", "solution": "4"}, "solution", "{prompt} ({privileged})")
        '2+2= (4)'
    """
    if (solution := row.get(column)) is None:
        raise DataError(f"privileged_column: {column}; a row has no such column or nothing in it: {str(row)[:80]}")

    def written(text: str) -> str:
        # in one pass, so that braces in the row's own text stay as they are
        return re.sub(r"\{(prompt|privileged)\}", lambda m: text if m[1] == "prompt" else str(solution), template)

    prompt = row["prompt"]
    if isinstance(prompt, str):
        return written(prompt)
    last = prompt[-1]
    if not isinstance(last["content"], str):
        raise DataError("privileged_column needs prompts of text; the last message holds parts")
    return [*prompt[:-1], {**last, "content": written(last["content"])}]


def teacher_prompts(
    inputs: list[dict[str, Any]],
    column: str,
    template: str,
    tokenize: Callable[[list[Any]], Any],
    pad_id: int,
    device: Any,
) -> dict[str, Tensor]:
    """``PROMPT_KEYS`` of a batch, padded on the left, in the order of ``inputs``.

    Args:
        tokenize: TRL's, of a list of prompts; returns ids first.
    """
    ids = [torch.tensor(row) for row in tokenize([privileged_prompt(row, column, template) for row in inputs])[0]]
    masks = [torch.ones_like(row) for row in ids]
    padded = (pad(ids, padding_value=pad_id, padding_side="left"), pad(masks, padding_value=0, padding_side="left"))
    return dict(zip(PROMPT_KEYS, (value.to(device) for value in padded), strict=True))


def teacher_inputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The teacher's prompt and the policy's completion."""
    return {
        "input_ids": torch.cat([inputs[PROMPT_KEYS[0]], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs[PROMPT_KEYS[1]], inputs["completion_mask"]], dim=1),
    }


def behind_policys_prompt(head: FrozenHead, teacher_start: int, start: int) -> FrozenHead:
    """The teacher's hidden states where the policy's are: those that predict the completion, behind another prompt.

    Args:
        teacher_start, start: lengths of the two prompts.
    """
    told = head.hidden[:, teacher_start - 1 :]
    return replace(head, hidden=torch.nn.functional.pad(told, (0, 0, start - 1, 0)))


def as_it_was(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy, before anything is trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)
