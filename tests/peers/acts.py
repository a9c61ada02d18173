"""What people do with TRL's ``SFTTrainer``, each as a function of the trainer class: the same act must give the same value.

``ACTS[name](cls, folder)`` trains, evaluates or refuses; ``outcome`` runs it with both classes and says how they compare.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from qtarget import QTargetTrainer
from qtarget.core.errors import QTargetError
from tests.integrations.conftest import CHAT_TEMPLATE, SETTINGS, make_model, make_rows, make_tokenizer

PLAIN = {**SETTINGS, "optim": "sgd", "learning_rate": 0.3, "max_steps": 5}
"""Plain SGD, so that weights differ as gradients do."""
WORKS = "works, equal to TRL's"
BOTH_REFUSE = "refused, by TRL as well"
BFLOAT16 = (2**-8, 2**-8)
"""Relative and absolute rounding of bfloat16; the two heads round at different places."""
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}

Act = Callable[[Any, Path], Any]
ACTS: dict[str, Act] = {}


def act(name: str) -> Callable[[Act], Act]:
    """Enter a function in the table under this name."""

    def enter(function: Act) -> Act:
        assert name not in ACTS
        ACTS[name] = function
        return function

    return enter


def build(cls: Any, folder: Path, rows: Any = None, *, model: Any = None, config: Any = SFTConfig, evals: Any = None,
          more: dict[str, Any] | None = None, **settings: Any) -> Any:  # fmt: skip
    """A trainer with the tiny model; ``more`` are further arguments of the trainer."""
    given = {"processing_class": make_tokenizer(), **(more or {})}
    return cls(
        make_model() if model is None else model,
        config(str(folder), **{**PLAIN, **settings}),
        train_dataset=make_rows() if rows is None else rows,
        eval_dataset=evals,
        **given,
    )


def trained(trainer: Any) -> dict[str, Any]:
    """Train, and what came of it: losses, tokens, weights, evaluations."""
    trainer.train()
    logs = trainer.state.log_history
    names = ("loss", "num_tokens", "aux_loss")
    found = {name: [line[name] for line in logs if name in line and "loss" in line] for name in names}
    found |= {"eval": [line[k] for line in logs for k in sorted(line) if k.endswith("_loss") and k != "train_loss"]}
    return found | {"weights": torch.cat([p.detach().reshape(-1).float() for p in trainer.model.parameters()])}


def chats(count: int = 12, **columns: Any) -> Dataset:
    """Conversations of two turns."""
    rows = make_rows(2 * count, seed=4)
    messages = [
        [message for row in (rows[2 * i], rows[2 * i + 1]) for message in (
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})]
        for i in range(count)
    ]  # fmt: skip
    return Dataset.from_dict({"messages": messages, **{name: [value] * count for name, value in columns.items()}})


def tokens(**columns: Callable[[list[int]], list[int]]) -> Dataset:
    """Tokenised rows; each further column is a function of the ids."""
    ids = [make_tokenizer()(row["prompt"] + row["completion"])["input_ids"] for row in make_rows()]
    return Dataset.from_dict({"input_ids": ids, **{name: [f(row) for row in ids] for name, f in columns.items()}})


def mixture(cls: Any, config: Any, **sizes: Any) -> Any:
    """A tiny mixture of experts."""
    torch.manual_seed(0)
    return cls(config(
        vocab_size=80, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, initializer_range=0.2, **sizes,
    ))  # fmt: skip


# -- settings and rows: five steps each -----------------------------------------------------------------------------

SETTINGS_TRIED: dict[str, dict[str, Any]] = {
    "padded batches": {},
    "gradient accumulation": {"gradient_accumulation_steps": 3},
    "packing, best fit": {"packing": True, "max_length": 32},
    "packing, best fit with splits": {"packing": True, "packing_strategy": "bfd_split", "max_length": 8},
    "packing, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "packing under accumulation": {"packing": True, "max_length": 32, "gradient_accumulation_steps": 2},
    "padding-free batches": {"padding_free": True, "max_length": None},
    "batches padded to a multiple": {"pad_to_multiple_of": 8},
    "max_length": {"max_length": 10},
    "max_length, end kept": {"max_length": 10, "truncation_mode": "keep_end"},
    "no max_length": {"max_length": None},
    "the prompt is trained too": {"completion_only_loss": False},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "selective gradient checkpointing": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
    "no gradient checkpointing": {"gradient_checkpointing": False},
    "bfloat16 autocast": {"bf16": True},
    "shuffle_dataset": {"shuffle_dataset": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "tokens not averaged over devices": {"average_tokens_across_devices": False},
    "max_grad_norm": {"max_grad_norm": 0.1},
    "weight decay, warm-up and a cosine": {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "rows of like length together": {"train_sampling_strategy": "group_by_length"},
    "last batch dropped": {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    "eos_token": {"eos_token": "!"},
    "loss_type dft": {"loss_type": "dft"},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
}  # fmt: skip
ROWS_TRIED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "text": (lambda: Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in make_rows()]}), {}),
    "text in another column": (
        lambda: Dataset.from_dict({"body": make_rows()["completion"]}), {"dataset_text_field": "body"}),
    "conversations": (chats, {}),
    "conversations, packed": (chats, {"packing": True}),
    "conversations, assistant text only": (chats, {"assistant_only_loss": True}),
    "conversations with chat_template_kwargs": (lambda: chats(chat_template_kwargs={"mark": "x"}), {}),
    "prompt and completion of messages": (
        lambda: Dataset.from_list([{"prompt": row["messages"][:1], "completion": row["messages"][1:2]} for row in chats()]), {}),
    "conversations with from and value": (
        lambda: Dataset.from_list([
            {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]} for row in chats()]), {}),
    "tokenised rows": (tokens, {}),
    "tokenised rows with labels": (lambda: tokens(labels=lambda ids: [-100, -100, *ids[2:]]), {}),
    "tokenised rows with completion_mask": (
        lambda: tokens(completion_mask=lambda ids: [0, 0, *[1] * (len(ids) - 2)]), {"completion_only_loss": True}),
    "tokenised rows with assistant_masks": (lambda: tokens(assistant_masks=lambda ids: [0, *[1] * (len(ids) - 1)]), {}),
    "a stream": (lambda: make_rows().to_iterable_dataset(), {}),
    "a stream of conversations, assistant text only": (
        lambda: chats().to_iterable_dataset(), {"assistant_only_loss": True}),
    "a stream, packed": (lambda: make_rows().to_iterable_dataset(), {"packing": True, "max_length": 32}),
    "a stream without max_steps": (lambda: make_rows().to_iterable_dataset(), {"max_steps": -1}),
    "rows cut until nothing is trained": (
        lambda: Dataset.from_list([*make_rows(), {"prompt": "a" * 40, "completion": "b"}]), {"max_length": 30}),
}  # fmt: skip

for _name, _settings in SETTINGS_TRIED.items():
    ACTS[_name] = lambda cls, folder, s=_settings: trained(build(cls, folder, **s))
for _name, (_rows, _settings) in ROWS_TRIED.items():
    ACTS[_name] = lambda cls, folder, r=_rows, s=_settings: trained(build(cls, folder, r(), **s))


# -- arguments ------------------------------------------------------------------------------------------------------


@act("arguments by position")
def _(cls, folder):
    return trained(cls(make_model(), SFTConfig(str(folder), **PLAIN), None, make_rows(), None, make_tokenizer()))


@act("TrainingArguments")
def _(cls, folder):
    settings = {name: value for name, value in PLAIN.items() if name != "max_length"}
    return trained(cls(make_model(), TrainingArguments(str(folder), **settings), train_dataset=make_rows(),
                       processing_class=make_tokenizer()))  # fmt: skip


@act("a model by its path")
def _(cls, folder):
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return trained(build(cls, folder, model=str(folder / "model"), more={"processing_class": None}))


@act("model_init_kwargs")
def _(cls, folder):
    make_model().save_pretrained(folder / "model")
    trainer = build(cls, folder, model=str(folder / "model"), model_init_kwargs={"dtype": "bfloat16"})
    return str(trainer.model.dtype), trained(trainer)["num_tokens"]


@act("no train_dataset")
def _(cls, folder):
    return cls(make_model(), SFTConfig(str(folder), **PLAIN), processing_class=make_tokenizer())


@act("formatting_func")
def _(cls, folder):
    rows = make_rows().rename_columns({"prompt": "a", "completion": "b"})
    return trained(build(cls, folder, rows, more={"formatting_func": lambda row: row["a"] + row["b"]}))


@act("callbacks")
def _(cls, folder):
    seen: list[int] = []

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)
            control.should_training_stop = state.global_step == 3

    trained(build(cls, folder, more={"callbacks": [Steps()]}))
    return seen


@act("optimizers")
def _(cls, folder):
    model = make_model()
    return trained(
        build(cls, folder, model=model, more={"optimizers": (torch.optim.SGD(model.parameters(), 0.1), None)})
    )


@act("optimizer_cls_and_kwargs")
def _(cls, folder):
    return trained(build(cls, folder, more={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}))


@act("compute_loss_func")
def _(cls, folder):
    return trained(build(cls, folder, more={"compute_loss_func": lambda out, labels, **kw: out.logits.float().mean()}))


@act("data_collator")
def _(cls, folder):
    return trained(build(cls, folder, more={"data_collator": DataCollatorForLanguageModeling(pad_token_id=0)}))


@act("dataset_kwargs skip_prepare_dataset")
def _(cls, folder):
    return trained(build(cls, folder, tokens(), dataset_kwargs={"skip_prepare_dataset": True}))


@act("a data set with a transform")
def _(cls, folder):
    return trained(build(cls, folder, make_rows().with_transform(lambda batch: batch)))


@act("rows with images")
def _(cls, folder):
    return trained(build(cls, folder, chats(images=["picture.png"])))


@act("chat_template_path")
def _(cls, folder):
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE.replace("'<'", "'='"))
    return trained(build(cls, folder, chats(), chat_template_path=str(folder / "chat.jinja")))


@act("pad_token")
def _(cls, folder):
    trainer = build(cls, folder, pad_token="!")
    return trainer.processing_class.pad_token, trainer.model.config.pad_token_id, trained(trainer)


# -- PEFT -----------------------------------------------------------------------------------------------------------


@act("LoRA by peft_config")
def _(cls, folder):
    return trained(build(cls, folder, more={"peft_config": LoraConfig(**LORA)}))


@act("LoRA with packing and accumulation")
def _(cls, folder):
    more = {"peft_config": LoraConfig(**LORA)}
    return trained(build(cls, folder, packing=True, max_length=32, gradient_accumulation_steps=2, more=more))


@act("LoRA without gradient checkpointing")
def _(cls, folder):
    return trained(build(cls, folder, gradient_checkpointing=False, more={"peft_config": LoraConfig(**LORA)}))


@act("a PeftModel")
def _(cls, folder):
    torch.manual_seed(5)
    return trained(build(cls, folder, model=get_peft_model(make_model(), LoraConfig(**LORA))))


@act("a PeftModel and a peft_config")
def _(cls, folder):
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    return trained(build(cls, folder, model=model, more={"peft_config": LoraConfig(**LORA)}))


@act("an adapter on the head")
def _(cls, folder):
    return trained(build(cls, folder, more={"peft_config": LoraConfig(**{**LORA, "target_modules": ["lm_head"]})}))


# -- evaluation -----------------------------------------------------------------------------------------------------


def held_out() -> Dataset:
    """Nine rows: the last batch is short."""
    return make_rows(9, seed=3)


@act("evaluation while it trains")
def _(cls, folder):
    return trained(build(cls, folder, evals=held_out(), eval_strategy="steps", eval_steps=2))


@act("several evaluation sets")
def _(cls, folder):
    sets = DatasetDict({"a": held_out(), "b": make_rows(5, seed=8)})
    return trained(build(cls, folder, evals=sets, eval_strategy="steps", eval_steps=2))


@act("evaluation rows packed, training rows not")
def _(cls, folder):
    trainer = build(cls, folder, evals=held_out(), eval_packing=True, max_length=32)
    return len(trainer.train_dataset), len(trainer.eval_dataset), trainer.evaluate()["eval_loss"]


@act("training rows packed, evaluation rows not")
def _(cls, folder):
    trainer = build(cls, folder, evals=held_out(), packing=True, eval_packing=False, max_length=32)
    return len(trainer.train_dataset), len(trainer.eval_dataset), trainer.evaluate()["eval_loss"]


@act("evaluation of a stream")
def _(cls, folder):
    return build(cls, folder, evals=held_out().to_iterable_dataset()).evaluate()["eval_loss"]


@act("evaluate() with another data set")
def _(cls, folder):
    trainer = build(cls, folder)
    return trainer.evaluate(held_out())["eval_loss"], trainer.evaluate({"x": held_out()})["eval_x_loss"]


def accuracy(prediction: Any) -> dict[str, float]:
    """Of argmax tokens, where labels count."""
    labels = prediction.label_ids[:, 1:]
    right = (prediction.predictions.argmax(-1)[:, :-1] == labels) & (labels != -100)
    return {"right": float(right.sum()), "of": float((labels != -100).sum())}


@act("compute_metrics")
def _(cls, folder):
    found = build(cls, folder, evals=held_out(), more={"compute_metrics": accuracy}).evaluate()
    return found["eval_right"], found["eval_of"], found["eval_loss"]


@act("compute_metrics while it trains, packed")
def _(cls, folder):
    more = {"compute_metrics": accuracy}
    trainer = build(cls, folder, evals=held_out(), packing=True, max_length=32, eval_strategy="steps", eval_steps=2,
                    per_device_eval_batch_size=8, more=more)  # fmt: skip
    trainer.train()
    return [line["eval_right"] for line in trainer.state.log_history if "eval_right" in line]


@act("preprocess_logits_for_metrics")
def _(cls, folder):
    def chosen(logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    def share(prediction: Any) -> dict[str, float]:
        return {"sum": float(prediction.predictions.clip(0).sum())}

    more = {"compute_metrics": share, "preprocess_logits_for_metrics": chosen}
    return build(cls, folder, evals=held_out(), more=more).evaluate()["eval_sum"]


@act("batch_eval_metrics")
def _(cls, folder):
    seen = [0.0]

    def metrics(prediction: Any, compute_result: bool) -> dict[str, float]:
        seen[0] += float((prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).sum())
        return {"right": seen[0]} if compute_result else {}

    trainer = build(cls, folder, evals=held_out(), batch_eval_metrics=True, more={"compute_metrics": metrics})
    return trainer.evaluate()["eval_right"]


@act("predict()")
def _(cls, folder):
    trainer = build(cls, folder, evals=held_out())
    found = trainer.predict(trainer.eval_dataset)
    real = found.label_ids != -100
    return torch.tensor(found.predictions[real]), found.label_ids.tolist(), found.metrics["test_loss"]


@act("evaluate() after predict()")
def _(cls, folder):
    trainer = build(cls, folder, evals=held_out())
    before = trainer.evaluate()["eval_loss"]
    trainer.predict(trainer.train_dataset)
    return before, trainer.evaluate()["eval_loss"]


@act("prediction_loss_only")
def _(cls, folder):
    trainer = build(cls, folder, evals=held_out(), prediction_loss_only=True)
    found = trainer.predict(trainer.eval_dataset)
    return found.predictions, found.metrics["test_loss"]


@act("compute_loss with return_outputs")
def _(cls, folder):
    trainer = build(cls, folder)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    return loss.detach(), outputs.logits.detach()


# -- a run ----------------------------------------------------------------------------------------------------------


@act("the best checkpoint is loaded at the end")
def _(cls, folder):
    trainer = build(cls, folder, evals=held_out(), eval_strategy="steps", eval_steps=2, save_strategy="steps",
                    save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss")  # fmt: skip
    found = trained(trainer)
    return found["weights"], trainer.state.best_global_step


@act("metric_for_best_model of ours and TRL's: eval_mean_token_accuracy")
def _(cls, folder):
    trainer = build(cls, folder, evals=held_out(), eval_strategy="steps", eval_steps=2, save_strategy="steps",
                    save_steps=2, metric_for_best_model="eval_mean_token_accuracy")  # fmt: skip
    trainer.train()
    return trainer.state.best_model_checkpoint is not None


@act("resume_from_checkpoint")
def _(cls, folder):
    build(cls, folder, save_strategy="steps", save_steps=2, max_steps=2).train()
    trainer = build(cls, folder, max_steps=5)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


@act("save_model() and loading it again")
def _(cls, folder):
    trainer = build(cls, folder)
    trainer.train()
    trainer.save_model(folder / "saved")
    loaded = type(trainer.model).from_pretrained(folder / "saved")
    return torch.cat([p.detach().reshape(-1) for p in loaded.parameters()])


@act("names of logged numbers")
def _(cls, folder):
    trainer = build(cls, folder, evals=held_out(), eval_strategy="steps", eval_steps=2)
    trainer.train()
    theirs = {"loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy", "epoch"}
    theirs |= {f"eval_{name}" for name in ("loss", "num_tokens", "entropy", "mean_token_accuracy", "runtime")}
    return sorted(theirs - {name for line in trainer.state.log_history for name in line})


@act("tags trl and sft of the model")
def _(cls, folder):
    return {"trl", "sft"} <= set(build(cls, folder).model.model_tags)


# -- mixtures of experts --------------------------------------------------------------------------------------------

MIXTURES: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: mixture(MixtralForCausalLM, MixtralConfig, num_local_experts=4),
    "Qwen3-MoE": lambda: mixture(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=4, moe_intermediate_size=16, head_dim=8, decoder_sparse_step=1),
    "GPT-OSS": lambda: mixture(GptOssForCausalLM, GptOssConfig, num_local_experts=4, head_dim=8, sliding_window=16),
}  # fmt: skip
for _name, _make in MIXTURES.items():
    for _how, _settings in (
        ("", {"gradient_accumulation_steps": 2}),
        (", padding-free", {"padding_free": True, "max_length": None}),
        (", router_aux_loss_coef 0.5", {"router_aux_loss_coef": 0.5}),
        (", router_aux_loss_coef 0", {"router_aux_loss_coef": 0.0}),
    ):
        ACTS[f"{_name}{_how}"] = lambda cls, folder, m=_make, s=_settings: trained(
            build(cls, folder, model=m(), evals=held_out(), eval_strategy="steps", eval_steps=4, **s)
        )


@act("router_aux_loss_coef of a model without experts")
def _(cls, folder):
    return trained(build(cls, folder, router_aux_loss_coef=0.1))


# -- comparison -----------------------------------------------------------------------------------------------------


def attempt(function: Act, cls: Any) -> tuple[Any, Exception | None]:
    """The value, or the error, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return function(cls, Path(folder)), None
        except Exception as error:
            return None, error


def same(ours: Any, theirs: Any, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """Numbers within rounding, everything else exactly.

    Raises:
        AssertionError: they differ.
    """
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            same(ours[name], theirs[name], rtol, atol)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b, rtol, atol)
    elif isinstance(theirs, float | torch.Tensor):
        a, b = (torch.as_tensor(value).double() for value in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    else:
        assert ours == theirs


def outcome(name: str) -> str:
    """What the table says of an act, found by doing it with both trainers.

    Raises:
        AssertionError: neither equal to TRL's nor refused in words.
    """
    (ours, error), (theirs, their_error) = (attempt(ACTS[name], cls) for cls in (QTargetTrainer, SFTTrainer))
    if their_error is not None:
        if not isinstance(their_error, ValueError):
            raise their_error
        assert isinstance(error, ValueError), f"TRL refuses ({their_error}), qtarget does not: {error!r}"
        return f"{BOTH_REFUSE}: {one_line(error)}"
    if error is not None:
        if not isinstance(error, QTargetError):
            raise error
        return f"refused: {one_line(error)}"
    same(ours, theirs, *(BFLOAT16 if "bfloat16" in name else ()))
    return WORKS


def one_line(error: Exception) -> str:
    """A message without line breaks, folders and table marks."""
    return re.sub(r"/tmp/\S+", "...", " ".join(str(error).split())).replace("|", "\\|")
