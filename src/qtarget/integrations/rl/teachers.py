"""Teachers that are the policy itself: as it is, as it was, or as it was on average; and one that sees more than the policy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerCallback
from trl.trainer.utils import pad

from qtarget.core.errors import DataError, ResumeError
from qtarget.core.shapes import Tensor
from qtarget.core.types import FrozenHead
from qtarget.storage.files import writing

SELF, BASE, EMA = "self", "base", "ema"
"""Teachers that need no other model: the policy as it is, as it was before training, and a slow mean of what it has been."""
EMA_FILE = "teacher_ema.safetensors"
"""In a checkpoint: what the slow teacher has become."""
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


class SlowTeacher(TrainerCallback):
    """A teacher that follows the policy: after every optimizer step ``decay`` of what it was, and the rest of the policy.

    What is not trained is shared with the policy, so that with an adapter the adapter alone is held twice. The mean is kept in
    float32: in bfloat16 a thousandth of a step would be rounded away.

    Args:
        policy: the model whose parameters are trained.
        decay: at least 0 and below 1.
    """

    def __init__(self, policy: PreTrainedModel, decay: float) -> None:
        self.decay = decay
        shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(policy, shared).eval()
        named, own = dict(policy.named_parameters()), dict(self.model.named_parameters())
        self._policy = {name: p for name, p in named.items() if p.requires_grad}
        self._own = {name: own[name].requires_grad_(False) for name in self._policy}
        self._mean = {name: p.detach().float().clone() for name, p in self._policy.items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the policy by one step."""
        for name, mean in self._mean.items():
            mean.lerp_(self._policy[name].detach().to(mean), 1 - self.decay)
            self._own[name].copy_(mean)

    def save(self, folder: Path) -> None:
        """Write the mean beside a checkpoint's optimizer."""
        from safetensors.torch import save

        with writing(folder / EMA_FILE) as file:
            file.write(save({name: mean.contiguous().cpu() for name, mean in self._mean.items()}))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take up the mean of a checkpoint.

        Raises:
            ResumeError: it holds none.
        """
        if not (folder / EMA_FILE).is_file():
            raise ResumeError(
                f"{folder} has no {EMA_FILE}: it is of a run without teacher: ema, or was saved with save_only_model; start "
                f"from its weights (model_name_or_path: {folder}, another output_dir)"
            )
        found = load_file(folder / EMA_FILE)
        for name, mean in self._mean.items():
            mean.copy_(found[name])
            self._own[name].copy_(mean)
