"""Exact-match accuracy of greedy completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qtarget.evaluation.generation import Completion, complete, rows_at_once


def greedy_completions(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """The texts of ``greedy_answers``."""
    found = greedy_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [answer.text for answer in found]


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int
) -> list[Completion]:
    """The most likely continuation of each prompt, up to the end-of-text token, in the order of ``prompts``.

    Prompts are sorted by length, so that a batch has little padding; special tokens are left out of the text. A model that
    padding disturbs gets them one by one, with a warning.
    """
    batch_size = rows_at_once(model, tokenizer, batch_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = tokenizer([prompts[i] for i in chosen])["input_ids"]
        said = complete(model, tokenizer, ids, max_new_tokens=max_new_tokens, stops=[tokenizer.eos_token_id])
        out.update((i, first) for i, (first,) in zip(chosen, said, strict=True))
    return [out[i] for i in range(len(prompts))]


def accuracy_percent(
    rows: Sequence[Mapping[str, Any]], texts: Sequence[str], check: Callable[[Any, str], bool]
) -> float:
    """Share of texts that pass their row's checker, in percent.

    Example:
        >>> accuracy_percent([{"answer": "4"}, {"answer": "5"}], ["4", "6"], lambda row, text: text == row["answer"])
        50.0
    """
    return 100.0 * sum(check(row, text) for row, text in zip(rows, texts, strict=True)) / len(rows)
