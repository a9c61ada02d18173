"""What a trainer is given, looked at before a model is loaded."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig

from qtarget.core.errors import ConfigError, MissingStatisticError
from qtarget.core.types import DATA_FIELDS, Target
from qtarget.integrations.rl.config import QTargetGRPOConfig
from qtarget.integrations.rl.inputs.rewards import checked_rewards, no_reward


def own_config(args: GRPOConfig | None) -> QTargetGRPOConfig:
    """The configuration, or its defaults.

    Raises:
        ConfigError: something else was given.
    """
    if args is None:
        return QTargetGRPOConfig("model-GRPO")
    if not isinstance(args, QTargetGRPOConfig):
        raise ConfigError(
            f"args is a {type(args).__name__}; expected qtarget.QTargetGRPOConfig: it has TRL's keys, and trust_region and target "
            "in place of loss_type and epsilon"
        )
    return args


def refuse_missing(args: QTargetGRPOConfig, target: Target, given: dict[str, PreTrainedModel | None]) -> None:
    """Refuse a target whose frozen model nobody named.

    Raises:
        MissingStatisticError: names the key.
    """
    for role, model in given.items():
        fields = getattr(target.needs, role)
        if fields & set(DATA_FIELDS):
            raise MissingStatisticError(
                f"target {target.name!r} reads what other rows of demonstrations say, and samples have no such rows; choose another"
            )
        named = getattr(args, f"{role}_model_name_or_path") or (role == "teacher" and args.teacher)
        if fields and model is None and not named:
            raise MissingStatisticError(
                f"target {target.name!r} compares samples with a {role}: set {role}_model_name_or_path, or pass {role}_model"
                + (", or set teacher: base" if role == "teacher" else "")
            )


def rewards_of(args: QTargetGRPOConfig, functions: Any, train: Any, environments: bool) -> list[Any]:
    """The reward functions behind checks, or one that stands in where nothing reads rewards.

    Raises:
        ConfigError: rewards that nothing reads, or none where they are read.
        DataError, RewardError: see ``checked_rewards``.
    """
    if not args.rewarded:
        if functions:
            raise ConfigError(
                "reward_funcs are given, and with trust_region: null or advantage: teacher nothing would read them; set "
                "trust_region and leave advantage out, or leave the rewards out: a teacher alone teaches"
            )
        return [no_reward]
    found = checked_rewards(functions, not environments, None if train is None else train.column_names)
    if not found and not environments:
        raise ConfigError(
            f"trust_region: {args.trust_region} weighs samples by rewards, and there is none; give reward_funcs, or set "
            "advantage: teacher, or trust_region: null and a target with a teacher"
        )
    return found
