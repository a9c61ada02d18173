"""Keys of TRL that have another name here, would correct twice, or have no meaning with a trust region."""

from __future__ import annotations

import math
from typing import Any

from qtarget.core.errors import ConfigError
from qtarget.integrations.shared.teacher import is_url

TAUGHT = "teacher"
"""The value of ``advantage`` that asks a teacher in place of rewards."""
REDUCTIONS = ("dapo", "grpo", "dr_grpo")
LOSSES = {
    "cispo": "trust_region: cispo",
    "bnpo": "loss_type: dapo, which divides by the tokens of the whole batch",
}
"""Values of ``loss_type`` that have another key here."""
DEFAULTS: dict[str, tuple[Any, str]] = {
    "beta": (
        0.0,
        "set target: reverse_kl, target_weight: {value} and teacher_model_name_or_path: the model to stay near",
    ),
    "sync_ref_model": (False, "the teacher of target: reverse_kl stays as it is"),
    "epsilon": (0.2, "set trust_region: ppo_clip, trust_region_kwargs: {{clip_low: {value}}}"),
    "epsilon_high": (None, "set trust_region: ppo_clip, trust_region_kwargs: {{clip_high: {value}}}"),
    "delta": (None, "set trust_region: cispo, trust_region_kwargs: {{max_ratio: {value}}}, which bounds the ratio"),
    "importance_sampling_level": ("token", "rules here are about tokens; for sequence ratios use TRL's GRPOTrainer"),
    "off_policy_mask_threshold": (None, "set trust_region: dppo_kl, trust_region_kwargs: {{delta_low: {value}}}"),
    "top_entropy_quantile": (1.0, "masks by entropy are TRL's GRPOTrainer's"),
    "entropy_coef": (
        0.0,
        "set target: reverse_kl with a teacher, which keeps the distribution broad where the teacher is",
    ),
    "use_adaptive_entropy": (False, "set target: reverse_kl with a teacher"),
    "cast_lm_head_to_fp32": (False, "logits are float32 here wherever a distribution is compared with another"),
}
"""Keys, the value that changes nothing, and what to set instead."""
TRUNCATED = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
"""Settings of the sampler that renormalise its log-probs, and the values that do not."""


def refuse_settings(args: Any) -> None:
    """Refuse what a trust region replaces.

    Raises:
        ConfigError: names the key and what to set instead.
    """
    for key, (default, instead) in DEFAULTS.items():
        value = getattr(args, key)
        if value != default:
            raise ConfigError(f"{key}: {value} has no effect here; {instead.format(value=value)}")
    if args.loss_type not in REDUCTIONS:
        instead = (
            "set " + LOSSES[args.loss_type] if args.loss_type in LOSSES else "train that one with TRL's GRPOTrainer"
        )
        raise ConfigError(
            f"loss_type: {args.loss_type}; here it says how tokens are averaged ({', '.join(REDUCTIONS)}) and trust_region what "
            f"is taught; {instead}"
        )
    if args.loss_type == "grpo" and args.target is not None:
        raise ConfigError(
            "loss_type: grpo weighs tokens by the length of their sequence through the advantage, which a target does not read; "
            "set loss_type: dapo or dr_grpo"
        )
    refuse_teachers(args)
    if args.anchor not in (None, "rollout", "old"):
        raise ConfigError(f"anchor: {args.anchor}; expected rollout (the policy that sampled) or old")
    if args.vllm_importance_sampling_correction and args.anchor != "old":
        raise ConfigError(
            "vllm_importance_sampling_correction: true would correct twice, as the ratio is taken to the sampler's log-probs "
            "already; leave it out, or set anchor: old"
        )


def refuse_teachers(args: Any) -> None:
    """Refuse teachers that contradict one another, or teach nothing.

    Raises:
        ConfigError: names the keys.
    """
    if args.teacher not in (None, "self", "base", "ema") and not is_url(args.teacher):
        raise ConfigError(
            f"teacher: {args.teacher}; expected self, base or ema, or a URL; another model is teacher_model_name_or_path"
        )
    if is_url(args.teacher) and args.temperature != 1:
        raise ConfigError(
            f"temperature: {args.temperature} with teacher: {args.teacher}, which tells log-probs at temperature 1; set "
            "temperature: 1, or name a model: teacher_model_name_or_path"
        )
    if not 0 <= args.teacher_decay < 1:
        raise ConfigError(f"teacher_decay: {args.teacher_decay}; expected at least 0 and below 1, such as 0.99")
    if args.teacher is not None and args.teacher_model_name_or_path is not None:
        raise ConfigError(f"teacher: {args.teacher} and teacher_model_name_or_path are both set; keep one of them")
    if args.teacher == "self" and args.privileged_column is None:
        raise ConfigError(
            "teacher: self says what the policy says; set privileged_column: what it sees beside the prompt"
        )
    if args.privileged_column is None:
        return
    if args.target is None and args.advantage != TAUGHT:
        raise ConfigError(
            "privileged_column is for a teacher, and no target reads one; set target: reverse_kl, or leave it out"
        )
    for field in ("{prompt}", "{privileged}"):
        if field not in args.privileged_template:
            raise ConfigError(f"privileged_template has no {field}; expected a text with {{prompt}} and {{privileged}}")


def refuse_advantages(args: Any) -> None:
    """Refuse what the source of the advantages does not go with.

    Raises:
        ConfigError: names the keys.
    """
    if args.advantage not in ("reward", TAUGHT):
        raise ConfigError(f"advantage: {args.advantage}; expected reward or {TAUGHT}")
    taught = args.advantage == TAUGHT
    if args.skip_without_signal and (taught or args.target is not None or args.trust_region is None):
        other = f"advantage: {TAUGHT}" if taught else f"target: {args.target}"
        raise ConfigError(
            f"skip_without_signal: true with {other}, which teaches at tokens without an advantage of their reward; set one"
        )
    if not taught:
        return
    if args.trust_region is None or args.target is not None:
        raise ConfigError(
            f"advantage: {TAUGHT} is read by a trust region alone; set trust_region and leave target out, or leave advantage out"
        )
    if args.loss_type == "grpo":
        raise ConfigError(
            f"loss_type: grpo weighs tokens through the advantage of their reward, and advantage: {TAUGHT} reads none; set "
            "loss_type: dapo or dr_grpo"
        )
    if args.use_vllm and args.vllm_importance_sampling_correction:
        raise ConfigError(
            f"vllm_importance_sampling_correction is a factor on advantages of rewards, and advantage: {TAUGHT} reads none; set it "
            "false, or leave anchor: old out"
        )


def refuse_truncated_sampling(args: Any) -> None:
    """Refuse a sampler whose log-probs are those of a cut distribution, where ratios are taken to them.

    Raises:
        ConfigError: names the keys.
    """
    cut = {key: getattr(args, key) for key, whole in TRUNCATED.items() if getattr(args, key) not in (whole, -1)}
    if cut:
        said = ", ".join(f"{key}: {value}" for key, value in cut.items())
        raise ConfigError(
            f"{said}: the sampler's log-probs are those of a cut distribution and the model's are not, so every ratio is off by "
            "the mass that was cut; sample from the whole (top_p: 1, top_k: 0, no penalty), or set anchor: old"
        )


def refuse_half_generations(args: Any) -> None:
    """Refuse checkpoints between two samplings: the samples at hand are not saved, so a resumed run would draw others.

    Raises:
        ConfigError: names a number of steps that will do.
    """
    uses = args.steps_per_generation * args.num_iterations
    every = uses // math.gcd(uses, args.gradient_accumulation_steps)  # optimizer steps between two samplings
    steps = args.save_steps
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "steps" or steps < 1 or steps % every == 0:
        return
    raise ConfigError(
        f"save_steps: {steps:g} falls between two samplings (every {every} steps), and samples are not saved; set save_steps: "
        f"{max(round(steps / every), 1) * every}"
    )
