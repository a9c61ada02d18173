"""``kl/start``: the whole-vocabulary KL to the model that training began with, where that is at hand, and nowhere else."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from qtarget.integrations.rl.config import QTargetGRPOConfig
from qtarget.integrations.rl.differing import NoDifference
from qtarget.integrations.rl.start import is_base_the_start, is_logged, start_of
from tests.integrations.conftest import make_model
from tests.integrations.rl.conftest import vowels


def lora(**settings):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)


def measured(trainer, off) -> list[float]:
    """Train; before every step the KL from whole logits of the plain forwards, over the tokens of that step."""
    found, plain = [], trainer._compute_loss

    @torch.no_grad()
    def kl(inputs) -> float:
        ids, start = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1), inputs["prompt_ids"].shape[1]
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        model = trainer.model
        with off(model) as other:
            before = (other or model)(input_ids=ids, attention_mask=mask).logits
        live, before = (
            z[:, start - 1 : -1].double() / 0.7 for z in (model(input_ids=ids, attention_mask=mask).logits, before)
        )
        live, before = live.log_softmax(-1), before.log_softmax(-1)
        kept = inputs["completion_mask"].bool()
        return float((live.exp() * (live - before)).sum(-1)[kept].mean())

    def watched(model, inputs):
        found.append(kl(inputs))
        return plain(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    return found


def logged(trainer) -> list[float | None]:
    return [line.get("kl/start") for line in trainer.state.log_history if "loss" in line]


def test_with_an_adapter_it_is_to_the_model_without(ours):
    settings = {"temperature": 0.7, "learning_rate": 5e-2, "max_steps": 4}
    trainer = ours("dppo_tv", **settings, extra={"peft_config": lora()})
    expected = measured(trainer, lambda model: model.disable_adapter())
    assert logged(trainer) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert logged(trainer)[0] == pytest.approx(0, abs=1e-6) and logged(trainer)[-1] > 1e-3
    other = ours("dppo_tv", **settings, logging_steps=2, extra={"peft_config": lora()})
    other.train()  # of the step that is logged alone
    assert logged(other) == pytest.approx(expected[1::2], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "measured_at"),
    [
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "no", "logging_first_step": True}, [1]),
        ({"logging_strategy": "epoch"}, [1, 2, 3, 4, 5]),
        ({"logging_steps": 2}, [2, 4, 5]),
    ],
)
def test_it_is_measured_where_a_line_tells_it(tmp_path, settings, measured_at):
    args = QTargetGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    steps = [TrainerState(global_step=i, max_steps=5, logging_steps=int(args.logging_steps)) for i in range(5)]
    assert [state.global_step + 1 for state in steps if is_logged(args, state)] == measured_at


@pytest.mark.parametrize(("revision", "found"), [(None, "teacher"), ("main", "teacher"), ("step-100", None)])
def test_another_revision_of_the_same_name_is_not_the_start(tmp_path, revision, found):
    args = QTargetGRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, teacher_model_name_or_path="user/model", target="reverse_kl",
        model_init_kwargs={"revision": revision},
    )  # fmt: skip
    assert start_of(args, make_model(), "user/model") == found
    assert start_of(args, make_model(), "user/other") is None


def test_a_base_teacher_is_the_start_and_training_is_not_changed_by_the_measure(ours, monkeypatch):
    first = make_model()
    settings = {"teacher": "base", "target": "reverse_kl", "temperature": 0.7, "learning_rate": 5e-2, "max_steps": 3}
    trainer = ours("dppo_tv", model=copy.deepcopy(first), **settings)
    expected = measured(trainer, lambda model: nullcontext(first))
    assert logged(trainer) == pytest.approx(expected, rel=1e-4, abs=1e-7) and logged(trainer)[-1] > 1e-3
    monkeypatch.setattr("qtarget.integrations.rl.trainer.start_of", lambda *_: None)
    plain = ours("dppo_tv", model=copy.deepcopy(first), **settings)
    plain.train()
    assert logged(plain) == [None] * 3
    for (name, a), b in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_without_a_start_at_hand_it_is_not_logged(ours):
    trainer = ours("dppo_tv", max_steps=1)
    trainer.train()
    assert logged(trainer) == [None]


def test_an_adapter_that_adds_something_is_not_the_start():
    from peft import get_peft_model

    fresh = get_peft_model(make_model(), lora())
    assert is_base_the_start(fresh)
    assert not is_base_the_start(get_peft_model(make_model(), lora(init_lora_weights=False)))
    assert not is_base_the_start(make_model())


# -- what is said ----------------------------------------------------------------------------------------------------


def test_a_step_is_a_short_line(ours, capsys):
    ours("dppo_tv", max_steps=1, extra={"peft_config": lora()}).train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "reward" in line]
    words = ["step 1: loss", "reward", "KL to start", "KL to sampler", "length"]
    assert [word in line for word in words] == [True] * 5 and len(line) < 120 and "{" not in line


def test_a_reward_that_raises_is_told_with_its_line_and_no_checkpoint_is_invented(ours):
    def fails(completions, **_):
        answer = {}
        return [answer["gold"]] * len(completions)

    line = fails.__code__.co_firstlineno + 2
    with pytest.raises(ValueError, match=rf"KeyError: 'gold' \(.*test_start.py, line {line}\)") as told:
        ours(rewards=fails).train()
    assert "checkpoint" not in str(told.value)
    calls = []

    def later(completions, **_):
        calls.append(1)
        return vowels(completions) if len(calls) < 2 else fails(completions)

    with pytest.raises(ValueError, match=r"checkpoint-1 is untouched"):
        ours(rewards=later, save_strategy="steps", save_steps=1, max_steps=3).train()


# -- rewards that never differ ---------------------------------------------------------------------------------------


def test_rewards_that_never_differ_are_told_early_and_at_the_end(ours):
    def always(completions, **_):
        return [0.5] * len(completions)

    trainer = ours(rewards=always, max_steps=5)
    trainer.train()
    early, late = trainer.watch.said
    assert "differing rewards so far (24 samples), so nothing was learned" in early and "whole run (40 samples)" in late
    assert all("earned always = 0.5. Check" in text and "max_completion_length" in text for text in (early, late))
    beside = ours("dppo_tv", rewards=always, max_steps=1, teacher="base", target="reverse_kl")
    beside.train()
    assert ["the rewards taught nothing" in text for text in beside.watch.said] == [True]


def test_rewards_that_differ_across_groups_alone_are_no_difference_and_others_are():
    def watched(*seen: list[float | None]):
        watch = NoDifference(taught=False)
        for values in seen:
            watch.saw({"exact": values}, ["a"] * len(values), 2)
        watch.on_train_end(None, SimpleNamespace(is_world_process_zero=True), None)
        return watch.said

    assert len(watched([0.0, 0.0, 1.0, 1.0])) == len(watched([None, 0.0, float("nan"), None])) == 1
    assert watched([0.0] * 4, [0.0, 0.0, 1.0, 0.0], [0.0] * 4) == []


def test_a_run_that_goes_on_remembers_that_rewards_differed():
    watch = NoDifference(taught=False)
    watch.on_train_begin(None, SimpleNamespace(log_history=[{"frac_reward_zero_std": 0.5}]), None)
    watch.saw({"exact": [1.0, 1.0]}, ["a", "b"], 2)
    watch.on_train_end(None, SimpleNamespace(is_world_process_zero=True), None)
    assert watch.said == []
