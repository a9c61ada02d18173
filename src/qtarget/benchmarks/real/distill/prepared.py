"""What stands before the first run: students, what the teacher says of the rows, and held-out tokens, each made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qtarget.benchmarks.distill.data import CacheKind
from qtarget.benchmarks.real.distill.config import HALF, SMALL_SCALE, RealDistillConfig
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.start import untrained as random_model
from qtarget.scoring.cache.schema import MANIFEST, size_on_disk
from qtarget.storage.files import write_json
from qtarget.storage.folders import whole_folder


def prepare(
    config: RealDistillConfig,
    rows: Mapping[str, Mapping[str, list[dict[str, Any]]]],
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Students, caches and held-out tokens in ``folder``, each unless it is there; what was found, by text."""
    for name in dict.fromkeys(name for name, _ in config.points):
        if not (folder / name).is_dir():
            say(f"making the {name} student")
            make_student(config.start, name, folder / name)
    facts: dict[str, Any] = {"students": {name: parameters(config.start, folder / name) for name, _ in config.points}}
    for text, parts in rows.items():
        if not (folder / text / "held_out.json").is_file():
            write_held_out(config, parts, folder / text)
        found: dict[str, dict[str, float]] = {}
        for name, (kind, policy) in config.caches().items():
            say(f"asking the teacher: {name} of {text}")
            found[name] = write_cache(config, parts["train"], kind, policy, folder / text / name)
        facts[text] = {"caches": found}
    return facts


def arguments(config: RealDistillConfig, folder: Path, **changes: Any) -> Any:
    """Settings of all trainings, and of the scoring that sees the same tokens."""
    from qtarget.integrations.sft.config import QTargetConfig

    return QTargetConfig(
        str(folder), max_steps=config.steps, per_device_train_batch_size=config.batch_size, max_length=config.length,
        lr_scheduler_type="linear", warmup_steps=0.1, weight_decay=0.0, logging_strategy="no", bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, activation_checkpointing=False, **changes,
    )  # fmt: skip


def make_student(start: Start, name: str, folder: Path) -> None:
    """The first half of the teacher's layers between its own embeddings and its own last norm, or a small random model."""
    tokenizer = start.tokenizer()
    if name == HALF:
        model = start.load()
        count = model.config.num_hidden_layers // 2
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:count], count
    else:
        model = random_model(SMALL_SCALE, tokenizer)
    with whole_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def parameters(start: Start, folder: Path) -> int:
    """How many numbers a model has; tied ones once."""
    return start.load(folder).num_parameters()


def write_held_out(config: RealDistillConfig, parts: Mapping[str, list[dict[str, Any]]], folder: Path) -> None:
    """Held-out rows as ids, cut and masked as training does."""
    from datasets import Dataset

    from qtarget.integrations.sft.score import training_rows, untold

    found = {}
    for split in ("validation", "test"):
        with untold(True):
            job = training_rows(config.start.load(), arguments(config, folder), Dataset.from_list(parts[split]))
        found[split] = [[row["input_ids"], row["labels"]] for row in job.rows]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "held_out.json", found)


def write_cache(
    config: RealDistillConfig, rows: list[dict[str, Any]], kind: CacheKind, policy: Any, folder: Path
) -> dict[str, float]:
    """Ask the teacher about the training rows, unless it was; bytes a token of all files."""
    from datasets import Dataset

    from qtarget.integrations.sft.score import score, untold
    from qtarget.scoring.cache.reader import ReferenceCache

    if not (folder / MANIFEST).is_file():
        with untold(True):
            score(
                config.start.load(), arguments(config, folder), Dataset.from_list(rows), None,
                config.start.tokenizer(), directory=folder, top_k=kind.top_k, sampled=kind.sampled, model_id="teacher",
                progress=False, shard_rows=40, **({} if kind.sampled else {"tail_policy": policy}),
            )  # fmt: skip
    tokens = ReferenceCache.open(folder, verify=False).manifest.tokens
    return {"bytes_per_token": round(size_on_disk(folder) / tokens, 2), "tokens": tokens}
