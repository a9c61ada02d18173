"""Exact-match accuracy of greedy completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from qtarget.integrations.shared.probes import left_padding_leak

logger = logging.get_logger(__name__)


@torch.no_grad()
def greedy_completions(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """The most likely continuation of each prompt, up to the end-of-text token, in the order of ``prompts``.

    Prompts are sorted by length and padded on the left; special tokens are left out of the text. A model that padding
    disturbs gets them one by one, with a warning.
    """
    was_training = model.training
    model.eval()
    batch_size = rows_at_once(model, tokenizer, batch_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left")
        generated = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            out[i] = text
    model.train(was_training)
    return out


def rows_at_once(model: Any, tokenizer: Any, wanted: int) -> int:
    """``wanted``, or 1 and a warning where padding on the left would change what the model writes."""
    leak = left_padding_leak(model, tokenizer) if wanted > 1 else None
    if leak is None:
        return wanted
    logger.warning(
        f"{type(model).__name__}: padding on the left moves its logits by {leak:.2g} of their size; prompts are answered one "
        f"at a time instead of {wanted}"
    )
    return 1


def accuracy_percent(
    rows: Sequence[Mapping[str, Any]], texts: Sequence[str], check: Callable[[Any, str], bool]
) -> float:
    """Share of texts that pass their row's checker, in percent.

    Example:
        >>> accuracy_percent([{"answer": "4"}, {"answer": "5"}], ["4", "6"], lambda row, text: text == row["answer"])
        50.0
    """
    return 100.0 * sum(check(row, text) for row, text in zip(rows, texts, strict=True)) / len(rows)
