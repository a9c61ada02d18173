"""A bare fine-tuning loop for benchmarks that train thousands of tiny models: seconds a run, and nothing but the target.

`QTargetTrainer` sets up for longer than such a run lasts; a test holds this loop equal to it, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from qtarget.api import linear_target_loss
from qtarget.core.errors import ConfigError
from qtarget.core.shapes import Float, Int, Tensor
from qtarget.core.types import Reference, Target
from qtarget.data.noise import noise_token_mask
from qtarget.loss.head import bfloat16_operands


@dataclass(frozen=True)
class Encoded:
    """One row as token ids.

    Attributes:
        prompt, completion: ids; the completion ends with end-of-text.
        noise: which completion tokens are noise.
        left_out: which completion tokens the loss leaves out, or none.
        weight: above 0; what the row teaches is multiplied by it, anchors too.
    """

    prompt: list[int]
    completion: list[int]
    noise: list[bool]
    left_out: list[bool] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """All of a training run but its target and its rows: AdamW, linear warm-up over a tenth of the steps, linear decay.

    Attributes:
        learning_rate: the peak.
        batch_size: rows a step.
        steps: optimizer steps; rows are reshuffled whenever they run out.
        seed: of the order of the rows.
    """

    learning_rate: float
    batch_size: int
    steps: int
    seed: int = 0


@dataclass
class Trained:
    """What a run reports beside the model: the share of the label pull (``sum |w (1 - p)|``) spent on noise tokens."""

    on_noise: float = 0.0
    in_all: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def noise_share(self) -> float | None:
        """In [0, 1]; None when nothing was pulled."""
        return self.on_noise / self.in_all if self.in_all else None


def encode(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
    """Prompt and completion tokenised apart, as the training format of prompt and completion does."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    texts = tokenizer([row["completion"] for row in rows], return_offsets_mapping=True)
    out = []
    for row, prompt, ids, offsets in zip(rows, prompts, texts["input_ids"], texts["offset_mapping"], strict=True):
        noise = noise_token_mask(offsets, row.get("noise_spans", ()))
        out.append(Encoded(prompt, [*ids, tokenizer.eos_token_id], [*noise, False]))
    return out


def collate(rows: Sequence[Encoded]) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Input ids, and labels shifted to the position that predicts them (-100 on prompts and padding, on the right)."""
    width = max(len(row.prompt) + len(row.completion) for row in rows) - 1
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        whole = torch.tensor(row.prompt + row.completion)
        ids[i, : len(whole) - 1] = whole[:-1]
        labels[i, len(row.prompt) - 1 : len(whole) - 1] = whole[len(row.prompt) :]
    return ids, labels


def hidden_states(model: Any, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
    """Last hidden states; padding stands on the right, where causal attention does not see it."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def completion_log_probs(
    model: Any, rows: Sequence[Encoded], batch_size: int = 64
) -> Iterator[Float[Tensor, "completion vocab"]]:
    """The model's whole log-softmax at every completion token, row by row, nats; a batch is in memory at a time."""
    # float32 logits whatever the model's dtype, as the loss has them
    head, is_narrow = model.lm_head.weight.float(), model.dtype == torch.bfloat16
    for start in range(0, len(rows), batch_size):
        ids, labels = (tensor.to(model.device) for tensor in collate(rows[start : start + batch_size]))
        hidden = hidden_states(model, ids)[labels >= 0].float()
        with bfloat16_operands() if is_narrow else nullcontext():
            log_probs = (hidden @ head.T).log_softmax(-1)
        yield from log_probs.split([len(row.completion) for row in rows[start : start + batch_size]])


def of_labels(log_probs: Float[Tensor, "completion vocab"], row: Encoded) -> Float[Tensor, " completion"]:
    """Those of the row's own tokens."""
    return log_probs.gather(-1, torch.tensor(row.completion, device=log_probs.device)[:, None])[:, 0]


POOL = 4
"""Batches among which rows are sorted by length: padding would be a third of all tokens."""


def order(lengths: Sequence[int], recipe: Recipe) -> list[list[int]]:
    """Indices of the rows of each step: shuffled, then alike in length within a step; no steps where there are no rows.

    Example:
        >>> order([], Recipe(0.001, 16, 40, 0))  # an oracle may leave every row out
        []
    """
    random, size, steps = Random(recipe.seed), recipe.batch_size, []
    while lengths and len(steps) < recipe.steps:
        rows = random.sample(range(len(lengths)), len(lengths))
        pools = [rows[i : i + POOL * size] for i in range(0, len(rows), POOL * size)]
        sorted_rows = [row for pool in pools for row in sorted(pool, key=lambda row: lengths[row])]
        epoch = [sorted_rows[i : i + size] for i in range(0, len(rows), size)]
        # in random order again, or steps would go from short rows to long ones
        steps += random.sample(epoch, len(epoch))
    return steps[: recipe.steps]


def fine_tune(
    model: Any,
    rows: Sequence[Encoded],
    target: Target | Callable[[Trained], Target],
    recipe: Recipe,
    *,
    reference: Sequence[Reference] | None = None,
    teacher: Sequence[Reference] | None = None,
    after_step: Any = None,
    select: Callable[[Any, list[int], int], list[int]] | None = None,
) -> Trained:
    """Train ``model`` in place, every step one batch; the loss is the mean over its supervised tokens.

    Args:
        target: or what gives each step's, called with all that the run reports so far (a schedule).
        reference, teacher: what is known of a frozen model at the completion tokens of each row.
        after_step: called with the number of steps done; a true answer ends the run (early stopping).
        select: called with the model, a step's rows and the step; says which of them are trained on.

    Raises:
        ConfigError: rows that are weighed and rows that leave tokens out: a weight of 0 would mask these tokens.
    """
    weighed = any(row.weight != 1 for row in rows)
    if weighed and any(row.left_out is not None for row in rows):
        raise ConfigError("rows are weighed and leave tokens out; do one of them")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    trained = Trained()
    model.train()
    for step, chosen in enumerate(order([len(row.prompt) + len(row.completion) for row in rows], recipe)):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * schedule(step, recipe.steps)
        if select is not None:
            chosen = select(model, chosen, step)
        batch = [rows[i] for i in chosen]
        ids, labels = (tensor.to(model.device) for tensor in collate(batch))
        kept = labels >= 0
        hidden, flat = hidden_states(model, ids)[kept], labels[kept]
        factors = [row.weight * (not out) for row in batch for out in row.left_out or [False] * len(row.completion)]
        sequences = torch.arange(len(batch), device=labels.device).repeat_interleave(kept.sum(-1))
        now = target if isinstance(target, Target) else target(trained)
        loss, report = linear_target_loss(
            hidden, model.lm_head.weight, flat, now, sequence_ids=sequences, return_report=True,
            loss_weights=None if all(factor == 1 for factor in factors) else torch.tensor(factors, device=labels.device),
            weights_scale="all" if weighed else "label",  # tokens left out keep their share of the mean
            reference=None if reference is None else _joined(reference, chosen),
            teacher=None if teacher is None else _joined(teacher, chosen),
        )  # fmt: skip
        loss.backward()
        # 1.0 is the default of transformers' Trainer, with which this loop is compared
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _count(trained, report, [noise for row in batch for noise in row.noise])
        trained.losses.append(loss.item())
        if after_step is not None and after_step(step + 1):
            break
    return trained


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over the first tenth, then down to zero."""
    warmup = max(1, round(steps / 10))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def _count(trained: Trained, report: Any, noise: list[bool]) -> None:
    pull = (report.label_weights.abs() * (1 - report.label_log_probs.exp())).double()
    trained.in_all += float(pull.sum())
    trained.on_noise += float(pull[torch.tensor(noise, device=pull.device)].sum())


def _joined(numbers: Sequence[Reference], chosen: Sequence[int]) -> Reference:
    parts = [numbers[i] for i in chosen]
    return parts[0].map_tensors(lambda name, _: torch.cat([getattr(part, name) for part in parts]))
