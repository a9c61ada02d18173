"""A whole training step: ``QTargetTrainer`` with any target against TRL's own ``SFTTrainer``.

Every contender is a real ``trainer.train()`` in a thread of its own; they take turns, one optimizer step each, so that a
step's time holds all of it: fetching and collating the batch, cache look-up, forward, loss, backward, clipping, optimizer
and logging. Peak memory is measured in a fresh process for each.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qtarget.benchmarks.machine import machine
from qtarget.benchmarks.speed.losses import against
from qtarget.benchmarks.speed.memory import resident
from qtarget.core.errors import ConfigError
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.score import score
from qtarget.integrations.sft.trainer import QTargetTrainer
from qtarget.storage.models import context_of, load_named, load_whole

TRL = "TRL SFTTrainer"
UNCOUNTED = 1
"""Steps of each contender that are run first: they allocate the optimizer's state."""


@dataclass(frozen=True)
class TrainerBenchConfig:
    """Model, batch and effort; the defaults are SmolLM2-135M's shape with random weights.

    Attributes:
        batch, length: rows a step, and tokens a row; every token is trained on.
        vocab, width, layers, intermediate, heads, kv_heads: of a Llama with tied embeddings.
        dtype: of its weights: ``float32`` or ``bfloat16``.
        targets: each a contender beside ``SFTTrainer``.
        top_k: of the cache, whose reference and teacher are the model itself.
        rounds: counted steps of each contender.
        seed: of weights and tokens.
        model: folder of a model to train in place of that Llama, whose shape the numbers above then are; its own weights.
    """

    batch: int = 4
    length: int = 256
    vocab: int = 49_152
    width: int = 576
    layers: int = 30
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    dtype: str = "float32"
    targets: tuple[str, ...] = ("sft", "dft", "asft")
    top_k: int = 64
    rounds: int = 5
    seed: int = 0
    model: str | None = None

    @classmethod
    def of(cls, model: str, **given: Any) -> TrainerBenchConfig:
        """With a folder's model, and its shape.

        Raises:
            ConfigError: no such model, or rows longer than it was made for.
        """
        found = load_named(AutoConfig, "--model", model).get_text_config()
        positions = context_of(found)
        if positions is not None and given.get("length", cls.length) > positions:
            raise ConfigError(f"--length {given.get('length', cls.length)}: {model} was made for {positions} tokens")
        heads = found.num_attention_heads
        return cls(
            vocab=found.vocab_size, width=found.hidden_size, layers=found.num_hidden_layers, heads=heads,
            intermediate=getattr(found, "intermediate_size", None) or 4 * found.hidden_size,  # GPT-2 and OPT name it otherwise
            kv_heads=getattr(found, "num_key_value_heads", heads), model=model, **given,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Steps of each contender."""
        return UNCOUNTED + self.rounds


def build_model(config: TrainerBenchConfig) -> PreTrainedModel:
    """The same weights every time: random ones, or those of the folder."""
    dtype = getattr(torch, config.dtype)
    if config.model is not None:
        return load_whole("--model", config.model, dtype=dtype)
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        intermediate_size=config.intermediate,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=max(config.length, 256),
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(shape).to(dtype)  # pyright: ignore[reportArgumentType]


def build_rows(config: TrainerBenchConfig) -> Dataset:
    """Rows of random tokens, as many as the steps take."""
    rng = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(2, config.vocab, (config.steps * config.batch, config.length), generator=rng)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def build_tokenizer(config: TrainerBenchConfig) -> PreTrainedTokenizerBase:
    """TRL asks for one; the rows are tokens already."""
    if config.model is not None:
        return load_named(AutoTokenizer, "--model", config.model)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def settings_of(config: TrainerBenchConfig, folder: Path) -> dict[str, Any]:
    """What all contenders share; TRL's defaults otherwise, but nothing is recomputed in the backward pass."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.batch,
        "max_steps": config.steps,
        "max_length": config.length,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": config.seed,
    }


def build_trainer(name: str, config: TrainerBenchConfig, folder: Path) -> Trainer:
    """A contender; its cache is in ``folder``."""
    shared, rows, model = settings_of(config, folder / "runs" / name), build_rows(config), build_model(config)
    if name == TRL:
        return SFTTrainer(model, SFTConfig(**shared), None, rows, None, build_tokenizer(config))
    cache = str(folder / "cache")
    args = QTargetConfig(**shared, target=name, reference_cache=cache, teacher_cache=cache)
    return QTargetTrainer(model, args, None, rows, None, build_tokenizer(config))


def write_cache(config: TrainerBenchConfig, folder: Path) -> None:
    """Score the rows once with the untrained model."""
    args = QTargetConfig(**settings_of(config, folder / "runs"))
    score(
        build_model(config), args, build_rows(config), None, build_tokenizer(config),
        directory=folder / "cache", top_k=config.top_k, progress=False,
    )  # fmt: skip


# -- time ----------------------------------------------------------------------------------------------------------


class Turns:
    """One trainer runs at a time, from the end of one optimizer step to the end of the next."""

    def __init__(self, names: list[str], say: Callable[[str], None]) -> None:
        self.waiting = list(names)
        self.taken: dict[str, list[float]] = {name: [] for name in names}
        self.failed = False
        self._say = say
        self._changed = threading.Condition()
        self._started = 0.0

    def take(self, name: str) -> None:
        """Wait until it is this one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting[0] == name)
        # CPU time of the process: while it is this one's turn nobody else computes
        self._started = time.process_time()

    def give(self, name: str) -> None:
        """A step is over: the next one's turn."""
        self.taken[name].append(time.process_time() - self._started)
        self._say(f"step {len(self.taken[name])} of {name}: {self.taken[name][-1]:.2f} CPU s")
        with self._changed:
            self.waiting = [*self.waiting[1:], name]
            self._changed.notify_all()

    def leave(self, name: str, failed: bool) -> None:
        """No further step of this one."""
        with self._changed:
            self.failed |= failed
            self.waiting.remove(name)
            self._changed.notify_all()


class StepTurns(TrainerCallback):
    """Hands the turn on at the end of each optimizer step."""

    def __init__(self, name: str, turns: Turns) -> None:
        self.name, self.turns = name, turns

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turns.give(self.name)
        self.turns.take(self.name)
        if self.turns.failed:
            control.should_training_stop = True


def train_in_turns(name: str, trainer: Trainer, turns: Turns) -> None:
    """One contender's thread."""
    trainer.add_callback(StepTurns(name, turns))
    failed = True
    turns.take(name)
    try:
        trainer.train()
        failed = False
    finally:
        turns.leave(name, failed)


def run_trainers(
    config: TrainerBenchConfig, say: Callable[[str], None] = lambda _: None, memory: bool = True
) -> dict[str, Any]:
    """Time, and with ``memory`` the peak, of ``SFTTrainer`` and of each target.

    Returns:
        ``config``, ``machine``, and for each contender ``seconds`` (CPU, of each counted step), ``median``, ``ratio`` to
        ``SFTTrainer`` (``median``, ``low``, ``high``) and ``peak_mb`` (resident memory of its process while it trains).
    """
    names = [TRL, *config.targets]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cache(config, folder)
        peaks = {name: measured_peak(name, config, folder, say) for name in names} if memory else {}
        trainers = {name: build_trainer(name, config, folder) for name in names}
        turns = Turns(names, say)
        with ThreadPoolExecutor(len(names)) as pool:
            running = [pool.submit(train_in_turns, name, trainers[name], turns) for name in names]
        for run in running:
            run.result()
    rows: dict[str, Any] = {}
    for name in names:
        times, theirs = turns.taken[name][UNCOUNTED:], turns.taken[TRL][UNCOUNTED:]
        rows[name] = {"seconds": times, "median": statistics.median(times), "ratio": against(times, theirs)}
        rows[name] |= {"peak_mb": peaks[name]} if memory else {}
    return {"config": asdict(config), "machine": machine("cpu"), "rows": rows}


# -- memory --------------------------------------------------------------------------------------------------------


class PeakOfSteps(TrainerCallback):
    """Starts the kernel's high-water mark again once the optimizer's state exists."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == UNCOUNTED:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")


def peak_of(name: str, config: TrainerBenchConfig, folder: Path) -> float:
    """Peak resident MB of this (fresh, Linux) process over the counted steps."""
    trainer = build_trainer(name, config, folder)
    trainer.add_callback(PeakOfSteps())
    trainer.train()
    return resident("VmHWM") / 1e6


def measured_peak(name: str, config: TrainerBenchConfig, folder: Path, say: Callable[[str], None]) -> float:
    """``peak_of`` in a fresh process.

    Raises:
        RuntimeError: the process failed; its message is shown.
    """
    code = "import sys,json;from qtarget.benchmarks.speed.trainer import *;torch.set_num_threads(int(sys.argv[4]))"
    code += ";print(peak_of(sys.argv[1],TrainerBenchConfig(**json.loads(sys.argv[2])),Path(sys.argv[3])))"
    # as many threads as here, which a fresh process does not inherit
    command = [sys.executable, "-c", code, name, json.dumps(asdict(config)), str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    peak = float(done.stdout.splitlines()[-1])
    say(f"{name}: peak {peak:.0f} MB resident")
    return peak
