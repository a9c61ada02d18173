"""A character tokenizer, a random two-layer Llama and a few ragged rows: enough for every trainer test."""

from __future__ import annotations

import string

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{ m['content'] + eos_token }}{%- endgeneration -%}"
    "{%- else -%}{{ '<' + m['content'] + '>' }}{%- endif -%}{%- endfor -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    characters = ["~", "^", "?", *string.ascii_letters, *string.digits, *" <>.,:+-=!\n'"]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="~", eos_token="^", unk_token="?", chat_template=CHAT_TEMPLATE
    )


def make_model(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


def make_rows(count: int = 24, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        n, m = torch.randint(2, 9, (2,), generator=generator).tolist()
        letters = [string.ascii_letters[i] for i in torch.randint(0, 52, (n + m,), generator=generator)]
        rows.append({"prompt": "".join(letters[:n]) + ":", "completion": "".join(letters[n:])})
    return Dataset.from_list(rows)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def rows():
    return make_rows()


SETTINGS = {
    "max_length": 64,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "seed": 7,
}


@pytest.fixture
def make_trainer(tmp_path, tokenizer, rows):
    from qtarget import QTargetConfig, QTargetTrainer

    def make(target="sft", *, model=None, data=None, evals=None, models=None, **settings):
        peft = settings.pop("peft_config", None)
        args = QTargetConfig(str(tmp_path / "out"), target=target, **{**SETTINGS, **settings})
        return QTargetTrainer(
            model or make_model(),
            args,
            None,
            rows if data is None else data,
            evals,
            make_tokenizer(),
            peft_config=peft,
            **(models or {}),
        )

    return make


@pytest.fixture
def cached(tmp_path):
    """A function that scores rows into a cache and returns its folder."""
    from qtarget import QTargetConfig
    from qtarget.integrations.sft.score import score

    def write(
        model=None,
        data=None,
        evals=None,
        tokenizer=None,
        top_k=80,
        model_id=None,
        log_probs_dtype="float32",
        **settings,
    ):
        score(
            model or make_model(),
            QTargetConfig(str(tmp_path / "scoring"), **{**SETTINGS, **settings}),
            data or make_rows(),
            evals,
            tokenizer or make_tokenizer(),
            directory=tmp_path / "cache",
            top_k=top_k,
            log_probs_dtype=log_probs_dtype,
            model_id=model_id,
            progress=False,
        )
        return str(tmp_path / "cache")

    return write
