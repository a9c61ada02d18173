"""A real 151,646-entry tokenizer on a random Qwen-shaped model with LoRA and packing; prints peak memory and loss.

python -m tests.real.large_vocabulary TOKENIZER_FOLDER OUTPUT
"""

from __future__ import annotations

import json
import resource
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from qtarget import QTargetConfig, QTargetTrainer

TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' }}{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{ m['content'] + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ m['content'] + '<|im_end|>' }}{%- endif -%}{{ '\\n' }}{%- endfor -%}"
)


def main(tokenizer_folder: str, output: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Was ist {i}?"},
                {"role": "assistant", "content": f"数字 {i}, d'accord. " * 12},
            ]
        }
        for i in range(40)
    ]
    args = QTargetConfig(
        output,
        target="p_power",
        max_length=128,
        packing=True,
        assistant_only_loss=True,
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = QTargetTrainer(
        Qwen2ForCausalLM(config), args, None, Dataset.from_list(chats), None, tokenizer, peft_config=lora
    )
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak, "losses": losses, "tokens": tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])
