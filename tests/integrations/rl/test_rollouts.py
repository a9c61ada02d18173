"""Samples that a run keeps: their numbers are those of the step, their rewards those of their own text."""

from __future__ import annotations

import json
import math

import pytest
import torch

from qtarget.core.errors import ConfigError
from qtarget.integrations.rl.rollouts import own_rewards
from qtarget.registry import get_target
from qtarget.report.runs.records import ROLLOUTS_FILE
from qtarget.report.runs.rollouts import read_rollouts, region_weights
from tests.integrations.conftest import make_model, make_tokenizer
from tests.integrations.rl.conftest import vowels


def letters(completions, **_):
    return [float(len(text)) for text in completions]


def test_what_is_kept(ours, tmp_path):
    """Two functions, shuffled batches, updates on old samples; weights again by the rule, from what was kept."""
    trainer = ours(
        "drpo", rewards=[vowels, letters], steps_per_generation=2, learning_rate=5e-3, kept_samples=6, loss_type="grpo",
        reward_weights=[1.0, 0.5],
    )  # fmt: skip
    trainer.train()
    rows = read_rollouts(tmp_path / "ours")
    assert [row["step"] for row in rows] == [s for s in (1, 2, 3, 4) for _ in range(6)]
    assert [row["age"] for row in rows] == [a for a in (0, 1, 0, 1) for _ in range(6)]
    tokenizer, model = make_tokenizer(), make_model()
    for row in rows:
        text = row["completion"]
        assert row["rewards"] == {
            "vowels": pytest.approx(vowels([text])[0]),
            "letters": pytest.approx(letters([text])[0]),
        }
        assert row["weights"] == pytest.approx(region_weights(get_target("drpo"), row), abs=2e-3, nan_ok=True)
    assert any(row["log_probs"] != row["anchor"] for row in rows)
    first = rows[0]
    ids = tokenizer(first["prompt"])["input_ids"]
    said = first["ids"]
    assert [tokenizer.decode([i]) for i in said] == first["tokens"]
    with torch.no_grad():
        scores = model(torch.tensor([ids + said])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    expected = scores.gather(-1, torch.tensor(said)[:, None])[:, 0].tolist()
    assert first["log_probs"] == pytest.approx(expected, rel=1e-3)


def test_a_resumed_run_keeps_the_same_samples(ours, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "kept_samples": 2}
    ours(**settings).train()
    file = tmp_path / "ours" / ROLLOUTS_FILE
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:6]))  # killed at the third step
    ours(**settings).train(resume_from_checkpoint=str(tmp_path / "ours/checkpoint-2"))
    assert file.read_text() == whole


def test_none_and_less_than_none(ours, tmp_path):
    ours(kept_samples=0, max_steps=1).train()
    assert not (tmp_path / "ours" / ROLLOUTS_FILE).exists()
    with pytest.raises(ConfigError, match="kept_samples: -1"):
        ours(kept_samples=-1)


def test_without_rewards_there_is_the_distance_to_the_teacher(ours, tmp_path):
    trainer = ours(None, target="reverse_kl", rewards=None, max_steps=1, extra={"teacher_model": make_model(3)})
    trainer.train()
    rows = read_rollouts(tmp_path / "ours")
    assert "rewards" not in rows[0] and all(v > 0 for v in rows[0]["losses"])
    assert "NaN" not in json.dumps(rows)


def test_rewards_of_one_process_among_two():
    logs = {"a": [9.0, 0.0, 1.0, None, 3.0], "b": [9.0, 4.0, 5.0, 6.0, 7.0]}
    found = own_rewards(logs, ["a", "b"], count=2, process=1, processes=2).tolist()
    assert math.isnan(found[0][0])
    assert (found[0][1], found[1]) == (6.0, [3.0, 7.0])


# -- outcomes that a region sees beside the sampled token ------------------------------------------------------------


def test_a_region_over_listed_outcomes(ours):
    """The rule's weights from whole distributions of both policies; half of them differ from those of the sampled token alone."""
    settings = {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "learning_rate": 2e-2,
        "temperature": 0.8,
        "max_steps": 4,
    }
    region = {"outcomes": "listed", "delta_low": 0.05, "delta_high": 0.05}
    trainer = ours("dppo_tv", trust_region_kwargs=region, listed_outcomes=5, kept_samples=0, **settings)
    steps, plain = [], trainer._step_of

    def watch(samples, *rest):
        step = plain(samples, *rest)
        steps.append((samples, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
        return step

    outputs = []
    trainer._step_of = watch
    add = trainer._sums["train"].add
    trainer._sums["train"].add = lambda output, *rest: outputs.append(output) or add(output, *rest)
    trainer.train()
    start, now = make_model(), make_model()
    samples, weights = steps[3]  # two batches, each used twice, all of them drawn by the start
    now.load_state_dict(weights, strict=False)
    with torch.no_grad():
        mu, pi = (
            (m(samples.ids, attention_mask=samples.attention_mask).logits / 0.8).log_softmax(-1)[:, :-1]
            for m in (start, now)
        )
    ids = mu.topk(5).indices
    lists = [
        torch.cat([v.exp().gather(-1, ids), 1 - v.exp().gather(-1, ids).sum(-1, keepdim=True)], -1) for v in (mu, pi)
    ]
    moved = (lists[0] - lists[1]).abs().sum(-1) / 2
    labels = samples.labels[:, 1:]
    kept = labels != -100
    a, b = (v.gather(-1, labels.clamp(min=0)[..., None])[..., 0] for v in (pi, mu))
    given, gap = samples.advantages[:, 1:], a - b
    ratio = gap.exp()
    blocked = (given * gap > 0) & (moved > 0.05)
    expected = torch.where(blocked, 0.0, ratio.clamp(max=20.0) * given)
    torch.testing.assert_close(outputs[3].label_weights[kept], expected[kept], rtol=1e-3, atol=1e-4)
    alone = (given * gap > 0) & ((a.exp() - b.exp()).abs() > 0.05)
    assert bool((blocked & kept).any()) and bool(((blocked != alone) & kept).any())


def test_outcomes_of_a_foreign_sampler_are_unknown(ours):
    from tests.integrations.rl.test_trainer import Sampler

    region = {"trust_region_kwargs": {"outcomes": "listed"}}
    with pytest.raises(ConfigError, match=r"outcomes: listed.*anchor: old"):
        ours("dppo_kl", extra={"rollout_func": Sampler()}, **region)
    ours(
        "dppo_kl", extra={"rollout_func": Sampler()}, anchor="old", steps_per_generation=2, max_steps=2, **region
    ).train()
    ours("dppo_kl", max_steps=1, **region).train()  # fresh samples: nothing has moved
    with pytest.raises(ConfigError, match="listed_outcomes: 0"):
        ours("dppo_kl", listed_outcomes=0)
