"""The trainer against TRL's own, against full logits, and against itself with the batch cut differently."""

import math
import os
import time

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import qtarget
from qtarget.core.errors import (
    ConfigError,
    DataError,
    IncompatibleError,
    MissingStatisticError,
    NonFiniteLossError,
    QTargetError,
)
from qtarget.loss import whole_rows
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer

BATCH_SCOPE = ["talr", "rho1", "inverse_likelihood"]


def weights_of(trainer):
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_is_trls_own_trainer(make_trainer, rows, tmp_path):
    ours = make_trainer("sft", gradient_accumulation_steps=2)
    ours.train()
    theirs = SFTTrainer(
        make_model(),
        SFTConfig(str(tmp_path / "trl"), gradient_accumulation_steps=2, **SETTINGS),
        None,
        rows,
        None,
        make_tokenizer(),
    )
    theirs.train()
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=1e-4, atol=1e-6)
    assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("target", ["dft", "prior_surprise", "asft", "target_sft", "gift", "iw_sft", "eaft"])
def test_loss_equals_full_logits(make_trainer, target, packing):
    """One batch through collator, backbone and chunked loss; the oracle scores each document alone, on full logits."""
    base = make_model(seed=3)
    kwargs = {"top_k": 8} if target == "eaft" else {}
    trainer = make_trainer(
        target, models={"reference_model": base, "teacher_model": base}, packing=packing, target_kwargs=kwargs
    )
    batch = next(iter(trainer.get_train_dataloader()))
    rows_seen = {int(i) for i in batch["row_ids"].unique()} - {-1}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    logits, labels, reference, ids = [], [], [], []
    tokenizer = make_tokenizer()
    for index in rows_seen:
        row = make_rows()[index]
        prompt = tokenizer(row["prompt"])["input_ids"]
        tokens = torch.tensor([prompt + tokenizer(row["completion"] + "^")["input_ids"]])
        with torch.no_grad():
            model = make_model().eval()
            logits.append(model(tokens).logits[0, :-1])
            reference.append(base.eval()(tokens).logits[0, :-1])
        label = tokens[0, 1:].clone()
        label[: len(prompt) - 1] = -100
        labels.append(label)
        ids.append(torch.full_like(label, index))
    y = torch.cat(labels)
    frozen = qtarget.Reference.from_logits(torch.cat(reference), y)
    expected = qtarget.target_loss(
        torch.cat(logits),
        y,
        qtarget.get_target(target, **kwargs),
        reference=frozen,
        teacher=frozen,
        sequence_ids=torch.cat(ids),
    )
    assert float(loss) == pytest.approx(float(expected), rel=2e-5)


@pytest.mark.parametrize("target", ["sft", "dft", "asft", *BATCH_SCOPE])
def test_batch_8_equals_8_accumulated_batches_of_1(make_trainer, target):
    base = make_model(seed=3)
    runs = []
    for size, steps in ((8, 1), (1, 8)):
        trainer = make_trainer(
            target,
            models={"reference_model": base},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            learning_rate=0.5,
        )
        trainer.train()
        runs.append((weights_of(trainer), losses_of(trainer)))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-5)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)


def test_lora_trains_the_adapter_and_leaves_the_head_alone(make_trainer):
    trainer = make_trainer("dft", peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_logged_statistics_against_full_logits(make_trainer):
    trainer = make_trainer("dft", max_steps=1, evals=make_rows(6, seed=9))
    metrics = trainer.evaluate()
    tokenizer, model = make_tokenizer(), make_model().eval()
    log_probs, entropy, correct = [], [], []
    for row in make_rows(6, seed=9):
        prompt = tokenizer(row["prompt"])["input_ids"]
        tokens = torch.tensor([prompt + tokenizer(row["completion"] + "^")["input_ids"]])
        with torch.no_grad():
            logp = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        y = tokens[0, len(prompt) :]
        log_probs += logp[range(len(y)), y].tolist()
        entropy += (-(logp.exp() * logp).sum(-1)).tolist()
        correct += (logp.argmax(-1) == y).tolist()
    p = [math.exp(v) for v in log_probs]
    n = len(p)
    assert metrics["eval_nll"] == pytest.approx(-sum(log_probs) / n, rel=1e-5)
    assert metrics["eval_label_weight"] == pytest.approx(sum(p) / n, rel=1e-5)
    assert metrics["eval_effective_sample_size"] == pytest.approx(sum(p) ** 2 / (n * sum(v * v for v in p)), rel=1e-5)
    assert metrics["eval_residual_share"] == 0
    assert metrics["eval_entropy"] == pytest.approx(sum(entropy) / n, rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(sum(correct) / n)


def test_message_weights_scale_the_loss_of_their_message(make_trainer):
    def chat(weight):
        messages = [
            {"role": "user", "content": "abc", "weight": None},
            {"role": "assistant", "content": "de", "weight": weight},
        ]
        messages += [
            {"role": "user", "content": "f", "weight": None},
            {"role": "assistant", "content": "gh", "weight": None},
        ]
        return Dataset.from_list([{"messages": messages}] * 4)

    sums = {}
    for weight, tokens in ((0.0, 3), (1.0, 6), (3.0, 6)):  # the mean is over the tokens of weight above 0
        trainer = make_trainer("sft", data=chat(weight), assistant_only_loss=True)
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        sums[weight] = tokens * float(loss.detach())
    assert sums[0.0] < sums[1.0]
    assert sums[3.0] - sums[1.0] == pytest.approx(2 * (sums[1.0] - sums[0.0]), rel=1e-4)


def test_weights_survive_packing(make_trainer, rows):
    weighted = rows.add_column("weight", [float(i % 3) for i in range(len(rows))])
    plain = make_trainer("sft", data=weighted, per_device_train_batch_size=24)
    packed = make_trainer("sft", data=weighted, per_device_train_batch_size=24, packing=True)
    values = [float(t.compute_loss(t.model, next(iter(t.get_train_dataloader())))) for t in (plain, packed)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_nan_stops_with_the_row(make_trainer, rows):
    weighted = rows.add_column("weight", [1e38 if i == 5 else 1.0 for i in range(len(rows))])
    trainer = make_trainer("sft", data=weighted, max_steps=20)
    with pytest.raises(NonFiniteLossError, match=r"rows \[6\]"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target": "dtf"}, QTargetError, "did you mean dft"),
        ({"target": "asft"}, MissingStatisticError, "qtarget score"),
        ({"target": "sft", "loss_type": "dft"}, ConfigError, "chosen by `target`"),
        ({"target": "p_power", "target_kwargs": {"alhpa": 1}}, QTargetError, "did you mean alpha"),
        ({"target": "sft", "packing": True, "max_length": None}, (ConfigError, ValueError), "max_length"),
    ],
)
def test_refusals(make_trainer, settings, error, words):
    with pytest.raises(error, match=words):
        make_trainer(**settings)


def test_the_loss_backend_is_passed_on(make_trainer, monkeypatch):
    chosen, oracle = (make_trainer("gem", max_steps=2, loss_backend=backend) for backend in ("auto", "dense"))
    for trainer in (chosen, oracle):
        trainer.train()
    assert losses_of(chosen) == pytest.approx(losses_of(oracle), rel=1e-5)
    with pytest.raises(IncompatibleError, match="nothing to compile; use backend='auto'"):
        make_trainer("sft", loss_backend="compiled").train()
    # under the annotations' checker nothing compiles
    monkeypatch.setattr(whole_rows, "fused", lambda: whole_rows.whole_rows)
    live = {"reference_model": make_model(seed=3)}
    settings = {"models": live, "gradient_accumulation_steps": 2, "max_steps": 2}
    ours, plain = (make_trainer("rho1+asft", loss_backend=backend, **settings) for backend in ("compiled", "auto"))
    for trainer in (ours, plain):  # the pass for rho1's weights needs columns and sums only
        trainer.train()
    assert losses_of(ours) == pytest.approx(losses_of(plain), rel=1e-5)
    with pytest.raises(ConfigError, match="loss_backend='fast'; expected one of auto, chunked, compiled"):
        make_trainer("sft", loss_backend="fast")


def test_a_checkpoint_that_the_limit_deletes_at_once_is_said(make_trainer, tmp_path, caplog):
    newer = tmp_path / "out" / "checkpoint-99"
    newer.mkdir(parents=True)
    os.utime(newer, (time.time() + 3600,) * 2)
    trainer = make_trainer("sft", max_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1)
    with caplog.at_level("WARNING", logger="qtarget"):
        trainer.train()
    assert not (tmp_path / "out" / "checkpoint-1").exists()
    assert "checkpoint-1 is not kept: save_total_limit deleted it as the oldest" in caplog.text


def test_rows_without_anything_to_train_on(make_trainer):
    with pytest.raises(DataError):
        make_trainer("sft", data=Dataset.from_list([{"prompt": "a" * 80, "completion": "b"}] * 3), max_length=16)
    with pytest.raises(DataError, match="no rows"):
        make_trainer("sft", data=Dataset.from_list([{"prompt": "a", "completion": "b"}]).select([]))
    half = Dataset.from_list([{"prompt": "a" * 80, "completion": "b"}, {"prompt": "a", "completion": "b"}] * 2)
    trainer = make_trainer("sft", data=half, max_length=16)
    assert any("1, 3" in message for message in trainer.preparation.audits["train"])


def test_template_without_generation_marks(make_trainer, rows):
    chats = Dataset.from_list([{"messages": [{"role": "user", "content": "abc"}]}] * 4)
    with pytest.raises(DataError, match="assistant"):
        make_trainer("sft", data=chats, assistant_only_loss=True)


def test_a_batch_without_a_supervised_token_is_a_zero(make_trainer):
    rows = Dataset.from_list([{"text": "a b c"}, {"text": ""}] * 2)
    trainer = make_trainer("sft", data=rows, per_device_train_batch_size=1, max_steps=4)
    trainer.train()
    assert sorted(loss == 0 for loss in losses_of(trainer)) == [False, False, True, True]


@pytest.mark.parametrize("target", ["rho1+sft_kl", "talr+asft"])
def test_batch_scope_combinations_under_accumulation(make_trainer, target):
    runs = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(
            target,
            models={"reference_model": make_model(seed=3)},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_ids_in_the_users_own_column_are_left_alone(make_trainer, rows):
    named = rows.add_column("row_id", ["same"] * len(rows))
    a, b = (make_trainer("talr", data=data, max_steps=1) for data in (named, rows))
    a.train()
    b.train()
    assert losses_of(a) == losses_of(b)


def test_keep_end_counts_what_is_really_cut(make_trainer):
    rows = Dataset.from_list([{"prompt": "a" * 30, "completion": "bcd"}] * 4)
    trainer = make_trainer("sft", data=rows, max_length=8, truncation_mode="keep_end")
    assert trainer.preparation.audits["train"] == []
    with pytest.raises(DataError):
        make_trainer("sft", data=rows, max_length=8)


def test_from_python_a_folder_has_one_writer_and_a_run_its_own_checkpoints(make_trainer):
    """The same checks as on the command line; a forced one goes on."""
    from pathlib import Path

    from qtarget.core.errors import ConfigError, ResumeError
    from qtarget.storage.locks import locked

    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = make_trainer("dft", **settings)
    output = Path(trainer.args.output_dir)
    with pytest.raises(ResumeError, match="holds no checkpoint that was saved to the end"):
        trainer.train(resume_from_checkpoint=True)
    with locked(output), pytest.raises(ConfigError, match="another process is writing"):
        _in_thread(trainer.train)
    trainer.train()
    with pytest.raises(ResumeError, match="target was dft, is sft"):
        make_trainer("sft", **settings).train(resume_from_checkpoint=True)
    longer = make_trainer("sft", **{**settings, "max_steps": 4})
    longer.train(resume_from_checkpoint=True, force_resume=True)
    assert longer.state.global_step == 4
    assert not (output / ".lock").exists()


def _in_thread(work):
    """Run in another thread, and raise here what it raises."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
