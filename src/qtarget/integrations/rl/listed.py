"""What the trained model says when it samples, beyond the sampled token: the outcomes that ``outcomes: listed`` reads."""

from __future__ import annotations

from typing import Any

import torch

from qtarget.core.errors import ConfigError
from qtarget.core.shapes import Tensor
from qtarget.core.statistics import token_statistics
from qtarget.core.types import Target
from qtarget.integrations.shared.heads import HeadSpec
from qtarget.integrations.shared.step import live_head

FIELDS = ("topk_ids", "topk_log_probs", "tail_log_mass")
PREFIX = "rollout_"
"""Of the fields as keys of a batch."""


def reads_outcomes(target: Target) -> bool:
    """Whether a target looks at other tokens of the sampler's than the sampled one."""
    return "distribution" in target.needs.rollout


def refuse_told(args: Any, target: Target, told: bool) -> None:
    """Refuse outcomes of a sampler that tells the sampled token's log-prob alone.

    Args:
        told: a sampler of its own tells log-probs.

    Raises:
        ConfigError: says which key to set.
    """
    if reads_outcomes(target) and args.anchor != "old" and (told or args.anchor == "rollout"):
        raise ConfigError(
            "trust_region_kwargs: outcomes: listed reads the sampler's likeliest tokens, and it tells the sampled one alone; "
            "set anchor: old (the trained model at the time), or outcomes: binary"
        )


@torch.no_grad()
def listed_outcomes(
    output: dict[str, Any], model: Any, spec: HeadSpec, top_k: int, rows: int, vocab_rows: int | None
) -> dict[str, Tensor]:
    """The likeliest tokens at every place of the completions, as the model is now; one more pass through it.

    Args:
        output: of TRL's ``_generate_and_score_completions``.
        spec: of the head, at the sampler's temperature.
        top_k: how many; all others are one outcome.
        rows: how many samples at once.
        vocab_rows: see ``TargetStep``.
    """
    start, parts = output["prompt_ids"].shape[1], []
    ids, mask = (torch.cat([output[f"prompt_{k}"], output[f"completion_{k}"]], dim=1) for k in ("ids", "mask"))
    for i in range(0, len(ids), rows):
        inputs = {"input_ids": ids[i : i + rows], "attention_mask": mask[i : i + rows]}
        head = live_head(model, spec, inputs, vocab_rows)
        labels = output["completion_ids"][i : i + rows].masked_fill(output["completion_mask"][i : i + rows] == 0, -100)
        parts.append(
            token_statistics(
                hidden=head.hidden[:, start - 1 : -1], labels=labels, lm_head_weight=head.lm_head_weight, bias=head.bias,
                logit_scale=head.logit_scale, logit_softcap=head.logit_softcap, top_k=top_k,
            )
        )  # fmt: skip
    return {f"{PREFIX}{name}": torch.cat([getattr(part, name) for part in parts]) for name in FIELDS}


def behind_prompt(inputs: dict[str, Any]) -> dict[str, Tensor] | None:
    """The fields of a batch over prompt and completion, unshifted; None where it has none."""
    if f"{PREFIX}{FIELDS[0]}" not in inputs:
        return None
    start, out = inputs["prompt_ids"].shape[1], {}
    for name, fill in zip(FIELDS, (-1, -torch.inf, 0.0), strict=True):
        value = inputs[f"{PREFIX}{name}"]
        before = value.new_full((len(value), start, *value.shape[2:]), fill)
        out[name] = torch.cat([before, value], dim=1)
    return out
