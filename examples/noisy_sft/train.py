"""Fine-tune the embedded base model on noisy demonstrations with TRL's trainer and a target of your choice."""

import tempfile

from datasets import Dataset
from transformers import AutoTokenizer

from qtarget import QTargetConfig, QTargetTrainer
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.data.noise import inject_noise

base = str(base_model_path())
tokenizer = AutoTokenizer.from_pretrained(base)
rows = inject_noise(load_demonstrations("train")[:256], kind="random_tokens", rate=0.2, seed=0, tokenizer=tokenizer)
train = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
clean = Dataset.from_list(load_demonstrations("test")[:64])

args = QTargetConfig(
    target="sft_kl",  # any name that `qtarget targets` lists, "weight+base", or "package.module:Class"
    reference=base,  # run live; a folder that `qtarget score` wrote saves its memory
    output_dir=tempfile.mkdtemp(),
    learning_rate=1e-3,
    num_train_epochs=1,
    save_strategy="no",
    bf16=False,
)
trainer = QTargetTrainer(base, args, train_dataset=train, eval_dataset=clean)
before = trainer.evaluate()["eval_nll"]
trainer.train()
print(f"clean held-out nll, nats a token: {before:.3f} -> {trainer.evaluate()['eval_nll']:.3f}")
