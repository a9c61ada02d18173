"""A teacher that sees the solution: its prompt, where its numbers land, and the policy as its own teacher."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from qtarget.core.errors import ConfigError, DataError, ResumeError
from qtarget.integrations.rl.config import QTargetGRPOConfig
from qtarget.integrations.rl.teachers import privileged_prompt
from tests.integrations.conftest import make_model
from tests.integrations.rl.conftest import SETTINGS, prompts, trained
from tests.integrations.rl.test_trainer import batches_of

OPD = {"target": "reverse_kl", "rewards": None, "max_steps": 2}


def ragged() -> Dataset:
    """Prompts and solutions of different lengths, so that both are padded."""
    return Dataset.from_list([{"prompt": "a" * (1 + i % 3) + ":", "solution": "xyz" * (1 + i % 2)} for i in range(16)])


def test_the_template_is_filled_once():
    row = {"prompt": "say {privileged}", "solution": "{prompt}"}
    assert privileged_prompt(row, "solution", "{prompt} | {privileged}") == "say {privileged} | {prompt}"
    chat = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "solution": 4}
    found = privileged_prompt(chat, "solution", "{prompt} {privileged}")
    assert found == [{"role": "system", "content": "s"}, {"role": "user", "content": "q 4"}]
    with pytest.raises(DataError, match="privileged_column: solution"):
        privileged_prompt({"prompt": "a"}, "solution", "{prompt}{privileged}")


@pytest.mark.parametrize("own", [True, False], ids=["self", "another model"])
def test_the_loss_is_the_divergence_to_the_teacher_behind_its_own_prompt(own, ours):
    """By two whole forwards without padding, row by row."""
    model = make_model()
    settings = {"privileged_column": "solution", "privileged_template": "{prompt}{privileged}=", **OPD, "max_steps": 1}
    more = {"teacher": "self"} if own else {"extra": {"teacher_model": make_model(3)}}
    trainer = ours(None, data=ragged(), model=model, **settings, **more)
    teacher = make_model() if own else make_model(3)
    batch = batches_of(trainer)[0]
    policy = make_model()
    total, count = 0.0, 0
    for i in range(len(batch["prompt_ids"])):
        answer = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        heads = []
        for m, key in ((policy, "prompt"), (teacher, "teacher_prompt")):
            asked = batch[f"{key}_ids"][i][batch[f"{key}_mask"][i].bool()]
            with torch.no_grad():
                logits = m(torch.cat([asked, answer])[None]).logits[0, len(asked) - 1 : -1]
            heads.append(logits.log_softmax(-1))
        p, q = heads
        total += float((p.exp() * (p - q)).sum())
        count += len(answer)
    assert int(batch["num_items_in_batch"]) == count
    assert len({int(m.sum()) for m in batch["teacher_prompt_mask"]}) > 1, "nothing was padded"
    assert trainer.losses[0] == pytest.approx(total / count, rel=1e-4)
    assert trainer.losses[0] > 1e-3


def test_the_base_is_the_policy_before_training(ours):
    from peft import LoraConfig

    start = ours(None, teacher="base", **OPD, learning_rate=1e-2)
    start.train()
    assert start.losses[0] == pytest.approx(0, abs=1e-5)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    region = {"target": "reverse_kl", "target_weight": 1.0, "max_steps": 3, "learning_rate": 5e-2}
    trainer = trained(ours("dppo_tv", teacher="base", **region, extra={"peft_config": lora}))
    alone = trained(ours("dppo_tv", max_steps=3, learning_rate=5e-2, extra={"peft_config": lora}))
    # the adapter starts at nothing, so that the teacher is the policy at first, and no longer after a step
    assert trainer.losses[0] == pytest.approx(alone.losses[0], abs=1e-5)
    assert trainer.losses[1] > alone.losses[1] + 1e-5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": "self", "target": "reverse_kl"}, "says what the policy says"),
        ({"teacher": "other", "target": "reverse_kl"}, "expected self, base or ema, or a URL"),
        ({"teacher": "ema", "target": "reverse_kl", "teacher_decay": 1.0}, "teacher_decay: 1.0.*below 1"),
        ({"teacher": "base", "teacher_model_name_or_path": "x", "target": "reverse_kl"}, "both set"),
        ({"privileged_column": "solution"}, "no target reads one"),
        ({"privileged_column": "s", "target": "reverse_kl", "privileged_template": "{prompt}"}, "no {privileged}"),
    ],
)
def test_teachers_that_teach_nothing(settings, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        QTargetGRPOConfig(str(tmp_path), **{**SETTINGS, **settings})


def test_a_column_that_is_not_there(ours):
    with pytest.raises(DataError, match="privileged_column: solution"):
        ours(None, data=prompts(), teacher="self", privileged_column="solution", **OPD).train()


@pytest.mark.parametrize("adapter", [pytest.param(False, marks=pytest.mark.nightly), True], ids=["whole", "lora"])
def test_a_slow_teacher_is_the_mean_of_the_policies(adapter, ours):
    """By hand from the weights after every step; with an adapter nothing but the adapter is held twice."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({name: p.detach().clone() for name, p in trainer._base_model().named_parameters()})

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapter else None
    settings = {
        **OPD,
        "max_steps": 3,
        "learning_rate": 5e-2,
        "privileged_column": "solution",
        "privileged_template": "{privileged}{prompt}",
    }
    trainer = ours(None, teacher="ema", teacher_decay=0.75, data=ragged(), extra={"peft_config": lora}, **settings)
    trainer.add_callback(Watch())
    policy = dict(trainer._base_model().named_parameters())
    mean = {name: p.detach().clone() for name, p in policy.items() if p.requires_grad}
    trainer.train()
    for weights in seen:
        mean = {name: 0.75 * value + 0.25 * weights[name] for name, value in mean.items()}
    teacher = dict(trainer.frozen_models["teacher"][0].named_parameters())
    for name, value in mean.items():
        torch.testing.assert_close(teacher[name], value, rtol=1e-5, atol=1e-6)
    moved = [name for name, value in mean.items() if not torch.allclose(value, policy[name], atol=1e-4)]
    assert moved, "the policy stood still"
    assert not any(p.requires_grad for p in teacher.values())
    shared = {name for name in teacher if teacher[name].data_ptr() == policy[name].data_ptr()}
    assert shared == (set(policy) - set(mean)) and bool(shared) == adapter


def test_a_slow_teacher_goes_on_where_it_was(ours, tmp_path):
    settings = {"teacher": "ema", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    more = {"target": "reverse_kl", "target_weight": 1.0, "max_steps": 4}
    whole = trained(ours("dppo_tv", **settings, **more))
    again = ours("dppo_tv", **settings, **more)
    again.train(resume_from_checkpoint=str(tmp_path / "ours/checkpoint-2"))
    for a, b in ((whole.model, again.model), (whole.frozen_models["teacher"][0], again.frozen_models["teacher"][0])):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    (tmp_path / "ours/checkpoint-2/teacher_ema.safetensors").unlink()
    with pytest.raises(ResumeError, match="teacher_ema"):
        ours("dppo_tv", **settings, **more).train(resume_from_checkpoint=str(tmp_path / "ours/checkpoint-2"))
