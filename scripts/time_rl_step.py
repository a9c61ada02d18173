"""What a step on samples costs beside TRL's: the head alone, and loss with backward inside both trainers, in one process.

    python scripts/time_rl_step.py --output benchmarks/results/rl_step.json

Rounds alternate between the two; a ratio is that of the medians of five. Peak memory is of one process a side, above what it
held before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.storage.files import write_json

TOKENS, VOCABULARY, WIDTH = 384, 49_152, 576
ROUNDS = 5
SIDES = ("ours", "trl", "whole logits")


def head_steps() -> dict[str, Callable[[], Any]]:
    """Forward and backward of dppo_tv with entropy from hidden states; TRL's own head with the same rule in plain torch."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import add_fused_lm_head  # noqa: F401 - imports what the kernel needs

    import qtarget

    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=rng).requires_grad_()
    weight = (0.02 * torch.randn(VOCABULARY, WIDTH, generator=rng)).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=rng)
    advantages = torch.randn(TOKENS, generator=rng)
    with torch.no_grad():  # in parts: whole logits here would be the peak of every side
        parts = [
            (h @ weight.T).log_softmax(-1).gather(-1, y[:, None])[:, 0]
            for h, y in zip(hidden.split(16), labels.split(16), strict=True)
        ]
        sampled = torch.cat(parts) + 0.3 * torch.randn(TOKENS, generator=rng)

    def rule(log_probs: torch.Tensor) -> torch.Tensor:
        gap = (log_probs - sampled).detach()
        moved = (log_probs.detach().exp() - sampled.exp()).abs()
        kept = ~((advantages * gap > 0) & (moved > 0.2))
        return -(gap.exp().clamp(max=20.0) * kept * advantages * log_probs).mean()

    def cleared(loss: torch.Tensor) -> torch.Tensor:
        hidden.grad = weight.grad = None
        loss.backward()
        assert hidden.grad is not None
        return hidden.grad

    def ours() -> torch.Tensor:
        rollout = qtarget.Reference(label_log_probs=sampled)
        loss, _ = qtarget.linear_target_loss(
            hidden, weight, labels, "dppo_tv", advantages=advantages, rollout=rollout, return_report=True
        )
        return cleared(loss)

    def trl() -> torch.Tensor:
        log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32_768, None, 1.0, ("entropy",))[0]
        return cleared(rule(log_probs))

    def whole() -> torch.Tensor:
        log_probs = (hidden @ weight.T).log_softmax(-1)
        entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
        assert len(entropy) == TOKENS
        return cleared(rule(log_probs.gather(-1, labels[:, None])[:, 0]))

    return dict(zip(SIDES, (ours, trl, whole), strict=True))


def trainer_steps(folder: Path, length: int) -> dict[str, Callable[[], Any]]:
    """Loss and backward of both trainers on one batch of samples of the embedded model."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from qtarget import QTargetGRPOConfig, QTargetGRPOTrainer
    from qtarget.data.embedded import base_model_path

    rows = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])
    settings = {
        "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 1,
        "per_device_train_batch_size": 32, "num_generations": 8, "max_completion_length": length, "gradient_checkpointing": False,
        "disable_dropout": True,
    }  # fmt: skip
    trl_reward: Any = reward  # its alias asks for one signature
    kinds = {
        "ours": lambda: QTargetGRPOTrainer(
            str(base_model_path()), reward, QTargetGRPOConfig(str(folder / "a"), kept_samples=0, **settings), rows
        ),
        "trl": lambda: GRPOTrainer(
            str(base_model_path()), trl_reward, GRPOConfig(str(folder / "b"), scale_rewards="none", **settings), rows
        ),
    }
    out = {}
    for name, make in kinds.items():
        trainer: Any = make()
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._generate_and_score_completions([rows[i // 8] for i in range(32)])

        def step(trainer: Any = trainer, batch: Any = batch) -> float:
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            return float(loss.detach())

        out[name] = step
    return out


def reward(completions: list[str], **_: Any) -> list[float]:
    """Share of digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def interleaved(steps: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """CPU seconds of each side by round, their medians, and ours over the others'."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            seconds[name].append(round(time.process_time() - begin, 4))
    medians = {name: median(values) for name, values in seconds.items()}
    ratios = {f"ours / {name}": round(medians["ours"] / value, 3) for name, value in medians.items() if name != "ours"}
    return {"cpu_seconds": seconds, "medians": medians, "ratios": ratios}


def memory_of(side: str) -> float:
    """MiB that a process of its own took at its peak, above what it held before."""
    command = [sys.executable, __file__, "--side", side]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["mib"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("rl_step.json"))
    parser.add_argument("--length", type=int, default=64, help="longest completion, tokens")
    parser.add_argument("--side", choices=SIDES, help="measure the memory of one side alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.side:
        steps = head_steps()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        steps[options.side]()
        print(json.dumps({"mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)}))
        return
    steps = head_steps()
    grads = {name: step().clone() for name, step in steps.items()}
    agree = {name: float((grads["ours"] - g).norm() / g.norm()) for name, g in grads.items() if name != "ours"}
    found: dict[str, Any] = {
        "head": {"tokens": TOKENS, "vocabulary": VOCABULARY, "width": WIDTH, "gradients_differ": agree}
    }
    found["head"] |= interleaved(steps) | {"peak_mib": {side: memory_of(side) for side in SIDES}}
    with tempfile.TemporaryDirectory() as name:
        found["trainer"] = {
            "samples": 32,
            "longest": options.length,
            **interleaved(trainer_steps(Path(name), options.length)),
        }
    write_json(options.output, {"benchmark": "rl step", **found, "machine": machine_facts(), "versions": versions()})
    print(
        json.dumps({part: found[part]["ratios"] for part in ("head", "trainer")}, indent=1),
        json.dumps(found["head"]["peak_mib"]),
    )


if __name__ == "__main__":
    main()
