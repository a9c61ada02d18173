"""Who is compared: runs, checkpoints, model folders and hub names, each with the untrained base that it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtarget.core.errors import ConfigError
from qtarget.report.runs.records import CONFIG_FILE, RUN_FILE, is_run
from qtarget.storage.files import digest
from qtarget.storage.folders import missing_folder
from qtarget.storage.models import adapter_base

WHOLE, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.bin", WHOLE, ADAPTER)
MOVED = "; if it has moved, pass --base MODEL"
"""What to do about the base that a run records and that is not there."""


@dataclass(frozen=True)
class Contender:
    """One model of the table.

    Attributes:
        name: in the table.
        model: folder (of a model or a PEFT adapter) or hub name, as ``from_pretrained`` takes it.
        tokenizer: where the tokenizer is.
        base: ``model`` of the untrained base; None where nobody knows it, or it is a base itself.
        settings: of the run: what its rows become.
        revision: of a model on the hub.
        notes: what a reader of its numbers must know.
    """

    name: str
    model: str
    tokenizer: str
    base: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    base_revision: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter, to be put on its base."""
        return adapter_base(self.model) is not None


def find_contenders(names: Sequence[str], base: str | None = None) -> list[Contender]:
    """The untrained bases, and then what was named, in that order; nothing is loaded.

    Args:
        base: of all that is named; default: what the runs record.

    Raises:
        ConfigError: there is no such run, one is named twice, or its base is unknown.
    """
    trained = [find_contender(name) for name in names]
    places = [_place(one.model) for one in trained]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise ConfigError(f"{names[places.index(place)]} and {names[i]} are one model; name it once")
    if base is not None:
        refuse_missing(base, "--base")
        base = model_folder(base)
        trained = [replace(one, base=base, base_revision=None) for one in trained]
    for one in trained:
        if one.base is not None:
            refuse_missing(one.base, f"the base of {one.name}", MOVED)
    trained = [
        replace(one, base=None) if one.base and _place(one.base) == _place(one.model) else one for one in trained
    ]
    bases = _bases(trained, base)
    known = {_place(one.model) for one in bases}
    others = [one for one in trained if _place(one.model) not in known]
    for one in others:
        if one.base is None and not bases:
            raise ConfigError(
                f"which base is {one.name} compared with: it records none; pass --base MODEL (--base {one.name} evaluates it "
                "alone)"
            )
    lone = bases[0].model if len(bases) == 1 else None
    others = [replace(one, base=one.base or lone) for one in others]
    if unknown := [one.name for one in others if one.base is None]:
        raise ConfigError(f"which base is {unknown[0]} compared with: it records none; pass --base MODEL")
    return _named([*bases, *others])


def _bases(trained: Sequence[Contender], base: str | None) -> list[Contender]:
    """One contender a base; rows become what they are for the first run that came from it."""
    found: dict[str, Contender] = {}
    for one in trained:
        if one.base is not None and _place(one.base) not in found:
            found[_place(one.base)] = Contender(
                Path(one.base).name or one.base, one.base, one.tokenizer, None, one.settings, one.base_revision
            )
    if base is not None and not found:
        found[_place(base)] = find_contender(base)
    return list(found.values())


def _named(contenders: Sequence[Contender]) -> list[Contender]:
    """Names that tell them apart: as given, a base by the end of its path."""
    names = [one.name for one in contenders]
    return [
        replace(one, name=one.name if names.count(one.name) == 1 else one.model)
        for one in contenders
    ]  # fmt: skip


def _place(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def find_contender(name: str) -> Contender:
    """What a name stands for, with what its run recorded; nothing is loaded.

    Raises:
        ConfigError: there is no such folder, or nothing in it.
    """
    refuse_missing(name, "RUN_OR_MODEL")
    path = Path(name)
    if not path.is_dir():
        return Contender(name, name, name)
    model = model_folder(name)
    run = next((folder for folder in (path, path.parent) if is_run(folder)), None)
    settings = _settings(run) if run is not None else {}
    base = settings.get("model_name_or_path") or adapter_base(model)
    tokenizer = next((str(folder) for folder in (Path(model), path, run) if folder and _has_tokenizer(folder)), None)
    if tokenizer is None and base is None:
        raise ConfigError(f"{name} has no tokenizer; save one beside the model (tokenizer.save_pretrained)")
    notes = () if model == str(path) else (f"{Path(model).name}, the newest checkpoint: the run holds no final model",)
    return Contender(
        name.rstrip("/"), model, tokenizer or str(base), base, settings, base_revision=settings.get("model_revision"),
        notes=notes,
    )  # fmt: skip


def recorded_rows(contenders: Sequence[Contender]) -> Path:
    """The validation file that the runs record.

    Raises:
        ConfigError: there is none, or runs record different ones.
    """
    recorded = [file for one in contenders if (file := one.settings.get("validation_file")) is not None]
    files = dict.fromkeys(str(part) for file in recorded for part in (file if isinstance(file, list) else [file]))
    if len(files) != 1:
        why = "the runs record none" if not files else f"the runs record several, {', '.join(files)}"
        raise ConfigError(f"which rows are the models asked: {why}; pass --data ROWS")
    return Path(next(iter(files)))


def model_folder(name: str) -> str:
    """The folder of a run's model: itself where the final model is there, else its newest whole checkpoint.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if not path.is_dir() or any((path / file).is_file() for file in (WHOLE, ADAPTER)):
        return str(path) if path.is_dir() else name
    from qtarget.integrations.shared.checkpoints import last_complete_checkpoint
    from qtarget.report.runs.document import find_checkpoints

    found = last_complete_checkpoint(path) or next((str(f) for _, f in reversed(find_checkpoints(path))), None)
    if found is None:
        raise ConfigError(
            f"{name} holds neither a model ({WHOLE}, {ADAPTER}) nor a checkpoint; expected the output_dir of `qtarget "
            "train`, a model's folder or a hub name"
        )
    return found


def refuse_missing(name: str, what: str, hint: str = "") -> None:
    """Raise for a file, and for what can only be a folder and is nowhere.

    Args:
        what: the name is of.
        hint: what else to do.

    Raises:
        ConfigError: see the message.
    """
    if Path(name).is_file():
        raise ConfigError(f"{what}: {name} is a file; expected a folder, or a hub name")
    if (words := missing_folder(name)) is not None:
        raise ConfigError(f"{what}: {words}{hint}")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def _settings(run: Path) -> dict[str, Any]:
    """What a run recorded of itself: its config, or where training was cut off, the record written at its beginning.

    Raises:
        ConfigError: the record is broken.
    """
    import yaml

    try:
        if (run / CONFIG_FILE).is_file():
            found = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
        else:
            record = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
            found = {**record["settings"], "model_name_or_path": record["model"]["name"]}
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{run}: its record cannot be read ({error}); was it cut off? Name a model's folder"
        ) from error


def weights_digest(contender: Contender) -> str:
    """Of names, sizes and times of a model's files: whether it is the same as when an evaluation began."""
    folder = Path(contender.model)
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}) if folder.is_dir() else []
    known = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return digest(json.dumps([contender.model if not files else "", known]).encode())
