"""What a verb finds in the folder of a run."""

from __future__ import annotations

from pathlib import Path

from qtarget.core.errors import ConfigError


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
