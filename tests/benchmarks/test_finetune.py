"""The benchmarks' bare loop against the trainer that users run."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtarget import get_target
from qtarget.benchmarks.finetune import Recipe, completion_log_probs, encode, fine_tune, order, schedule
from qtarget.core.types import Reference
from qtarget.data.embedded import base_model_path, load_demonstrations

STEPS, BATCH = 4, 3
LENGTHS = [3, 9, 4, 8, 5, 7]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


def base_model():
    return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype="float32")


def test_a_step_of_the_loop_is_a_step_of_the_trainer(tokenizer, tmp_path):
    from datasets import Dataset

    from qtarget import QTargetConfig, QTargetTrainer

    rows = load_demonstrations("train")[:BATCH]
    args = QTargetConfig(
        target="dft", output_dir=str(tmp_path), per_device_train_batch_size=BATCH, learning_rate=1e-3, max_steps=1,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, activation_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    trainer = QTargetTrainer(base_model(), args, None, data, None, tokenizer)
    trainer.train()
    ours, start = base_model(), dict(base_model().named_parameters())
    fine_tune(ours, encode(tokenizer, rows), get_target("dft"), Recipe(1e-3, BATCH, steps=1))
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter - start[name]).abs().mean() > 5e-4, name  # Adam's first step is the gradient's sign
        apart = (parameter - theirs[name].cpu()).abs() > 1e-5
        assert apart.double().mean() < 1e-3, name  # a sign may turn where a gradient is all but zero


def test_every_row_comes_once_an_epoch_beside_rows_of_its_length():
    steps = order(LENGTHS, Recipe(1.0, batch_size=2, steps=6, seed=1))
    for epoch in (steps[:3], steps[3:]):
        assert sorted(row for step in epoch for row in step) == list(range(6))
    assert {frozenset(step) for step in steps} == {frozenset({0, 2}), frozenset({4, 5}), frozenset({1, 3})}
    assert steps == order(LENGTHS, Recipe(1.0, 2, 6, seed=1)) != order(LENGTHS, Recipe(1.0, 2, 6, seed=2))


def test_the_rate_rises_for_a_tenth_then_falls_to_almost_zero():
    shares = [schedule(step, 20) for step in range(20)]
    assert shares[1] == max(shares) == 1.0 and shares[0] == 0.5
    assert shares[2:] == sorted(shares[2:], reverse=True) and 0 < shares[-1] < 0.1


def test_noise_tokens_are_counted_apart(tokenizer):
    rows = [dict(row, noise_spans=[]) for row in load_demonstrations("train")[:BATCH]]
    clean = fine_tune(base_model(), encode(tokenizer, rows), get_target("sft"), Recipe(1e-4, BATCH, 1))
    every = [dict(row, noise_spans=[[0, len(row["completion"]), "all"]]) for row in rows]
    noisy = fine_tune(base_model(), encode(tokenizer, every), get_target("sft"), Recipe(1e-4, BATCH, 1))
    assert clean.noise_share == 0.0
    assert noisy.noise_share is not None and 0.5 < noisy.noise_share < 1.0  # the end of text is no noise


def test_the_base_anchors_a_target_that_asks_for_it(tokenizer):
    encoded = encode(tokenizer, load_demonstrations("train")[:BATCH])
    model = base_model()
    known = list(completion_log_probs(model, encoded))
    assert [len(values) for values in known] == [len(row.completion) for row in encoded]
    recipe = Recipe(1e-3, BATCH, STEPS)
    free, held = base_model(), base_model()
    fine_tune(free, encoded, get_target("sft"), recipe)
    reference = [Reference(log_probs=values) for values in known]
    fine_tune(held, encoded, get_target("sft_kl", kl_weight=20.0), recipe, reference=reference)

    def distance(moved):
        found = completion_log_probs(moved, encoded)
        return sum(float((a.exp() * (a - b)).sum()) for a, b in zip(known, found, strict=True))

    assert distance(held) < 0.5 * distance(free)


def test_training_can_be_stopped_early(tokenizer):
    encoded = encode(tokenizer, load_demonstrations("train")[:BATCH])
    trained = fine_tune(
        base_model(), encoded, get_target("sft"), Recipe(1e-4, BATCH, STEPS), after_step=lambda done: done == 2
    )
    assert len(trained.losses) == 2
    assert torch.tensor(trained.losses).isfinite().all()
