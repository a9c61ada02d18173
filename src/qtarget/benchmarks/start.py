"""The model that the bases of a proof benchmark begin with: the embedded one, or a larger one trained on the spot.

The larger one is a Llama with a byte-level BPE of its own, trained from scratch by `QTargetTrainer` on real texts between
documents that teach the small skills in their own format, so that it has a prior worth trusting on the tasks.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from qtarget.core.errors import ConfigError, DataError
from qtarget.data import tasks
from qtarget.data.embedded import base_model_path
from qtarget.storage.files import write_json


@dataclass(frozen=True)
class Start:
    """Where bases and runs begin.

    Attributes:
        folder: model and tokenizer; absent: the embedded base.
        device: of torch, for all runs.
        learning_rate: a peak rate that suits this size of model: bases are taught with it, and grids are multiples of it.
    """

    folder: str | None = None
    device: str = "cpu"
    learning_rate: float = 1e-3

    def rates(self, grid: tuple[float, ...]) -> tuple[float, ...]:
        """A grid of learning rates that was made for the embedded base, for this one."""
        return tuple(rate * self.learning_rate / Start.learning_rate for rate in grid)

    @property
    def path(self) -> Path:
        """Of model and tokenizer."""
        return Path(self.folder) if self.folder else base_model_path()

    def tokenizer(self) -> Any:
        """The tokenizer of all its bases."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)

    def load(self, folder: Path | None = None, dtype: str = "float32") -> Any:
        """A causal model on the device: the one of ``folder``, or the start itself."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder or self.path, dtype=dtype)
        return model.to(self.device)


@dataclass(frozen=True)
class Scale:
    """A model that is trained from scratch as a start, and on how much.

    Attributes:
        vocab, width, layers, heads: of tokenizer and model.
        skill_documents: small documents that teach the skills.
        steps, batch_size, length: optimizer steps of so many packed rows of so many tokens.
        learning_rate: the peak of that training; fine-tuning takes a third.
    """

    vocab: int = 8192
    width: int = 512
    layers: int = 10
    heads: int = 8
    skill_documents: int = 200_000
    steps: int = 3000
    batch_size: int = 64
    length: int = 512
    learning_rate: float = 1e-3
    device: str = "cuda"


QUICK_SCALE = Scale(steps=60, skill_documents=4000)
"""For a smoke test: the same model, a minute of it."""


def start_of(
    scale: str,
    data: Path | None,
    corpus: Path | None,
    folder: Path,
    say: Callable[[str], None] = print,
    is_quick: bool = False,
) -> Start:
    """What ``--scale`` names: ``cpu`` is the embedded base, ``gpu`` a larger one, trained into ``folder`` once.

    Raises:
        ConfigError: another scale, no CUDA device, or a corpus that nothing is trained on.
        DataError: there are no texts.
    """
    if scale == "cpu":
        if corpus is not None or data is not None:
            raise ConfigError(
                "--corpus or --data is what the base of --scale gpu is trained on; add --scale gpu, or leave it out"
            )
        return Start()
    if scale != "gpu":
        raise ConfigError(f"--scale {scale!r} is unknown; expected cpu or gpu")
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "--scale gpu trains a base of 36 million parameters, and torch sees no CUDA device; leave --scale out"
        )
    if torch.cuda.device_count() > 1 or not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"--scale gpu runs on one device with bfloat16, and torch sees {torch.cuda.device_count()}; choose it with "
            "CUDA_VISIBLE_DEVICES"
        )
    return trained_start(QUICK_SCALE if is_quick else Scale(), list(real_texts(data, corpus)), folder, say)


def real_texts(data: Path | None, corpus: Path | None) -> Iterator[str]:
    """Paragraphs of a text file, one a blank line apart; or those of the real texts in ``data``.

    Raises:
        DataError: neither is given, or a file is missing.
    """
    if corpus is not None:
        paragraphs = _paragraphs(corpus)
        if len(paragraphs) < 2:
            raise DataError(f"{corpus} has {len(paragraphs)} paragraphs; a blank line ends one, and each is a text")
        yield from paragraphs
        return
    if data is None:
        raise DataError(
            "--scale gpu trains its base on texts; name a text file with --corpus, or their folder with --data"
        )
    folder = data / "text_corpora"
    for name in ("wikitext2_valid.txt.gz", "wikitext2_test.txt.gz", "tinyshakespeare.txt.gz"):
        yield from _paragraphs(folder / name)
    yield from json.loads(_read(folder / "tinystories_1000.json.gz"))
    for row in json.loads(_read(data / "dolly_3k" / "dolly_3k.json.gz")):
        yield "\n".join(str(value) for value in row.values() if value)


def _paragraphs(path: Path) -> list[str]:
    return [part.strip() for part in re.split(r"\r?\n\s*\r?\n", _read(path)) if part.strip()]


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(
            f"{path} is missing; --data names the folder of the real data, --corpus a text file of your own"
        )
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def skill_texts(count: int) -> list[str]:
    """Documents that state a problem of the training split and its answer, bare or in a sentence; never as an instruction."""
    random, skills = Random("skill documents"), list(tasks.SKILLS)
    out = []
    for _ in range(count):
        problem = tasks.sample_problem_in(random.choice(skills), "train", random)
        word = tasks.framed_example if random.random() < 0.5 else tasks.pretraining_example
        example = word(problem, random)
        out.append(example["prompt"] + example["completion"])
    return out


def trained_start(scale: Scale, texts: list[str], folder: Path, say: Callable[[str], None]) -> Start:
    """A start of this scale in ``folder``; trained once, and gone on with from its last checkpoint if it was stopped.

    Raises:
        ConfigError: the folder holds one of another scale.
    """
    texts_hash = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    claim(folder, {"scale": asdict(scale), "texts": texts_hash})
    start = Start(str(folder), scale.device, scale.learning_rate / 3)
    if (folder / READY).is_file():
        return start
    from datasets import Dataset

    from qtarget.integrations.sft.config import QTargetConfig
    from qtarget.integrations.sft.trainer import QTargetTrainer
    from qtarget.integrations.shared.checkpoints import last_complete_checkpoint

    say(f"training a base on {len(texts)} real texts and {scale.skill_documents} skill documents")
    rows = texts + skill_texts(scale.skill_documents)
    Random(0).shuffle(rows)
    tokenizer = trained_tokenizer(rows, scale)
    at_once = min(8, scale.batch_size)  # rows of a packed batch attend under one mask of (rows x length) squared
    checkpoints, cuda = folder / "checkpoints", scale.device != "cpu"
    arguments = QTargetConfig(
        target="sft", output_dir=str(checkpoints), max_steps=scale.steps, per_device_train_batch_size=at_once,
        gradient_accumulation_steps=scale.batch_size // at_once,
        learning_rate=scale.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.1,
        packing=True, max_length=scale.length, bf16=cuda, use_cpu=not cuda, activation_checkpointing=False,
        save_steps=max(1, scale.steps // 10), save_total_limit=1, report_to="none",
        logging_steps=max(1, scale.steps // 20), dataloader_pin_memory=cuda,
    )  # fmt: skip
    trainer = QTargetTrainer(
        untrained(scale, tokenizer), arguments, None, Dataset.from_dict({"text": rows}), None, tokenizer
    )
    last = last_complete_checkpoint(checkpoints)
    for cut_off in (path for path in checkpoints.glob("checkpoint-*") if str(path) != last):
        shutil.rmtree(cut_off)  # its number may be the highest, and save_total_limit keeps the highest
    trainer.train(resume_from_checkpoint=last)
    tokenizer.save_pretrained(folder)
    model: Any = trainer.model
    model.save_pretrained(folder)
    write_json(folder / READY, {"steps": scale.steps})
    return start


READY = "ready.json"
"""Written last: what stands beside it is whole."""


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder theirs, or see that it is.

    Raises:
        ConfigError: what it holds was made with other settings, and names them, or nobody knows with which.
    """
    mark = folder / "settings.json"
    if not mark.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} has no {mark.name}, so nobody knows what it was made with; delete it, or choose another --output"
        )
    now = json.loads(json.dumps(settings))
    then = json.loads(mark.read_text()) if mark.is_file() else now
    if differing := [name for name, value in now.items() if then.get(name) != value]:
        raise ConfigError(
            f"{folder} was made with another {' and '.join(differing)}; delete it, or choose another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, now)


def trained_tokenizer(texts: list[str], scale: Scale) -> Any:
    """Byte-level BPE over the texts; digits and upper-case letters stay single, as in the embedded tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    embedded = AutoTokenizer.from_pretrained(base_model_path())
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = embedded.backend_tokenizer.pre_tokenizer
    tokenizer.decoder = embedded.backend_tokenizer.decoder
    special = [embedded.eos_token, embedded.pad_token]
    trainer = BpeTrainer(
        vocab_size=scale.vocab,
        special_tokens=special,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1], padding_side="left"
    )


def untrained(scale: Scale, tokenizer: Any) -> Any:
    """A Llama of this scale with random weights, the same each time."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=scale.width, intermediate_size=-(-scale.width * 8 // 3 // 64) * 64,
        num_hidden_layers=scale.layers, num_attention_heads=scale.heads, num_key_value_heads=scale.heads,
        max_position_embeddings=max(scale.length, 512), tie_word_embeddings=True, **ids,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids, do_sample=False)
    return model
