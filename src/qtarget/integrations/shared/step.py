"""One training step's loss as a value: everything aligned with the labels, shifted once, here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from qtarget.api import linear_target_loss
from qtarget.core.errors import NonFiniteLossError
from qtarget.core.shapes import Tensor
from qtarget.core.types import DATA_FIELDS, FrozenHead, Reference, TailPolicy, Target, WeightsScale
from qtarget.integrations.shared.heads import HeadSpec, backbone_states
from qtarget.loss.backends import Backend
from qtarget.loss.result import TokenReport

ROLES = ("reference", "teacher")
REFERENCE_FIELDS = ("label_log_probs", "entropy", "topk_ids", "topk_log_probs", "tail_log_mass")
"""Columns of a cache."""


@dataclass
class TargetOutput(ModelOutput):
    """What the model's forward returns when it is asked for a target loss.

    Fields as in ``TokenReport``; ``aux_loss`` is the unweighted load-balancing loss of a mixture of experts.
    """

    loss: Tensor | None = None
    losses: Tensor | None = None
    label_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None
    label_weights: Tensor | None = None
    residual_weights: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class TargetStep:
    """Loss of one micro-batch, called with hidden states inside the model's forward.

    All tensors are ``[batch, time, ...]`` and *unshifted*: position ``t`` is about the label at ``t``. ``__call__``
    shifts everything by one, together.

    Attributes:
        target: the method.
        labels: token ids, ``-100`` where not trained on.
        advantages, rollout: of samples; see ``qtarget.linear_target_loss``.
        frozen: reference and teacher: cached numbers about each label, or a live head whose ``hidden`` is unshifted.
        sequence_ids: which row of the data set each token comes from.
        loss_weights, weights_scale, label_weights: see ``qtarget.linear_target_loss``.
        num_items: supervised tokens of the whole optimizer batch.
        vocab_rows: leading rows of the head that count, where student and teacher differ in padding; all if absent.
        backend: see ``qtarget.linear_target_loss``.
        virtual_tokens: how many tokens PEFT's prompt tuning puts in front of each row.
    """

    target: Target
    labels: Tensor
    frozen: dict[str, Reference | FrozenHead | None]
    advantages: Tensor | None = None
    rollout: Reference | None = None
    sequence_ids: Tensor | None = None
    loss_weights: Tensor | None = None
    weights_scale: WeightsScale = "all"
    label_weights: Tensor | None = None
    num_items: Tensor | int | None = None
    vocab_rows: int | None = None
    backend: Backend = "auto"
    virtual_tokens: int = 0

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: HeadSpec) -> TargetOutput:
        self.move_to(hidden.device)
        hidden = hidden[:, self.virtual_tokens :]
        if self.labels.shape != hidden.shape[:2]:
            raise RuntimeError(
                f"labels {tuple(self.labels.shape)} and hidden states {tuple(hidden.shape)} do not line up: the model, or an "
                "adapter, inserts or drops tokens; use LoRA or full fine-tuning"
            )
        # with the report in every step: what is logged is summed up from it
        loss, report = linear_target_loss(
            hidden[:, :-1],
            weight[: self.vocab_rows],
            self.labels[:, 1:],
            self.target,
            bias=None if bias is None else bias[: self.vocab_rows],
            logit_scale=spec.scale,
            logit_softcap=spec.softcap,
            reference=shifted(self.frozen.get("reference")),
            teacher=shifted(self.frozen.get("teacher")),
            advantages=_tail(self.advantages),
            rollout=None if self.rollout is None else self.rollout.map_tensors(lambda _, value: value[:, 1:]),
            sequence_ids=_tail(self.sequence_ids),
            loss_weights=_tail(self.loss_weights),
            weights_scale=self.weights_scale,
            label_weights=_tail(self.label_weights),
            num_items=self.num_items,
            backend=self.backend,
            return_report=True,
        )
        return output_of(loss, report, self.labels[:, 1:])

    def move_to(self, device: torch.device) -> None:
        """Follow the head: a model split over devices may end on another one than its inputs."""
        for name in ("labels", "advantages", "sequence_ids", "loss_weights", "label_weights", "num_items"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        if self.rollout is not None:
            self.rollout = self.rollout.map_tensors(lambda _, value: value.to(device))
        for role, frozen in self.frozen.items():
            if isinstance(frozen, Reference):
                self.frozen[role] = frozen.map_tensors(lambda _, value: value.to(device))


def output_of(loss: Tensor, report: TokenReport | None, labels: Tensor) -> TargetOutput:
    """Pack loss and report; zeros when not a single token was supervised."""
    names = ("losses", "label_log_probs", "entropy", "correct", "label_weights", "residual_weights")
    empty = torch.zeros(labels.shape, device=loss.device)
    return TargetOutput(loss=loss, **{n: empty if report is None else getattr(report, n) for n in names})


def non_finite(loss: float, output: TargetOutput, step: TargetStep, at: int, kept: str = "") -> NonFiniteLossError:
    """The error that names the rows of a batch whose loss is NaN or infinite.

    Args:
        at: the optimizer step.
        kept: what is safe (``safe_checkpoint``), the end of the message.
    """
    assert output.losses is not None and output.label_log_probs is not None and step.sequence_ids is not None
    bad = ~torch.isfinite(output.losses) | ~torch.isfinite(output.label_log_probs)
    rows = sorted({int(i) + 1 for i in step.sequence_ids[:, 1:][bad & (step.labels[:, 1:] != -100)]})
    excluded = int((output.label_log_probs == -torch.inf).sum())
    way_out = "look at these rows, lower learning_rate, or set max_grad_norm"
    if loss == torch.inf and excluded:
        way_out = (
            f"{excluded} of their labels have probability 0: the model's logit there is minus infinity (a banned or padded "
            "token); mask these labels, or train a target whose weight vanishes there (docs/loss.md, What infinite logits do)"
        )
    elif loss == torch.inf:
        way_out = (
            "the target pulls towards a token whose logit is minus infinity in the model (a banned or padded one), or away "
            "from one that the frozen model excludes (docs/loss.md, What infinite logits do)"
        )
    return NonFiniteLossError(
        f"the loss is {loss} at step {at}, in rows {rows or 'unknown'} of the data; {way_out}{kept}"
    )


def _tail(value: Tensor | None) -> Tensor | None:
    return None if value is None else value[:, 1:]


def shifted(frozen: Reference | FrozenHead | None) -> Reference | FrozenHead | None:
    """Numbers about labels move with the labels; hidden states that predict them stay one behind."""
    if isinstance(frozen, FrozenHead):
        return replace(frozen, hidden=frozen.hidden[:, :-1])
    if frozen is None:
        return None
    return frozen.map_tensors(lambda _, value: value[:, 1:])


def pop_reference(inputs: dict[str, Any], role: str, tail_policy: TailPolicy) -> Reference | None:
    """Take a cached reference's columns out of a batch."""
    values = {name: inputs.pop(f"{role}_{name}", None) for name in (*REFERENCE_FIELDS, *DATA_FIELDS)}
    if all(v is None for v in values.values()):
        return None
    return Reference(**values, tail_policy=tail_policy)


@torch.no_grad()
def live_head(
    model: PreTrainedModel, spec: HeadSpec, inputs: dict[str, Any], vocab_rows: int | None = None
) -> FrozenHead:
    """Run a frozen model's backbone on the same tokens; its logits are made chunk by chunk in the loss."""
    # the backbone alone: the model's own forward would make all logits at once
    hidden = backbone_states(model, inputs)
    head: Any = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return FrozenHead(
        hidden, head.weight[:vocab_rows], None if bias is None else bias[:vocab_rows], spec.scale, spec.softcap
    )
