"""Rounds of samples on a small model, bare of any trainer: draw, learn from what was drawn, ask held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qtarget.api import linear_target_loss
from qtarget.benchmarks.finetune import Encoded, collate, hidden_states
from qtarget.core.types import FrozenHead, Reference, Target
from qtarget.data import tasks
from qtarget.evaluation.generation import Decoding, complete, quiet

PROMPTS, GROUP, NEW_TOKENS, MAX_NORM = 16, 8, 24, 1.0
"""Prompts a round, samples of each, longest sample in tokens, and the norm to which gradients are clipped."""


@dataclass(frozen=True)
class Round:
    """Samples of one round.

    Attributes:
        rows: prompts and completions as ids.
        rewards: ``[samples]`` 1 for a right answer; the samples of a prompt stand together.
        log_probs: of each row's completion tokens, under the weights that sampled.
    """

    rows: list[Encoded]
    rewards: torch.Tensor
    log_probs: list[torch.Tensor]

    @property
    def advantages(self) -> torch.Tensor:
        """``[samples]`` reward less the mean of the prompt's samples."""
        groups = self.rewards.view(-1, GROUP)
        return (groups - groups.mean(1, keepdim=True)).flatten()


@torch.no_grad()
def sample_round(model: Any, tokenizer: Any, prompts: Sequence[Mapping[str, Any]], seed: int) -> Round:
    """``GROUP`` samples of each prompt at temperature 1, with rewards and the sampler's log-probs."""
    end = tokenizer.eos_token_id
    encoded = tokenizer([row["prompt"] for row in prompts], return_tensors="pt", padding=True, padding_side="left")
    with torch.random.fork_rng([]), quiet("transformers.generation"):
        torch.manual_seed(seed)
        out = model.eval().generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], do_sample=True, top_k=0,
            max_new_tokens=NEW_TOKENS, num_return_sequences=GROUP, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
    said = [up_to(ids, end) for ids in out[:, encoded["input_ids"].shape[1] :].tolist()]
    before = [ids for ids in tokenizer([row["prompt"] for row in prompts])["input_ids"] for _ in range(GROUP)]
    rows = [Encoded(prompt, ids, []) for prompt, ids in zip(before, said, strict=True)]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    asked = [row for row in prompts for _ in range(GROUP)]
    rewards = torch.tensor([float(tasks.check(row, text)) for row, text in zip(asked, texts, strict=True)])
    ids, labels = collate(rows)
    kept = labels >= 0
    scores = (hidden_states(model, ids)[kept] @ model.lm_head.weight.T).log_softmax(-1)
    flat = scores.gather(-1, labels[kept][:, None])[:, 0]
    return Round(rows, rewards, list(flat.split([len(row.completion) for row in rows])))


def up_to(ids: Sequence[int], end: int) -> list[int]:
    """The ids up to the first ``end``, with it.

    Example:
        >>> up_to([5, 6, 0, 0], 0)
        [5, 6, 0]
    """
    return list(ids[: ids.index(end) + 1]) if end in ids else list(ids)


def update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    target: Target,
    drawn: Round,
    part: Sequence[int],
    *,
    is_live: bool,
    teacher: Any = None,
) -> tuple[float, float]:
    """One optimizer step on some samples; returns the KL to the sampler (k3, nats a token) and the share blocked.

    Args:
        is_live: the model has drawn them as it is, so that every ratio is 1 to the bit.
        teacher: a frozen model, where the target reads one.
    """
    rows = [drawn.rows[i] for i in part]
    ids, labels = collate(rows)
    kept = labels >= 0
    sampler = torch.cat([drawn.log_probs[i] for i in part])
    advantages = drawn.advantages[list(part)].repeat_interleave(kept.sum(-1))
    regional, frozen = target.needs.advantages, None
    if target.needs.teacher:
        with torch.no_grad():
            frozen = FrozenHead(hidden_states(teacher, ids)[kept], teacher.lm_head.weight)
    loss, report = linear_target_loss(
        hidden_states(model, ids)[kept], model.lm_head.weight, labels[kept], target, teacher=frozen,
        advantages=advantages if regional else None,
        rollout=Reference(label_log_probs=sampler) if regional and not is_live else None, return_report=True,
    )  # fmt: skip
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    gap = (report.label_log_probs - sampler).clamp(-20, 20)
    weighed = advantages != 0
    share = float((report.label_weights[weighed] == 0).float().mean()) if regional and bool(weighed.any()) else 0.0
    return float((torch.expm1(gap) - gap).mean()), share


def right_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    decoding: Decoding,
    ids: Sequence[list[int]] | None = None,
    at_once: int = 64,
) -> list[int]:
    """How many of the ``decoding.samples`` answers to each prompt are right, in the order of ``rows``.

    Args:
        ids: of the prompts; absent: of their texts as they stand.
        at_once: prompts in a batch, those of like length together.
    """
    prompts = [row["prompt"] for row in rows] if ids is None else ids
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    read: Sequence[list[int]] = tokenizer(prompts)["input_ids"] if ids is None else ids
    out = [0] * len(rows)
    for start in range(0, len(order), at_once):
        chosen = order[start : start + at_once]
        said = complete(
            model, tokenizer, [read[i] for i in chosen], max_new_tokens=NEW_TOKENS, stops=[tokenizer.eos_token_id],
            decoding=decoding, stream=start,
        )  # fmt: skip
        for i, answers in zip(chosen, said, strict=True):
            out[i] = sum(tasks.check(rows[i], one.text) for one in answers)
    return out
