"""Train the embedded base model from a seed on a corpus generated from `qtarget.data.tasks`.

    python scripts/train_base_model.py --seed 0 --threads 1 --output src/qtarget/data/embedded/base_model

The same seed, thread count, processor type and torch version give the same weights. The output folder is a Hugging Face
model folder plus `training_log.jsonl` and a `README.md` with the accuracy of every skill.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtarget.data import tasks

Row = dict[str, str]

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY_SIZE = 512
SEQUENCE_LENGTH, BATCH_SIZE = 128, 8
WARMUP_STEPS, WEIGHT_DECAY = 100, 0.1
# The usual 0.02 is meant for wide models; at width 144 it costs hundreds of steps before attention learns anything.
INITIALIZER_RANGE = 0.06
# Questions are random and cannot be predicted: at full weight their noise would drown what can be learnt.
QUESTION_WEIGHT = 0.1
# Skills with more to learn are drawn more often.
BARE_WEIGHTS = {
    "reverse": 3, "sort": 2, "count": 2, "add": 3, "subtract": 3, "lookup": 2, "join": 1.5, "zero_pad": 1.5,
}  # fmt: skip
FRAMED_WEIGHTS = {"reverse": 2, "sort": 1.5, "count": 1.5, "add": 2, "subtract": 2, "lookup": 4, "join": 1.5}
# Upper-case runs and digits stay single characters; words keep their leading space.
PRE_TOKENIZER = r"[0-9]| ?[A-Z][a-z]+| ?[a-z]+|[A-Z]| ?[^\sA-Za-z0-9]|\s"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Response:\\n' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}
{{- 'Instruction: ' + message['content'] + '\\n' -}}
{%- else -%}
{{- message['role'] | capitalize + ': ' + message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Response:\\n' -}}{%- endif -%}
"""


README = """\
# Embedded base model

A Llama language model with {parameters} parameters and a byte-level BPE tokenizer of {vocabulary} tokens, trained
from scratch on documents that `qtarget.data.tasks` generates: first bare ones (`reverse: KDQF = FQDK`), then the same
skills framed by other words, the sentences of the instructions among them. It knows twelve small skills, and has never
seen the marks of the demonstrations next to it: `Instruction:`, `Response:`, the response sentences and the brackets.

Made by (55 minutes on one thread of a busy two-core AVX2 machine):

    python scripts/train_base_model.py --seed {seed} --steps {steps} --framed-steps {framed_steps} \\
        --threads {threads} --output src/qtarget/data/embedded/base_model

with torch {torch} and transformers {transformers}. `training_log.jsonl` is the log of that run: losses in nats per
token, `answer_loss` over answer tokens, `accuracy` on a few test problems per skill. Other processors and versions
round differently, so their weights differ in the last digits and their accuracies slightly.

SHA-256 of `model.safetensors`: `{sha256}`

Greedy accuracy on {per_skill} test problems of every skill, none of them in the training corpus:

| skill | own format | instruction format, untrained |
|---|---|---|
{table}

The chat template renders a user message as `Instruction: ...` and an assistant message as `Response:`, its text and
end-of-text, which are the tokens of the demonstrations' `prompt` and `completion`.
"""


def train_tokenizer(seed: int, examples_per_skill: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE over texts of both formats, so that the words of an instruction are whole tokens already."""
    rng = Random(f"tokenizer-{seed}")
    texts = []
    for skill in tasks.SKILLS:
        for _ in range(examples_per_skill):
            problem = tasks.sample_problem_in(skill, "train", rng)
            row = tasks.demonstration(problem, rng)
            texts += [tasks.pretraining_text(problem, rng), row["prompt"] + row["completion"]]
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD, model_max_length=256, padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(vocabulary_size: int, end_of_text: int, pad: int) -> LlamaForCausalLM:
    """About 1.1 million parameters: four Llama layers of width 144."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end_of_text, pad_token_id=pad, do_sample=False)
    return model


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own corpus, warm-up and decay.

    ``framed_share`` of the documents are `tasks.framed_example`, the rest the base model's bare format; skills are
    drawn by ``skill_weights`` (1 where not named).
    """

    name: str
    steps: int
    peak_learning_rate: float
    framed_share: float
    skill_weights: Mapping[str, float]


def training_phases(steps: int, framed_steps: int) -> tuple[Phase, ...]:
    """Bare documents are short, so a skill is learnt there first; frames then teach to find the answer in any text."""
    return (
        Phase("corpus", steps, 3e-3, 0.0, BARE_WEIGHTS),
        Phase("framed", framed_steps, 1.5e-3, 0.75, FRAMED_WEIGHTS),
    )


def documents(phase: Phase, rng: Random, count: int) -> list[Row]:
    """``count`` train problems worded as ``phase`` says."""
    skills = list(tasks.SKILLS)
    chosen = rng.choices(skills, [phase.skill_weights.get(skill, 1) for skill in skills], k=count)
    rows = []
    for skill in chosen:
        problem = tasks.sample_problem_in(skill, "train", rng)
        framed = phase.framed_share and rng.random() < phase.framed_share
        rows.append(tasks.framed_example(problem, rng) if framed else tasks.pretraining_example(problem, rng))
    return rows


class Settings(NamedTuple):
    """What the whole run shares."""

    seed: int
    log_every: int
    evaluate_every: int
    problems_per_skill: int


class Batch(NamedTuple):
    """Packed documents, all `[BATCH_SIZE, SEQUENCE_LENGTH]`.

    ``position_ids`` restart with every document, which also keeps attention inside it. ``weights`` are 0 on the first
    token of a document and on padding, 1 on answers and end-of-text, `QUESTION_WEIGHT` elsewhere.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    weights: torch.Tensor


def tokenized_documents(
    tokenizer: PreTrainedTokenizerFast, phase: Phase, seed: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Endless stream of documents: token ids with end-of-text, and the loss weight of every token."""
    rng = Random(f"{phase.name}-{seed}")
    while True:
        rows = documents(phase, rng, 64)
        prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
        answers = tokenizer([row["completion"] for row in rows])["input_ids"]
        for prompt, answer in zip(prompts, answers, strict=True):
            weights = [0.0] + [QUESTION_WEIGHT] * (len(prompt) - 1) + [1.0] * (len(answer) + 1)
            yield [*prompt, *answer, tokenizer.eos_token_id], weights


def packed_batches(tokenizer: PreTrainedTokenizerFast, phase: Phase, seed: int) -> Iterator[Batch]:
    """Rows filled with whole documents; a document that no longer fits opens the next row."""
    rows: list[tuple[list[int], list[int], list[float]]] = [([], [], [])]
    for ids, weights in tokenized_documents(tokenizer, phase, seed):
        if len(rows[-1][0]) + len(ids) > SEQUENCE_LENGTH:
            if len(rows) == BATCH_SIZE:
                yield _pad(rows, tokenizer.pad_token_id)
                rows.clear()
            rows.append(([], [], []))
        row_ids, row_positions, row_weights = rows[-1]
        row_ids += ids
        row_positions += range(len(ids))
        row_weights += weights


def _pad(rows: list[tuple[list[int], list[int], list[float]]], pad: int) -> Batch:
    missing = [SEQUENCE_LENGTH - len(ids) for ids, _, _ in rows]
    return Batch(
        torch.tensor([ids + [pad] * n for (ids, _, _), n in zip(rows, missing)]),
        torch.tensor([positions + list(range(n)) for (_, positions, _), n in zip(rows, missing)]),
        torch.tensor([weights + [0.0] * n for (_, _, weights), n in zip(rows, missing)]),
    )


def learning_rate(step: int, phase: Phase) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < WARMUP_STEPS:
        return phase.peak_learning_rate * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, phase.steps - WARMUP_STEPS)
    return phase.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, float]:
    """One update; returns the mean loss (nats per token) over all predicted tokens and over answer tokens."""
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[:, :-1]
    labels, weights = batch.input_ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    ((losses * weights).sum() / weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses = losses.detach()
    return losses[weights > 0].mean().item(), losses[weights == 1.0].mean().item()


def greedy_completions(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 100,
) -> list[str]:
    """The model's greedy continuation of every prompt, without special tokens."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
        with torch.no_grad():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return texts


def heldout_rows(seed: int, per_skill: int, render: Callable[[tasks.Problem, Random], Row]) -> list[Row]:
    """``per_skill`` test problems of every skill, in the format of ``render``."""
    rng = Random(f"heldout-{seed}")
    return [
        render(tasks.sample_problem_in(skill, "test", rng), rng) for skill in tasks.SKILLS for _ in range(per_skill)
    ]


def accuracy_by_skill(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], checker: Callable[[Row, str], bool]
) -> dict[str, float]:
    """Share of greedy answers that ``checker`` accepts, per skill, and over all rows under ``"overall"``."""
    texts = greedy_completions(model, tokenizer, [row["prompt"] for row in rows])
    right: dict[str, list[bool]] = {}
    for row, text in zip(rows, texts, strict=True):
        right.setdefault(row["skill"], []).append(checker(row, text))
    accuracy = {skill: sum(marks) / len(marks) for skill, marks in right.items()}
    return {"overall": sum(map(sum, right.values())) / len(rows), **accuracy}


def train_phase(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase, earlier_steps: int, settings: Settings
) -> Iterator[dict[str, Any]]:
    """Train ``model`` in place; yields a log line every ``log_every`` steps, sometimes with accuracies."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    validation = heldout_rows(settings.seed + 1, settings.problems_per_skill, tasks.pretraining_example)
    batches = packed_batches(tokenizer, phase, settings.seed)
    losses: list[tuple[float, float]] = []
    for step in range(phase.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, phase)
        losses.append(train_step(model, optimizer, next(batches)))
        last = step + 1 == phase.steps
        done = earlier_steps + step + 1
        if done % settings.log_every and not last:
            continue
        loss, answer_loss = (round(sum(column) / len(losses), 5) for column in zip(*losses, strict=True))
        losses.clear()
        line = {
            "phase": phase.name,
            "step": done,
            "tokens": done * BATCH_SIZE * SEQUENCE_LENGTH,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "loss": loss,
            "answer_loss": answer_loss,
        }
        if done % settings.evaluate_every == 0 or last:
            line["accuracy"] = accuracy_by_skill(model, tokenizer, validation, tasks.check_pretraining)
        yield line


def train(
    tokenizer: PreTrainedTokenizerFast, phases: Sequence[Phase], settings: Settings, log_path: Path
) -> LlamaForCausalLM:
    """Train from scratch through all phases, and write the log."""
    torch.manual_seed(settings.seed)
    model = build_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    started = time.perf_counter()
    earlier_steps = 0
    with log_path.open("w") as log:
        for phase in phases:
            for line in train_phase(model, tokenizer, phase, earlier_steps, settings):
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(f"{time.perf_counter() - started:6.0f} s  {json.dumps(line)}", flush=True)
            earlier_steps += phase.steps
    return model


def write_readme(folder: Path, seed: int, steps: int, framed_steps: int, threads: int, per_skill: int = 100) -> None:
    """Evaluate the saved model on ``per_skill`` test problems of every skill and describe it in ``README.md``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    own, instruction = (
        heldout_rows(seed, per_skill, render) for render in (tasks.pretraining_example, tasks.demonstration)
    )
    known = accuracy_by_skill(model, tokenizer, own, tasks.check_pretraining)
    instructed = accuracy_by_skill(model, tokenizer, instruction, tasks.check)
    table = "\n".join(f"| {name} | {known[name]:.1%} | {instructed[name]:.1%} |" for name in known)
    (folder / "README.md").write_text(
        README.format(
            parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            vocabulary=len(tokenizer),
            sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            seed=seed,
            steps=steps,
            framed_steps=framed_steps,
            threads=threads,
            per_skill=per_skill,
            table=table,
        ),
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4500, help="on bare documents")
    parser.add_argument("--framed-steps", type=int, default=1600, help="then, on framed documents")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--problems-per-skill", type=int, default=20, help="for the accuracies in the log")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(arguments.seed)
    tokenizer.save_pretrained(arguments.output)
    settings = Settings(arguments.seed, arguments.log_every, arguments.evaluate_every, arguments.problems_per_skill)
    phases = training_phases(arguments.steps, arguments.framed_steps)
    model = train(tokenizer, phases, settings, arguments.output / "training_log.jsonl")
    model.save_pretrained(arguments.output)
    write_readme(arguments.output, arguments.seed, arguments.steps, arguments.framed_steps, arguments.threads)


if __name__ == "__main__":
    main()
