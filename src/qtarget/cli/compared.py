"""A finished `qtarget compare` beside a run: found by its rows and its model, whatever its folder is called."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig
    from qtarget.report.audit.compared import Compared

DECIDES = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing",
    "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "optim", "weight_decay", "lr_scheduler_type", "warmup_steps",
    "warmup_ratio", "assistant_only_loss", "completion_only_loss", "prompt_weight", "weights_scale", "unplaced_spans", "group_by",
    "vocab_padding", "chat_template_path", "load_in_4bit", "load_in_8bit", "dtype", "lora_dropout", "max_grad_norm",
    "neftune_noise_alpha", "adam_beta1", "adam_beta2", "bf16", "fp16", "eos_token", "dataset_text_field",
)  # fmt: skip
"""Keys that a verdict holds for, beside rows and model."""
OFF = {"fp16": "False"}
"""What is not given is this; `audit-data` says it for every machine."""


def comparison_folder(run: str | Path) -> Path:
    """Where `qtarget compare` of a run's config writes, unless it is told otherwise: beside the run."""
    from qtarget.report.card.tables import COMPARED

    folder = Path(run) if Path(run).name not in ("", "..") else Path(run).resolve()
    return folder.with_name(folder.name + COMPARED)


def found_comparison(config: RunConfig, rows: Any) -> Compared | None:
    """The newest finished comparison beside ``output_dir`` of these training rows and this model; None without one.

    Args:
        rows: to be trained on, as ``load_datasets`` reads them.
    """
    from qtarget.comparison.kept import model_digest
    from qtarget.evaluation.evaluate import rows_digest

    finished = list(_finished(Path(os.path.abspath(str(config.training.output_dir))).parent))
    if not finished:
        return None
    now = {"model": model_digest(str(config.model.model_name_or_path)), "train": rows_digest(rows)}
    for file, plan, document in finished:
        if {"model": plan.get("model"), "train": plan.get("rows", {}).get("train")} == now:
            return _compared(config, file, plan, document)
    return None


def _finished(parent: Path) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Documents beside a run, each with its plan; the newest first, what cannot be read is none."""
    from qtarget.comparison.kept import DOCUMENT, PLAN
    from qtarget.storage.folders import COMPARISON, kind_of

    files = sorted(parent.glob(f"*/{DOCUMENT}"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files:
        if kind_of(file.parent) != COMPARISON:
            continue
        try:
            plan, document = (json.loads((file.parent / name).read_text(encoding="utf-8")) for name in (PLAN, DOCUMENT))
        except (OSError, ValueError):
            continue
        if isinstance(plan, dict) and isinstance(document, dict) and "finding" in document:
            yield file, plan, document


def _compared(config: RunConfig, file: Path, plan: Mapping[str, Any], document: Mapping[str, Any]) -> Compared:
    from qtarget.cli.options.frozen import shown
    from qtarget.report.audit.compared import Compared

    taken = next((one for one in document["contenders"] if one["name"] == document["take"]), None)
    settings = plan.get("settings", {})
    now = {key: str(config.given[key]) for key in DECIDES if key in config.given}
    return Compared(
        file=shown(file),
        finding=document["finding"],
        take=document["take"],
        options={} if taken is None else _options(config, taken, plan.get("contenders", {}).get(taken["name"], {})),
        output_dir=shown(_free(Path(os.path.abspath(str(config.training.output_dir))), str(document["take"]))),
        helps=taken is None or taken["level"] > document["base"]["level"],
        others=tuple(key for key in DECIDES if now.get(key, OFF.get(key)) != settings.get(key, OFF.get(key))),
        filtered=any((one["overrides"].get("filter") or "none") != "none" for one in document["contenders"]),
    )


def _options(config: RunConfig, taken: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, str]:
    """Keys of the contender, and its best rate, where the config's differ; values as the command line takes them.

    Args:
        planned: what its runs depend on: its own keys, and the frozen models that it asks.
    """
    from qtarget.cli.options.frozen import FROZEN_KEYS

    frozen = {key for keys in FROZEN_KEYS.values() for key in keys}
    wanted = dict(taken["overrides"]) | {key: value for key, value in planned.items() if key in frozen}
    if taken["best_rate"] is not None:
        wanted["learning_rate"] = taken["best_rate"]
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in wanted.items()
        if (value or None) != (_current(config, key) or None)
    }


def _current(config: RunConfig, key: str) -> Any:
    """The config's own, in the words of a contender."""
    if key == "filter":
        return config.given.get(key) or "none"
    return next((getattr(part, key) for part in (config.training, config.model) if hasattr(part, key)), None)


def _free(output_dir: Path, name: str) -> Path:
    """A folder beside the run's that nothing lies in yet, called after a contender."""
    stem = re.sub(r"[^\w.=-]+", "-", name).strip("-")
    places = (output_dir.with_name(stem + (f"-{i}" if i else "")) for i in range(1000))
    return next(place for place in places if not place.exists() or not any(place.iterdir()))
