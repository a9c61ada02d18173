"""A model small enough to train in a second, and rows for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of about five thousand parameters with one token a character."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(chr(i) for i in range(32, 127)), "\n"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def workspace(tmp_path, tiny_model):
    """Twelve rows in ``rows.jsonl``, four in ``held_out.jsonl``, and a function that writes ``run.yaml`` there."""
    for name, start, count in (("rows", 0, 12), ("held_out", 50, 4)):
        rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(start, start + count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(tiny_model),
        "train_file": "rows.jsonl",
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": "1e-2",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
    }

    def write(**keys) -> Path:
        path = tmp_path / "run.yaml"
        lines = {key: value for key, value in (settings | keys).items() if value is not ...}
        path.write_text(yaml.safe_dump(lines).replace("'1e-2'", "1e-2"))
        return path

    return write
