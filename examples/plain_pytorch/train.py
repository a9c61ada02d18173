"""Fine-tune the embedded base model with a target in a plain PyTorch loop: no TRL, no trainer."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtarget
from qtarget.data.collate import collate
from qtarget.data.embedded import base_model_path, load_demonstrations

target = sys.argv[1] if len(sys.argv) > 1 else "sft_kl"
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0

torch.manual_seed(seed)
tokenizer = AutoTokenizer.from_pretrained(base_model_path())
model = AutoModelForCausalLM.from_pretrained(base_model_path())
frozen = AutoModelForCausalLM.from_pretrained(base_model_path()).eval()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def tokenised(row):
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["completion"] + tokenizer.eos_token)["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def loss_of(rows, target):
    batch = collate(rows, pad_id=tokenizer.pad_token_id)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        reference = qtarget.token_statistics(frozen(**inputs).logits, batch["labels"], top_k=32)
    return qtarget.target_loss(model(**inputs).logits, batch["labels"], target, reference=reference)


train = [tokenised(row) for row in load_demonstrations("train")[:256]]
held_out = [tokenised(row) for row in load_demonstrations("test")[:64]]
with torch.no_grad():
    before = loss_of(held_out, "sft").item()
for _ in range(2):
    for part in torch.randperm(len(train)).split(16):
        loss = loss_of([train[i] for i in part], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
with torch.no_grad():
    print(f"{target}: held-out nll, nats a token: {before:.3f} -> {loss_of(held_out, 'sft').item():.3f}")
