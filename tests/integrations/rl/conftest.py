"""Prompts, a reward and settings for a tiny policy, and both trainers with what their steps did."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from tests.integrations.conftest import make_model, make_tokenizer

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 4,
    "seed": 7,
}


def prompts(count: int = 16) -> Dataset:
    return Dataset.from_list([{"prompt": f"{chr(97 + i)}:", "answer": chr(97 + i)} for i in range(count)])


def vowels(completions: list[str], **_: Any) -> list[float]:
    """Share of vowels: something that a random policy has by chance."""
    return [sum(c in "aeiouAEIOU" for c in text) / 8 for text in completions]


class Recorded:
    """Keeps every micro-batch's loss as it is, before anything rounds it."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        vars(self).setdefault("losses", []).append(float(loss.detach()))
        return loss


def trained(trainer: Any) -> Any:
    """Train at once: a trainer seeds the sampler when it is made, and the next one would seed it again."""
    trainer.train()
    return trainer


def gradient_norms(trainer: Any) -> list[float]:
    return [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]


@pytest.fixture
def ours(tmp_path):
    """A function that makes our trainer."""
    from qtarget.integrations.rl.config import QTargetGRPOConfig
    from qtarget.integrations.rl.trainer import QTargetGRPOTrainer

    kind = type("OursRecorded", (Recorded, QTargetGRPOTrainer), {})

    def make(
        rule: str | None = "policy_gradient", *, model=None, rewards: Any = vowels, data=None, extra=None, **settings
    ):
        args = QTargetGRPOConfig(str(tmp_path / "ours"), trust_region=rule, **{**SETTINGS, **settings})
        data = prompts() if data is None else data
        return kind(model or make_model(), rewards, args, data, processing_class=make_tokenizer(), **(extra or {}))

    return make


@pytest.fixture
def theirs(tmp_path):
    """A function that makes TRL's trainer with the same sampling and averaging."""
    from trl import GRPOConfig, GRPOTrainer

    kind = type("TheirsRecorded", (Recorded, GRPOTrainer), {})

    def make(model=None, **settings):
        args = GRPOConfig(str(tmp_path / "theirs"), **{**SETTINGS, "scale_rewards": "none", "beta": 0.0, **settings})
        return kind(model or make_model(), vowels, args, prompts(), processing_class=make_tokenizer())

    return make
