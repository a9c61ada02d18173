"""A run whose samples depend on prompt and place in the group alone, in one process or as one of two."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections import Counter
from typing import Any

import torch

from qtarget.integrations.rl.config import QTargetGRPOConfig
from qtarget.integrations.rl.trainer import QTargetGRPOTrainer
from tests.integrations.conftest import make_model, make_tokenizer
from tests.integrations.rl.conftest import SETTINGS, prompts, vowels


def sampler(texts: list[str], trainer: Any) -> dict[str, Any]:
    """Letters drawn by a hash; lengths differ, so that tokens are not spread evenly over processes."""
    seen: Counter[str] = Counter()
    completions, log_probs = [], []
    for text in texts:
        noise = hashlib.blake2b(f"{text} {seen[text]} {trainer.state.global_step}".encode(), digest_size=8).digest()
        seen[text] += 1
        length = 2 + noise[0] % 6
        completions.append([3 + b % 52 for b in noise[:length]])
        log_probs.append([-math.log(40 + b % 60) for b in noise[:length]])
    return {
        "prompt_ids": trainer.processing_class(texts)["input_ids"],
        "completion_ids": completions,
        "logprobs": log_probs,
    }


def main() -> None:
    output, settings = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    args = QTargetGRPOConfig(output, trust_region="dppo_tv", **{**SETTINGS, **settings})
    trainer = QTargetGRPOTrainer(
        make_model(), vowels, args, prompts(), processing_class=make_tokenizer(), rollout_func=sampler
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save({name: p.detach() for name, p in make_plain(trainer).named_parameters()}, f"{output}/final.pt")
        with open(f"{output}/log.json", "w") as file:
            json.dump(trainer.state.log_history, file)
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(0)  # all is written; gloo's threads abort a process that winds down while the other one still talks


def make_plain(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model_wrapped)


if __name__ == "__main__":
    main()
