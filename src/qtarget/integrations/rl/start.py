"""How far the policy is from the model that it started from: exact, where that model is at hand."""

from __future__ import annotations

from typing import Any

import torch

from qtarget.api import linear_target_loss
from qtarget.core.shapes import Tensor
from qtarget.core.types import FrozenHead
from qtarget.integrations.rl.teachers import BASE
from qtarget.integrations.shared.heads import HeadSpec, backbone_states
from qtarget.integrations.shared.probes import probing
from qtarget.integrations.shared.step import TargetOutput, TargetStep, shifted
from qtarget.registry import get_target

PROBE_TOKENS = 8
MAIN = "main"
TEACHER, ADAPTER = "teacher", "adapter"
"""Where the start is at hand: as the teacher that runs at every step, or under an adapter that adds nothing at first."""


class BesideStart:
    """A step of the loss that also measures ``KL(policy || start)``, from the hidden states that the loss reads.

    Args:
        step: the loss.
        start: the start's hidden states at the same tokens, and its head.

    Attributes:
        kl: after the step, ``[batch, time - 1]`` nats over the whole vocabulary, 0 where nothing is trained on.
    """

    def __init__(self, step: TargetStep, start: FrozenHead) -> None:
        self.step, self.start = step, start
        self.kl: Tensor | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: HeadSpec) -> TargetOutput:
        output = self.step(hidden, weight, bias, spec)
        labels, rows = self.step.labels[:, 1:], self.step.vocab_rows
        self.kl = torch.zeros(labels.shape, device=labels.device)
        if bool((labels != -100).any()):
            with torch.no_grad():
                _, report = linear_target_loss(
                    hidden[:, :-1], weight[:rows], labels, get_target("reverse_kl"), teacher=shifted(self.start),
                    bias=None if bias is None else bias[:rows], logit_scale=spec.scale, logit_softcap=spec.softcap,
                    backend=self.step.backend, return_report=True,
                )  # fmt: skip
            self.kl = report.losses
        return output


def is_base_the_start(model: Any) -> bool:
    """Whether an adapter that is off leaves the model that training begins with: it adds nothing yet.

    An adapter that was trained before, or one whose beginning is split off the weights (PiSSA), adds something.
    """
    if not hasattr(model, "disable_adapter") or model.active_peft_config.is_prompt_learning:
        return False
    base = model.get_base_model()
    vocab = base.get_output_embeddings().weight.shape[0]
    ids = {"input_ids": torch.arange(PROBE_TOKENS, device=base.device)[None] % vocab}
    with probing(base), torch.no_grad():
        adapted = backbone_states(base, ids)
        with model.disable_adapter():
            return torch.equal(adapted, backbone_states(base, ids))


def start_of(args: Any, model: Any, named: str | None) -> str | None:
    """Where the model that training begins with is at hand: the ``teacher``, the policy with its ``adapter`` off, or nowhere.

    Args:
        named: the name or path that the policy was loaded from, where it was not given as a model.
    """
    adapted = hasattr(model, "disable_adapter")
    # a teacher is loaded at the main revision, whatever the policy's is
    revision = (args.model_init_kwargs or {}).get("revision") or MAIN
    same = named is not None and (named, revision) == (args.teacher_model_name_or_path, MAIN)
    if args.privileged_column is None and (same or (args.teacher == BASE and not adapted)):
        return TEACHER
    # with dropout on, the policy would be off its own start
    if adapted and args.disable_dropout and is_base_the_start(model):
        return ADAPTER
    return None


def is_logged(args: Any, state: Any) -> bool:
    """Whether a log line tells of the optimizer step that is under way; where one tells of an epoch, the mean of all."""
    strategy, number = str(getattr(args.logging_strategy, "value", args.logging_strategy)), state.global_step + 1
    if strategy == "epoch" or (args.logging_first_step and number == 1):
        return True
    if strategy == "no":
        return False
    return number % max(int(state.logging_steps or 1), 1) == 0 or number == state.max_steps
