"""Where a run starts or goes on, and what it leaves in its folder: the same for every trainer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import ConfigError
from qtarget.report.runs.records import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qtarget.cli.options.config import RunConfig

SUMMARY_FILE = "train_summary.json"

logger = logging.getLogger(__name__)


def how_to_go_on(output: Path) -> str:
    """What of a run that is ended early is safe, in words."""
    from qtarget.integrations.shared.checkpoints import last_complete_checkpoint

    if (newest := last_complete_checkpoint(output)) is None:
        return (
            f"no checkpoint was saved to {output} yet (save_strategy, save_steps); the same command with --resume true starts "
            "anew"
        )
    return f"{newest} is whole; go on from it with the same command and --resume true"


def starting_point(config: RunConfig) -> str | None:
    """The checkpoint to go on from, or None; refuses to write over an earlier run.

    Raises:
        ConfigError: see the message.
    """
    from qtarget.integrations.shared.checkpoints import last_complete_checkpoint

    output, explicit = Path(str(config.training.output_dir)), config.training.resume_from_checkpoint
    if explicit is not None:
        if config.data.resume is True:
            raise ConfigError(
                "resume and resume_from_checkpoint are both set; resume takes the newest, so keep one of them"
            )
        if not Path(explicit).is_dir():
            raise ConfigError(
                f"resume_from_checkpoint: {explicit} is not a folder; expected something like {output}/checkpoint-100"
            )
        return explicit
    found = sorted(path.name for path in output.glob("checkpoint-*"))
    newest = last_complete_checkpoint(output)
    if newest is not None and config.data.resume:
        return newest
    if found and not config.data.resume:
        raise ConfigError(
            f"output_dir {output} holds checkpoints of an earlier run ({', '.join(found[-3:])}); go on with --resume "
            "true, or "
            "choose another --output_dir"
        )
    if not found and (output / SUMMARY_FILE).exists():
        raise ConfigError(f"output_dir {output} holds a finished run without checkpoints; choose another --output_dir")
    if config.data.resume:
        cut_off = f" ({', '.join(found[-3:])} cut off while being saved)" if found else ""
        logger.warning("resume: %s holds no checkpoint to go on from%s; starting at step 0", output, cut_off)
    return None


def write_records(output: Path, config: RunConfig, summary: Mapping[str, Any]) -> None:
    """Write ``qtarget_config.yaml`` (``qtarget train`` reads it again) and ``train_summary.json``."""
    import yaml

    from qtarget.cli.options.config import resolved_settings
    from qtarget.storage.files import write_text

    settings = resolved_settings(config)
    write_text(output / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_text(output / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def saved_model(output: Path) -> str:
    """What a run's folder holds: ``adapter`` or ``model``."""
    return "adapter" if (output / "adapter_config.json").is_file() else "model"


def after_training(output: str | Path, held_out: str | list[str] | None) -> list[str]:
    """Commands to go on with when a run is finished.

    Args:
        held_out: the ``validation_file`` that the run records: of several the first is asked; where there is none, the user has
            to name one.

    Example:
        >>> print("\\n".join(after_training("runs/sft", None)))
        next:
          qtarget evaluate runs/sft --data HELD_OUT.jsonl  # beside its base; your rows with `prompt` and `completion`
          qtarget report runs/sft  # its course
        >>> after_training("runs/sft", ["my rows.jsonl", "b.jsonl"])[1]
        "  qtarget evaluate runs/sft --data 'my rows.jsonl'  # beside its base, on the first of 2 validation files"
    """
    from qtarget.command import quoted

    asked, which = " --data HELD_OUT.jsonl", "; your rows with `prompt` and `completion`"
    if isinstance(held_out, list):
        asked, which = f" --data {quoted(held_out[0])}", f", on the first of {len(held_out)} validation files"
    elif held_out is not None:
        asked, which = "", f", on {held_out}"
    run = quoted(output)
    return [
        "next:",
        f"  qtarget evaluate {run}{asked}  # beside its base{which}",
        f"  qtarget report {run}  # its course",
    ]


def recorded_config(named: Path) -> Path:
    """What there is to show: a config as it is, of a run its samples, or else the config that it left.

    Raises:
        ConfigError: a folder holds neither.
    """
    from qtarget.report.runs.records import CONFIG_FILE, ROLLOUTS_FILE

    if not named.is_dir():
        return named
    found = next((named / name for name in (ROLLOUTS_FILE, CONFIG_FILE) if (named / name).is_file()), None)
    if found is None:
        raise ConfigError(
            f"{named} holds neither {CONFIG_FILE} nor {ROLLOUTS_FILE}; expected a config of `qtarget train`, or the "
            "output_dir of a finished run"
        )
    return found


def checkpoint_paths(named: str | None, run: Path | None) -> tuple[str, ...]:
    """Trained models to show beside the start: those that are named, else the run's own."""
    from qtarget.evaluation.contenders import model_folder

    if named is None:
        return (model_folder(str(run)),) if run is not None else ()
    return tuple(part for part in named.split(",") if part)
