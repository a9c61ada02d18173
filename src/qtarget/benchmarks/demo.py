"""``qtarget demo``: several targets on the same noisy demonstrations, counted on clean held-out prompts."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from qtarget.benchmarks.figure import comparison_figure, save_figure
from qtarget.benchmarks.generation import accuracy_percent, greedy_completions
from qtarget.benchmarks.seeds import finding, over_seeds, paired_difference
from qtarget.errors import ConfigError
from qtarget.registry import get_target

BASELINE = "sft"
SPARE_TOKENS = 4  # beyond the longest right answer: the end-of-text token, and room to be wrong in
CAPTION = (
    "Large points: mean over seeds; small points: each seed; lines: smallest to largest seed (no confidence "
    "interval). A seed "
    "sets the noise and the order of the rows; within a seed all targets see the same."
)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DemoConfig:
    """One budget for all targets. Defaults were chosen on plain sft with clean rows, before any target was compared.

    Attributes:
        targets: names, with default hyper-parameters.
        seeds: number of seeds, 0, 1, ...; each sets the noise and the order of the rows.
        kind, rate: of the noise injector.
        train_rows, test_rows: how many demonstrations to train on and held-out prompts to answer.
        kept_rows: prompts, in the base's own format, of skills that no demonstration shows: what training forgets.
        top_k: log-probs a token in the reference cache.
    """

    targets: tuple[str, ...] = ("sft", "prior_surprise", "dft", "p_power", "asft", "target_sft")
    seeds: int = 3
    kind: str = "random_tokens"
    rate: float = 0.2
    train_rows: int = 600
    test_rows: int = 270
    kept_rows: int = 90
    learning_rate: float = 1e-3
    epochs: int = 2
    batch_size: int = 16
    evaluation_batch_size: int = 300
    top_k: int = 32

    def __post_init__(self) -> None:
        counts = {
            "seeds": self.seeds,
            "train_rows": self.train_rows,
            "test_rows": self.test_rows,
            "kept_rows": self.kept_rows,
        }
        if min(counts.values()) < 1:
            raise ConfigError(f"expected at least 1 each: {', '.join(f'{name} {n}' for name, n in counts.items())}")
        if BASELINE not in self.targets:
            raise ConfigError(
                f"targets {', '.join(self.targets)} lack {BASELINE}, which the others are compared with; add it"
            )
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"targets {', '.join(self.targets)} name one twice; expected each once")
        for name in self.targets:
            get_target(name)


def quick(config: DemoConfig) -> DemoConfig:
    """A few seconds' worth: one seed, two targets, few rows. For tests, not for conclusions."""
    return replace(config, targets=("sft", "asft"), seeds=1, train_rows=48, test_rows=18, kept_rows=6, epochs=1)


def run_demo(config: DemoConfig, output: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Score the base, train every target on every seed, answer the held-out prompts, write numbers and picture.

    Args:
        output: gets ``results.json`` and ``results.png``; earlier ones are replaced. All else is temporary.
        progress: called with runs done, runs in all, and what comes next.

    Returns:
        What ``results.json`` holds.
    """
    begin, output = time.perf_counter(), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    report = progress or (lambda done, total, text: None)
    total = 2 + config.seeds * len(config.targets)
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        bench = _Bench(config, Path(folder))
        report(0, total, "scoring the base model")
        scoring = bench.score_base()
        report(1, total, "answering with the untrained model")
        untrained = bench.evaluate(bench.base_model())
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in config.targets}
        for done, (seed, name) in enumerate(((s, t) for s in range(config.seeds) for t in config.targets), start=2):
            report(done, total, f"seed {seed}, {name}")
            runs[name].append({"seed": seed} | bench.train_and_evaluate(name, seed))
    report(total, total, "done")
    results = {
        "benchmark": "demo",
        "config": asdict(config),
        "untrained": untrained,
        "runs": runs,
        "summary": summarize(runs),
        "finding": finding(accuracies(runs), noise_words(config)),
        "interval": CAPTION,
        "scoring": scoring,
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine_facts(),
        "versions": versions(),
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    save_figure(
        comparison_figure(accuracies(runs), untrained["accuracy_percent"], results["finding"], CAPTION),
        output / "results.png",
    )
    return results


class _Bench:
    """The embedded model and rows, and the two things done with them."""

    def __init__(self, config: DemoConfig, folder: Path) -> None:
        from transformers import AutoTokenizer

        from qtarget.data.embedded import base_model_path, load_demonstrations

        self.config, self.folder, self.path = config, folder, str(base_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.rows = {
            "train": sample_rows(load_demonstrations("train"), config.train_rows, "train"),
            "test": sample_rows(load_demonstrations("test"), config.test_rows, "test"),
            "kept": sample_rows(load_demonstrations("heldout_skills_test"), config.kept_rows, "kept"),
        }

    def base_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path, dtype="float32")

    def noisy_rows(self, seed: int) -> Any:
        """The training rows of a seed, as prompt and completion."""
        from datasets import Dataset

        from qtarget.data.noise import inject_noise

        noisy = inject_noise(
            self.rows["train"], kind=self.config.kind, rate=self.config.rate, seed=seed, tokenizer=self.tokenizer
        )
        return Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in noisy])

    def arguments(self, target: str, seed: int) -> Any:
        from qtarget.integrations.trl_sft import QTargetConfig

        config, cache = self.config, str(self.folder / "reference_cache")
        needs = get_target(target).needs
        return QTargetConfig(
            target=target,
            reference_cache=cache if needs.reference else None,
            teacher_cache=cache if needs.teacher else None,
            output_dir=str(self.folder / "training"),
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            num_train_epochs=config.epochs,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            seed=seed,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

    def score_base(self) -> dict[str, float]:
        """One cache for the rows of all seeds; rows are found by the checksum of their tokens."""
        from datasets import concatenate_datasets

        from qtarget.integrations.trl_score import score

        begin, directory = time.perf_counter(), self.folder / "reference_cache"
        rows = concatenate_datasets([self.noisy_rows(seed) for seed in range(self.config.seeds)])
        manifest = score(
            self.base_model(),
            self.arguments(BASELINE, 0),
            rows,
            processing_class=self.tokenizer,
            directory=directory,
            top_k=self.config.top_k,
            model_id="embedded base model",
            progress=False,
        )
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        return {
            "rows": manifest.rows,
            "tokens": manifest.tokens,
            "top_k": self.config.top_k,
            "bytes_per_token": round(size / manifest.tokens, 1),
            "seconds": round(time.perf_counter() - begin, 2),
        }

    def train_and_evaluate(self, target: str, seed: int) -> dict[str, float]:
        from transformers import PrinterCallback

        from qtarget.integrations.trl_sft import QTargetTrainer

        begin = time.perf_counter()
        trainer = QTargetTrainer(
            self.base_model(), self.arguments(target, seed), self.noisy_rows(seed), processing_class=self.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trained = time.perf_counter()
        scores = self.evaluate(trainer.model)
        return scores | {
            "steps": trainer.state.global_step,
            "training_seconds": round(trained - begin, 2),
            "evaluation_seconds": round(time.perf_counter() - trained, 2),
        }

    def evaluate(self, model: Any) -> dict[str, float]:
        """Percent of clean held-out prompts answered right, and of skills that were not demonstrated."""
        from qtarget.data.tasks import check, check_pretraining

        checks = {"accuracy_percent": ("test", check), "kept_percent": ("kept", check_pretraining)}
        out = {}
        for name, (split, checker) in checks.items():
            rows = self.rows[split]
            longest = max(len(self.tokenizer(row["completion"])["input_ids"]) for row in rows)
            texts = greedy_completions(
                model,
                self.tokenizer,
                [row["prompt"] for row in rows],
                max_new_tokens=longest + SPARE_TOKENS,
                batch_size=self.config.evaluation_batch_size,
            )
            out[name] = round(accuracy_percent(rows, texts, checker), 2)
        return out


def sample_rows(rows: Sequence[Mapping[str, Any]], count: int, split: str) -> list[Mapping[str, Any]]:
    """The same ``count`` rows for every seed and target.

    Raises:
        ConfigError: more are asked for than there are.
    """
    if count > len(rows):
        raise ConfigError(f"{count} {split} rows asked for, {len(rows)} are embedded; lower {split}_rows")
    return Random(0).sample(list(rows), count)


def accuracies(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
    """Target -> percent, one number a seed."""
    return {name: [run["accuracy_percent"] for run in found] for name, found in runs.items()}


def summarize(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Per target: range of the accuracy, range of its paired difference to the baseline, mean seconds of training."""
    values = accuracies(runs)
    return {
        name: {
            "accuracy_percent": asdict(over_seeds(values[name])),
            "difference_to_sft_points": asdict(paired_difference(values[name], values[BASELINE])),
            "kept_percent": asdict(over_seeds([run["kept_percent"] for run in found])),
            "training_seconds": round(over_seeds([run["training_seconds"] for run in found]).mean, 2),
        }
        for name, found in runs.items()
    }


def noise_words(config: DemoConfig) -> str:
    """The noise in words.

    Example:
        >>> noise_words(DemoConfig())
        '20 % random tokens'
    """
    return f"{100 * config.rate:g} % {config.kind.replace('_', ' ')}"


def machine_facts() -> dict[str, Any]:
    """What the timings depend on."""
    import torch

    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    packages = ("qtarget", "torch", "transformers", "trl", "datasets", "accelerate")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Progress bars of datasets and notes of transformers off, then as they were: eighteen trainings would fill a "
    "screen."""
    import datasets
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    dataset_bars = not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if dataset_bars:
            datasets.enable_progress_bars()
