"""What a run's records say about its model, as one document that a card is written from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtarget.core.errors import DataError
from qtarget.report.card.tables import is_hub_name, public, read_object, tables
from qtarget.report.runs.document import training_lines
from qtarget.report.runs.records import CONFIG_FILE, LOG_FILE, RUN_FILE, read_lines
from qtarget.storage.models import adapter_base

SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing",
    "assistant_only_loss", "completion_only_loss", "weights_scale", "prompt_weight", "bf16", "fp16", "seed",
)  # fmt: skip
"""Of all settings those that a reader asks for; the others are in the run's own records."""
SAMPLING_SETTINGS = (
    "trust_region_kwargs", "advantage", "target_weight", "anchor", "loss_type", "scale_rewards",
    "num_generations", "num_iterations", "steps_per_generation", "temperature", "top_p", "top_k", "max_completion_length",
)  # fmt: skip
"""The same of a run on its own samples."""
ADAPTER_SETTINGS = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "target_modules",
    "modules_to_save",
)
METRICS = {
    "loss": "loss", "nll": "nll, nats a token", "mean_token_accuracy": "token accuracy", "reward": "reward",
    "kl/start": "KL to the start, nats a token", "completions/mean_length": "tokens a completion",
}  # fmt: skip


def card_document(
    run: str | Path, evaluations: Sequence[str | Path] = (), peft: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What is known of a run.

    Args:
        run: its folder, with ``qtarget_run.json``.
        peft: settings of its adapter, for a run that has not saved it yet; default: what lies in its folder.
        evaluations: JSON files of ``qtarget evaluate`` with this run among their models, and of ``qtarget compare``.

    Raises:
        DataError: the folder has no record of a run, or a file is no evaluation of it.
    """
    folder = Path(run)
    record, config = read_object(folder / RUN_FILE), _read_config(folder / CONFIG_FILE)
    fingerprints, settings = record.get("fingerprints", {}), record["settings"]
    base, sampled = str(record["model"]["name"]), "trust_region" in settings
    return {
        "base": {"name": public(base), "hub": base if is_hub_name(base) else None, "fingerprint": fingerprints.get("model")},
        "target": {
            "name": record["target"], "kwargs": record["target_kwargs"], "formula": record.get("formula"),
            "paper": record.get("paper"), "arxiv": arxiv_ids(record.get("paper") or ""),
        },
        "frozen": record.get("frozen", {}),
        "data": _data(record["data"], config),
        "datasets": [config["dataset_name"]] if is_hub_name(str(config.get("dataset_name") or "")) else [],
        "sampled": sampled,
        "rewards": record.get("rewards", []),
        "settings": {
            name: settings[name]
            for name in (*SETTINGS, *(SAMPLING_SETTINGS if sampled else ()))
            if _is_said(settings.get(name)) and not _is_idle(name, settings)
        },
        "rows_a_step": fingerprints.get("rows a step"),
        "adapter": adapter_settings(peft or _saved_adapter(folder)),
        "chats": record.get("chats"),
        "results": _results(read_lines(folder / LOG_FILE)),
        "evaluations": [table for path in evaluations for table in tables(Path(path), folder, record["target"])],
        "versions": record["versions"],
    }  # fmt: skip


def arxiv_ids(paper: str) -> list[str]:
    """The arXiv numbers in a target's origin.

    Example:
        >>> arxiv_ids("2509.23753"), arxiv_ids("cross entropy")
        (['2509.23753'], [])
    """
    return re.findall(r"\b\d{4}\.\d{4,5}\b", paper)


def _is_said(value: Any) -> bool:
    return value is not None and value is not False and value != -1


def _is_idle(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether nothing reads a setting, given the others."""
    rewarded = settings.get("trust_region") is not None and settings.get("advantage") == "reward"
    return {
        "num_train_epochs": settings.get("max_steps", -1) > 0,
        "target_weight": settings.get("target") is None or settings.get("trust_region") is None,
        "advantage": settings.get("trust_region") is None,
        "scale_rewards": not rewarded,
    }.get(name, False)


def _data(described: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each data set with the files that it came from, where a config names them."""
    keys = {"train": "train_file", "eval": "validation_file"}
    found = []
    for name in sorted(described, key=lambda name: (name != "train", name)):
        about = described[name]
        files = config.get(keys.get(name, "")) or (config.get("dataset_name") if name in keys else None) or []
        files = [files] if isinstance(files, str) else list(files)
        found.append({"name": name, "files": [public(str(file)) for file in files], **about})
    return found


def _saved_adapter(folder: Path) -> dict[str, Any] | None:
    """Settings of the adapter that lies in the folder, or in its newest checkpoint; None for a model of its own."""
    if (folder / "config.json").is_file():
        return None
    newest = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)[-1:]
    place = next((path for path in (folder, *newest) if adapter_base(str(path)) is not None), None)
    return None if place is None else read_object(place / "adapter_config.json")


def adapter_settings(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of an adapter's settings those that a reader asks for."""
    if config is None:
        return None
    plain = {name: config[name] for name in ADAPTER_SETTINGS if config.get(name)}
    return {
        name: sorted(value) if isinstance(value, set | frozenset) else getattr(value, "value", value)
        for name, value in plain.items()
    }


def _results(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """First and last training line, and the last evaluation of each set, by metric."""
    lines = training_lines(log)
    ends = [line for line in log if any(key.endswith("_runtime") and key.startswith("eval_") for key in line)]
    evaluations: dict[str, dict[str, Any]] = {}
    for line in ends:  # later ones replace earlier ones
        prefix = next(
            key.removesuffix("runtime") for key in line if key.startswith("eval_") and key.endswith("_runtime")
        )
        evaluations[prefix.rstrip("_")] = {
            METRICS[name]: line[prefix + name] for name in METRICS if prefix + name in line
        } | {"step": line.get("step")}
    train = {
        METRICS[name]: {"first": with_it[0][name], "last": with_it[-1][name]}
        for name in METRICS
        if (with_it := [line for line in lines if name in line])
    }
    last = log[-1] if log else {}
    tokens = [line["num_tokens"] for line in lines if "num_tokens" in line]
    return {
        "step": last.get("step"), "epoch": last.get("epoch"), "tokens": tokens[-1] if tokens else None, "train": train,
        "first_step": lines[0].get("step") if lines else None, "last_step": lines[-1].get("step") if lines else None,
        "evaluations": evaluations,
    }  # fmt: skip


def _read_config(path: Path) -> dict[str, Any]:
    """The run's config; nothing where the run was made in Python, or is still going."""
    import yaml

    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read ({error}); was it cut off?") from error
