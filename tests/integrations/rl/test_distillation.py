"""Distillation on the model's own samples: the same runs as TRL's ``DistillationTrainer``, and a target beside a region."""

from __future__ import annotations

import math

import pytest
import torch

from tests.integrations.conftest import make_model, make_tokenizer
from tests.integrations.rl.conftest import SETTINGS, Recorded, gradient_norms, prompts, trained

STEPS = {"max_steps": 10, "num_generations": 2, "learning_rate": 5e-3}


@pytest.fixture
def distilled(tmp_path):
    """A function that makes TRL's distillation trainer; each prompt once in a batch of eight, as TRL draws them."""
    from trl import DistillationConfig, DistillationTrainer

    kind = type("TheirsRecorded", (Recorded, DistillationTrainer), {})

    def make(beta: float, **settings):
        known = {k: v for k, v in SETTINGS.items() if k != "num_generations"}
        args = DistillationConfig(str(tmp_path / "theirs"), beta=beta, **{**known, "max_steps": 10, **settings})
        return kind(make_model(), make_model(3), args, prompts(), processing_class=make_tokenizer())

    return make


@pytest.mark.parametrize(("target", "kwargs", "beta"), [
    ("forward_kl", None, 0.0),
    ("reverse_kl", None, 1.0),
    ("generalized_jsd", {"beta": 0.5}, 0.5),
])  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_losses_are_trls(target, kwargs, beta, temperature, ours, distilled):
    """TRL's loss on our own batches: the two trainers order prompts differently, and a batch decides all."""
    trainer = ours(
        None, target=target, target_kwargs=kwargs, rewards=None, temperature=temperature,
        extra={"teacher_model": make_model(3)}, **STEPS,
    )  # fmt: skip
    theirs = distilled(beta, temperature=temperature)
    values = []
    plain = trainer._compute_loss

    def both(model, inputs):
        theirs.model.load_state_dict(trainer.model.state_dict())
        loss, *_ = theirs._compute_loss(theirs.model, inputs, inputs["num_items_in_batch"])
        theirs.model.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in theirs.model.parameters()]).norm()
        values.append((float(loss.detach()), float(norm)))
        return plain(model, inputs)

    trainer._compute_loss = both
    trainer.train()
    losses, norms = zip(*values, strict=True)
    assert losses[-1] < losses[0], "nothing was learnt"
    torch.testing.assert_close(torch.tensor(trainer.losses), torch.tensor(losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(gradient_norms(trainer)), torch.tensor(norms), rtol=1e-5, atol=1e-6)
    line = trainer.state.log_history[0]
    assert not [key for key in line if "reward" in key or key.startswith(("ratio", "region"))]


def test_a_region_and_a_teacher(ours):
    """The loss is the sum of the two runs' losses on the same batch, at every step from the same weights."""
    teacher = {"teacher_model": make_model(3)}
    both = trained(ours("dppo_tv", target="reverse_kl", target_weight=0.3, max_steps=1, extra=teacher))
    alone = trained(ours("dppo_tv", max_steps=1))
    apart = trained(ours(None, target="reverse_kl", rewards=None, max_steps=1, extra=teacher))
    assert both.losses[0] == pytest.approx(alone.losses[0] + 0.3 * apart.losses[0], rel=1e-5)


def test_the_teacher_stays_as_it_is(ours):
    teacher = make_model(3)
    before = [p.clone() for p in teacher.parameters()]
    trainer = ours(None, target="skew_kl", rewards=None, max_steps=2, extra={"teacher_model": teacher})
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(math.isfinite(v) and v > 0 for v in trainer.losses)


def test_a_teachers_advantage_is_the_gap_of_log_probs_at_the_sample(ours):
    """The loss and what is logged, by hand from both models; nothing of rewards is logged."""
    teacher, settings = make_model(3), {"max_steps": 1, "advantage": "teacher", "temperature": 0.7}
    trainer = ours("policy_gradient", rewards=None, extra={"teacher_model": teacher}, **settings)
    seen, plain = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(dict(inputs)) or plain(model, inputs)
    trainer.train()
    (batch,), model = seen, make_model()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    start, mask = batch["prompt_ids"].shape[1], batch["completion_mask"].bool()
    pi, told = (
        (m(ids).logits[:, start - 1 : -1] / 0.7)
        .log_softmax(-1)
        .gather(-1, batch["completion_ids"][..., None])[..., 0][mask]
        for m in (model, teacher)
    )
    gap = (told - pi).detach()
    loss = -((pi - pi.detach()).exp() * gap).mean()
    loss.backward()
    assert trainer.losses == pytest.approx([float(loss)], rel=1e-5)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert gradient_norms(trainer) == pytest.approx([float(norm)], rel=1e-4)
    line = trainer.state.log_history[0]
    assert line["region/weight"] == pytest.approx(1, rel=1e-5)
    assert not [key for key in line if "reward" in key]


def test_a_teachers_advantage_with_a_region_on_old_samples_comes_nearer_to_the_teacher(ours):
    settings = {"max_steps": 24, "steps_per_generation": 2, "learning_rate": 5e-3, "advantage": "teacher"}
    trainer = ours("dppo_tv", rewards=None, extra={"teacher_model": make_model(3)}, **settings)
    trainer.train()
    assert {"region/blocked_positive", "region/blocked_negative"} <= set(trainer.state.log_history[0])
    with torch.no_grad():
        ids = torch.randint(3, 55, (16, 8))
        told, now, before = (m(ids).logits.log_softmax(-1) for m in (make_model(3), trainer.model, make_model()))
    kl = [float((p.exp() * (p - told)).sum(-1).mean()) for p in (before, now)]
    assert kl[1] < kl[0]
