"""The trainer with samplers, masks, bad rewards and settings that TRL knows by another name; and what it rests on in TRL."""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import textwrap
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from qtarget.core.errors import ConfigError, DataError, MissingStatisticError, RewardError
from qtarget.integrations.rl.batch import BATCH_KEYS, OPTIONAL_KEYS, Samples, samples_of
from qtarget.integrations.rl.config import QTargetGRPOConfig
from qtarget.integrations.rl.rollouts import REWARDS
from qtarget.integrations.rl.sums import PolicySums
from qtarget.integrations.shared.step import TargetOutput
from tests.integrations.conftest import make_model
from tests.integrations.rl.conftest import SETTINGS, gradient_norms, prompts, vowels

# -- what is relied on in TRL ----------------------------------------------------------------------------------------


def test_trls_methods_are_those_that_this_was_written_against():
    """A failure here means: read what changed in TRL's ``_compute_loss``, compare ``batch.py``, run the golden tests."""
    from trl import GRPOTrainer

    parameters = {name: list(inspect.signature(getattr(GRPOTrainer, name)).parameters) for name in
                  ("_compute_loss", "_generate_and_score_completions", "log", "compute_loss")}  # fmt: skip
    assert parameters == {
        "_compute_loss": ["self", "model", "inputs"],
        "_generate_and_score_completions": ["self", "inputs"],
        "log": ["self", "logs", "start_time"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    }
    names = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert names[:6] == ["self", "model", "reward_funcs", "args", "train_dataset", "eval_dataset"]
    assert {"rollout_func", "environment_factory", "peft_config", "tools"} <= set(names)
    # without comments and layout
    text = ast.dump(ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss))))
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == COMPUTE_LOSS


COMPUTE_LOSS = "b5e91c41bd352c24"
"""Of TRL 1.16.0."""


def batches_of(trainer) -> list[dict[str, Any]]:
    """Train, and keep what TRL handed to the loss."""
    seen: list[dict[str, Any]] = []
    plain = trainer._compute_loss

    def keep(model, inputs):
        seen.append(dict(inputs))
        return plain(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    return seen


class Sampler:
    """A ``rollout_func`` that draws uniformly from the letters, and knows its log-probs; some of them are missing."""

    def __init__(self, missing: float | None = None, log_prob: float = -math.log(80), count: int = 6) -> None:
        self.missing, self.log_prob, self.count = missing, log_prob, count

    def __call__(self, texts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        completions = [torch.randint(3, 55, (self.count,)).tolist() for _ in texts]
        log_probs = [[self.log_prob] * self.count for _ in texts]
        if self.missing is not None:
            for row in log_probs:
                row[0] = self.missing
        return {
            "prompt_ids": tokenizer(texts)["input_ids"],
            "completion_ids": completions,
            "logprobs": log_probs,
        }


def test_batch_keys(ours):
    assert set(batches_of(ours(max_steps=1))[0]) == {*BATCH_KEYS, REWARDS}
    off = batches_of(ours(max_steps=2, steps_per_generation=2))
    assert all(set(b) == {*BATCH_KEYS, REWARDS, "old_per_token_logps"} for b in off)
    both = batches_of(ours(max_steps=2, steps_per_generation=2, extra={"rollout_func": Sampler()}))
    assert all(set(b) <= {*BATCH_KEYS, *OPTIONAL_KEYS, REWARDS} and "sampling_per_token_logps" in b for b in both)


# -- a sampler of its own --------------------------------------------------------------------------------------------


def test_ratios_are_taken_to_the_sampler(ours):
    """A uniform sampler: ``mu = 1/80`` everywhere, so the logged numbers follow from the model's own log-probs."""
    trainer = ours(max_steps=1, extra={"rollout_func": Sampler()})
    batch = batches_of(trainer)[0]
    line = trainer.state.log_history[0]
    model = make_model()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    start = batch["prompt_ids"].shape[1]
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[:, start - 1 : -1]
    pi = log_probs.gather(-1, batch["completion_ids"][..., None])[..., 0].exp()
    ratio = (pi * 80).flatten()
    assert line["ratio/mean"] == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert line["ratio/max"] == pytest.approx(float(ratio.max()), rel=1e-4)
    assert line["ratio/ess"] == pytest.approx(float(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())), rel=1e-4)
    assert line["divergence/tv_mean"] == pytest.approx(float((pi - 1 / 80).abs().mean()), rel=1e-4)
    assert line["divergence/kl_k3"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-4)


def test_mismatch_and_staleness_are_told_apart(ours):
    """Both log-probs are known where sampling is rarer than steps: at the first step nothing is stale yet."""
    trainer = ours(max_steps=4, steps_per_generation=4, learning_rate=5e-3, extra={"rollout_func": Sampler()})
    trainer.train()
    lines = [line for line in trainer.state.log_history if "divergence/mismatch_kl" in line]
    assert len(lines) == 4
    assert lines[0]["divergence/staleness_kl"] == pytest.approx(0, abs=1e-9)
    assert lines[3]["divergence/staleness_kl"] > 1e-4
    assert all(line["divergence/mismatch_kl"] > 0.01 for line in lines)
    assert [line["rollout/age"] for line in lines] == [0, 1, 2, 3]


def test_missing_log_probs_are_left_out_and_counted(ours):
    trainer = ours(max_steps=1, extra={"rollout_func": Sampler(missing=math.nan)})
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["rollout/unscored_tokens"] == 8
    assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
    none_scored = ours(max_steps=1, extra={"rollout_func": Sampler(missing=math.nan, count=1)})
    none_scored.train()  # every token is masked: a zero that has a graph
    assert none_scored.losses == [0.0]
    assert gradient_norms(none_scored) == [0.0]


def test_the_rollout_as_anchor_needs_log_probs(ours):
    with pytest.raises(ConfigError, match=r"anchor: rollout.*use_vllm.*rollout_func"):
        ours(anchor="rollout", max_steps=1).train()
    for cut in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        with pytest.raises(ConfigError, match=f"{next(iter(cut))}.*anchor: old"):
            ours(extra={"rollout_func": Sampler()}, **cut)
    ours(max_steps=1, anchor="old", top_p=0.9, extra={"rollout_func": Sampler()}).train()


# -- masks -----------------------------------------------------------------------------------------------------------


def hand_made() -> dict[str, Any]:
    return {
        "prompt_ids": torch.tensor([[0, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[8, 9, 1], [10, 1, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "num_items_in_batch": torch.tensor(5),
    }


def test_tools_tokens_and_padding_are_not_trained_on():
    inputs = hand_made() | {"tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}
    samples = samples_of(inputs, None)
    assert samples.labels.tolist() == [[-100, -100, 8, -100, 1], [-100, -100, 10, 1, -100]]
    assert samples.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]  # the model still reads them
    assert samples.unscored == 0


def test_trls_own_correction_is_a_factor_on_the_advantage():
    inputs = hand_made() | {"importance_sampling_ratio": torch.tensor([[0.5], [2.0]])}
    assert samples_of(inputs, "old").advantages[:, 2:].tolist() == [[0.5] * 3, [-2.0] * 3]


def test_truncated_completions_can_be_masked(ours):
    trainer = ours(max_steps=2, mask_truncated_completions=True, max_completion_length=3)
    trainer.train()
    assert all(math.isfinite(loss) for loss in trainer.losses)


# -- what is logged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_tokens_without_an_advantage_can_be_skipped(loss_type, ours):
    """The same losses and gradients; fewer tokens at the head. Rewards of 0 and 1, so that some groups have no signal."""

    def hits(completions, **_):
        return [float(text[:1] in "aeiouAEIOU") for text in completions]

    def run(skip):
        trainer = ours("dppo_tv", rewards=hits, loss_type=loss_type, steps_per_generation=2, skip_without_signal=skip)
        seen, plain = [], trainer._step_of
        trainer._step_of = lambda s, *more: seen.append((s.labels != -100, s.advantages != 0)) or plain(s, *more)
        trainer.train()
        return trainer, seen

    (whole, everything), (skipped, fewer) = run(False), run(True)
    assert skipped.losses == pytest.approx(whole.losses, abs=1e-6)
    assert gradient_norms(skipped) == pytest.approx(gradient_norms(whole), rel=1e-4, abs=1e-6)
    assert any(norm > 0 for norm in gradient_norms(whole))
    for (kept, _), (all_kept, weighed) in zip(fewer, everything, strict=True):
        assert torch.equal(kept, all_kept & weighed)
    assert sum(int(kept.sum()) for kept, _ in fewer) < sum(int(kept.sum()) for kept, _ in everything)
    silent = ours(rewards=lambda completions, **_: [1.0] * len(completions), max_steps=1, skip_without_signal=True)
    silent.train()  # nothing at all is left
    assert silent.losses == [0.0] and gradient_norms(silent) == [0.0]
    assert silent.state.log_history[0]["rollout/unscored_tokens"] == 0


def test_sums_against_loops():
    rng = torch.Generator().manual_seed(0)
    ids, prompt = torch.randint(3, 50, (96, 9), generator=rng), 3
    mask = torch.zeros(96, 9, dtype=torch.bool)
    mask[:, prompt:] = torch.rand(96, 6, generator=rng) < 0.8
    live, anchor, old = (-3 * torch.rand(96, 9, generator=rng) for _ in range(3))
    anchor[0, 4], mask[0, 4] = math.nan, True
    labels = ids.masked_fill(~mask | anchor.isnan(), -100)
    advantages = torch.randn(96, 1, generator=rng).expand(96, 9).clone()
    advantages[1] = 0
    factor = torch.tensor([1.0, 0.0, -0.5, 0.7])[torch.randint(4, (96, 9), generator=rng)]
    a = factor * (live - anchor).exp() * advantages
    samples = Samples(ids, mask, mask, labels, advantages, anchor, anchor, old)
    shifted = {
        k: v[:, 1:].nan_to_num()
        for k, v in {"label_log_probs": live, "label_weights": a, "entropy": live.abs()}.items()
    }
    sums = PolicySums()
    sums.add(TargetOutput(**shifted), samples, advantages)
    found = sums.flush(Accelerator(cpu=True), ratios=True)
    tokens = [(i, t) for i in range(96) for t in range(1, 9) if labels[i, t] != -100]
    rows = [tuple(float(v[i, t]) for v in (live, anchor, old, advantages, factor)) for i, t in tokens]
    ratios = [math.exp(p - m) for p, m, *_ in rows]
    assert found["ratio/mean"] == pytest.approx(sum(ratios) / len(rows), rel=1e-5)
    assert found["ratio/max"] == pytest.approx(max(ratios), rel=1e-5)
    moved = [abs(math.exp(p) - math.exp(m)) for p, m, *_ in rows]
    assert found["divergence/tv_max"] == pytest.approx(max(moved), rel=1e-5)
    assert found["divergence/staleness_kl"] == pytest.approx(
        sum(math.exp(p - o) - 1 - (p - o) for p, _, o, *_ in rows) / len(rows), rel=1e-4
    )
    weighed = [row for row in rows if row[3] != 0]
    blocked = [row[4] == 0 for row in weighed]
    assert found["region/weight"] == pytest.approx(sum(row[4] for row in weighed) / len(weighed), abs=1e-5)
    assert found["region/blocked"] == pytest.approx(sum(blocked) / len(weighed))
    assert found["region/corrective"] == pytest.approx(sum(row[4] < 0 for row in weighed) / len(weighed))
    for name, among in {
        "positive": [r[3] > 0 for r in weighed],
        "negative": [r[3] < 0 for r in weighed],
        "rare": [math.exp(r[1]) < 0.1 for r in weighed],
        "likely": [math.exp(r[1]) > 0.9 for r in weighed],
    }.items():
        share = sum(b and m for b, m in zip(blocked, among)) / sum(among)
        assert found[f"region/blocked_{name}"] == pytest.approx(share)
    pull = [abs(r[3]) * (1 - math.exp(r[0])) for r in weighed]
    lost = sum(p for p, b in zip(pull, blocked) if b)
    assert found["region/pull_on_blocked"] == pytest.approx(lost / sum(pull), rel=1e-5)
    assert found["rollout/unscored_tokens"] == 1
    assert sums.flush(Accelerator(cpu=True), ratios=True) == {}


# -- rewards ---------------------------------------------------------------------------------------------------------


def raises(completions, **_):
    raise KeyError("gold")


BAD = {
    "raises": (raises, r"reward 'raises' raised KeyError: 'gold'"),
    "short": (lambda completions, **_: [1.0], r"returned 1 rewards for 8 completions"),
    "nothing": (lambda completions, **_: None, r"returned NoneType; expected a list of 8 numbers"),
    "none": (lambda completions, **_: [None] * len(completions), r"returned None for completion 0.*nothing else"),
    "nan": (lambda completions, **_: [1.0] * 7 + [math.nan], r"returned nan for completion 7"),
    "text": (lambda completions, **_: ["1.0"] * len(completions), r"returned '1.0' for completion 0"),
    "one": (lambda completions, **_: 1.0, r"returned float"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rewards_are_named_and_the_checkpoint_stays(kind, ours, tmp_path):
    function, words = BAD[kind]
    calls = []

    def reward(completions, **kwargs):
        calls.append(1)
        return vowels(completions) if len(calls) < 2 else function(completions=completions, **kwargs)

    reward.__name__ = "raises"
    trainer = ours(rewards=reward, save_strategy="steps", save_steps=1, max_steps=3)
    with pytest.raises(RewardError, match=words):
        trainer.train()
    saved = sorted(p.name for p in (tmp_path / "ours").glob("checkpoint-*"))
    assert saved == ["checkpoint-1"]
    assert (tmp_path / "ours/checkpoint-1/model.safetensors").stat().st_size > 0
    assert '"stopped"' in (tmp_path / "ours/qtarget_log.jsonl").read_text()


def test_none_is_for_another_function_to_score(ours):
    def nobody(completions, **_):
        return [None] * len(completions)

    trainer = ours(rewards=[vowels, nobody], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/vowels/mean"] == trainer.state.log_history[0]["reward"]


def test_columns_that_a_reward_asks_for(ours):
    def close(completions, answer, **_):
        return [float(text.startswith(a)) for text, a in zip(completions, answer, strict=True)]

    ours(rewards=close, max_steps=1).train()
    with pytest.raises(DataError, match=r"reward 'close' asks for 'answer'.*no such column \(they have prompt\)"):
        ours(rewards=close, data=Dataset.from_list([{"prompt": "a:"}] * 8))


# -- refusals --------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"beta": 0.04}, r"beta: 0.04.*target: reverse_kl, target_weight: 0.04"),
    ({"loss_type": "cispo"}, r"trust_region: cispo"),
    ({"loss_type": "vespo"}, r"TRL's GRPOTrainer"),
    ({"epsilon": 0.1}, r"ppo_clip, trust_region_kwargs: \{clip_low: 0.1\}"),
    ({"epsilon_high": 0.3}, r"clip_high: 0.3"),
    ({"delta": 2.0}, r"max_ratio: 2.0"),
    ({"importance_sampling_level": "sequence"}, r"importance_sampling_level"),
    ({"off_policy_mask_threshold": 0.5}, r"dppo_kl"),
    ({"top_entropy_quantile": 0.2}, r"top_entropy_quantile"),
    ({"entropy_coef": 0.01}, r"entropy_coef"),
    ({"vllm_importance_sampling_correction": True}, r"correct twice.*anchor: old"),
    ({"anchor": "reference"}, r"anchor"),
    ({"trust_region": None}, r"neither trust_region nor target"),
    ({"trust_region": "dft"}, r"no rule for samples"),
    ({"target": "dppo_tv"}, r"set it as trust_region"),
    ({"target": "sft"}, r"sample of any quality"),
    ({"target": "reverse_kl", "loss_type": "grpo"}, r"loss_type: dapo"),
    ({"save_strategy": "steps", "save_steps": 3, "steps_per_generation": 2}, r"save_steps: 3.*set save_steps: 4"),
    ({"learning_rate": math.nan}, r"learning_rate"),
    ({"advantage": "judge"}, r"expected reward or teacher"),
    ({"advantage": "teacher", "trust_region": None, "target": "reverse_kl"}, r"read by a trust region alone"),
    ({"advantage": "teacher", "loss_type": "grpo"}, r"loss_type: dapo"),
    ({"advantage": "teacher", "skip_without_signal": True}, r"skip_without_signal.*advantage: teacher"),
    ({"skip_without_signal": True, "target": "reverse_kl"}, r"skip_without_signal.*without an advantage"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_keys_that_have_another_name(settings, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        QTargetGRPOConfig(str(tmp_path), **{**SETTINGS, **settings})


def test_what_is_missing(ours, tmp_path):
    from trl import GRPOConfig

    from qtarget.integrations.rl.trainer import QTargetGRPOTrainer

    with pytest.raises(MissingStatisticError, match=r"needs|teacher_model_name_or_path"):
        ours("dppo_tv", target="reverse_kl")
    with pytest.raises(ConfigError, match="there is none"):
        ours(rewards=None)
    with pytest.raises(ConfigError, match="nothing would read them"):
        ours(None, target="reverse_kl", extra={"teacher_model": make_model(1)})
    with pytest.raises(DataError, match="no `prompt`"):
        ours(data=Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}]))
    with pytest.raises(DataError, match="no rows"):
        ours(data=prompts().select([]))
    with pytest.raises(ConfigError, match="QTargetGRPOConfig"):
        QTargetGRPOTrainer(make_model(), vowels, GRPOConfig(str(tmp_path), **SETTINGS), prompts())
    with pytest.raises(RewardError, match="int"):
        ours(rewards=3)


# -- the rest of TRL -------------------------------------------------------------------------------------------------


def test_resuming_is_the_same_run_to_the_bit(ours, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "steps_per_generation": 2, "max_steps": 4}
    whole = ours("drpo", **settings)
    whole.train()
    again = ours("drpo", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "ours/checkpoint-2"))
    assert len(again.losses) == 2
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_lora_trains_its_adapter_alone(ours):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = ours("dppo_tv", max_steps=2, learning_rate=1e-2, extra={"peft_config": config})
    trainer.train()
    assert min(gradient_norms(trainer)) > 0
    start = dict(make_model().named_parameters())
    base = trainer.model.get_base_model().model.embed_tokens.weight
    assert torch.equal(base, start["model.embed_tokens.weight"])


def test_evaluation_logs_the_same_numbers(ours):
    trainer = ours("dppo_tv", max_steps=1, extra={"eval_dataset": prompts(4)}, per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    assert metrics["eval_ratio/mean"] == 1.0
    assert 0 <= metrics["eval_reward"] <= 1
