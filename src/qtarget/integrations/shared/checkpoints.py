"""Checkpoints that were saved to the end, told from those that a kill cut off; and whether one belongs to a run.

The last file of a checkpoint, ``qtarget_complete``, is JSON: what the run is (``belongs``), and the size of every file
(``files``). Earlier versions wrote a line of text there: such a checkpoint is whole, and nothing says what it belongs to.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from qtarget.core.errors import ResumeError
from qtarget.storage.files import write_json

logger = logging.get_logger(__name__)

COMPLETE_MARK = "qtarget_complete"
"""Written last into a checkpoint folder: without it the checkpoint was cut off while being saved."""
REPLACED = "earlier_checkpoints"
"""Where a whole checkpoint goes that a run replaces."""
STATE = "trainer_state.json"
RESTORED = {"optimizer": "optimizer state", "scheduler": "learning rate schedule", "rng_state": "random state"}
"""Files, by how their names begin, without which a run goes on differently, but goes on."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
MAY_CHANGE = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
)  # fmt: skip
"""What may differ between a checkpoint and the run that goes on from it; the log says so."""


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was saved to the end; one cut off by a kill is passed over."""
    found = [p.parent for p in Path(output_dir).glob(f"checkpoint-*/{COMPLETE_MARK}")]
    steps = [(int(p.name.rsplit("-", 1)[1]), p) for p in found if p.name.rsplit("-", 1)[1].isdigit()]
    return str(max(steps)[1]) if steps else None


def safe_checkpoint(output_dir: str | Path) -> str:
    """The end of an error that stops a run: which checkpoint is safe; nothing where there is none."""
    last = last_complete_checkpoint(output_dir)
    return "" if last is None else f"; {Path(last).name} is untouched"


def make_room(folder: Path) -> None:
    """Take away what lies where a checkpoint is about to be saved: a cut-off one goes, a whole one is moved."""
    if not folder.is_dir():
        return
    if not (folder / COMPLETE_MARK).is_file():
        shutil.rmtree(folder)
        return
    place = folder.parent / REPLACED
    number = sum(1 for _ in place.glob(f"{folder.name}-*")) + 1 if place.is_dir() else 1
    place.mkdir(exist_ok=True)
    folder.rename(place / f"{folder.name}-{number}")
    logger.warning(f"{folder} is saved again; the earlier one is {place / folder.name}-{number}")


def seal(folder: Path, belongs: Mapping[str, Any]) -> None:
    """Write the mark: the checkpoint is whole, and of this run."""
    write_json(folder / COMPLETE_MARK, {"format": 1, "belongs": dict(belongs), "files": sizes(folder)})


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint, by its path in it, but of its card, which people edit."""
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (COMPLETE_MARK, "README.md")
    )
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def check_checkpoint(
    folder: str | Path, belongs: Mapping[str, Any], *, force: bool = False, plain: bool = True, rank: int | None = None
) -> None:
    """Raise where a run cannot go on from a checkpoint, or would go on as another one; writes and loads nothing.

    Args:
        belongs: what the run is, as ``seal`` was given it.
        force: go on with another run's checkpoint, and without its optimizer or random state; the log says what differs.
        plain: the checkpoint has transformers' files; FSDP and DeepSpeed write others.
        rank: whose random state must be there, of several processes.

    Raises:
        ResumeError: names what is missing, damaged or different, and the next step.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ResumeError(f"{folder} is no folder; expected a checkpoint, something like output_dir/checkpoint-100")
    mark = read_mark(folder)
    check_whole(folder, mark)
    lacking = missing_states(folder, mark, rank) if plain else []
    differing = differences(mark.get("belongs"), belongs)
    if mark.get("belongs") is None:
        unknown = "no word on which run it is of"
        if not (folder / COMPLETE_MARK).is_file():
            differing.append(
                f"it has no {COMPLETE_MARK}: it was cut off, or saved by another trainer, and has {unknown}"
            )
        else:
            logger.warning(f"{folder} is of an earlier version of qtarget and has {unknown}; going on from it")
    problems = [*(f"it has no {what}" for what in lacking), *differing]
    if problems and not force:
        raise ResumeError(
            f"{folder} cannot be gone on from as the same run: {'; '.join(problems)}. Set these back, or start a new run "
            f"from its weights (model_name_or_path: {folder}, another output_dir), or go on all the same: --resume force "
            "(Python: train(..., force_resume=True)); optimizer and learning rate then stay the checkpoint's, where it has "
            "them"
        )
    for problem in problems:
        logger.warning(f"going on from {folder} by force: {problem}")
    for name in MAY_CHANGE:
        then, now = (mark.get("belongs") or {}).get(name), belongs.get(name)
        if then is not None and then != now:
            logger.warning(f"going on from {folder}: {name} was {then}, is {now}")


def read_mark(folder: Path) -> dict[str, Any]:
    """What a checkpoint's mark says; nothing where it has none, or an earlier version's."""
    path = folder / COMPLETE_MARK
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("{"):
        return {}
    try:
        return json.loads(text)
    except ValueError as error:
        raise damaged(folder, f"{COMPLETE_MARK} is not JSON ({error})") from error


def check_whole(folder: Path, mark: Mapping[str, Any]) -> None:
    """Raise where weights or the trainer's state are missing or cut off.

    Raises:
        ResumeError: names the file.
    """
    for name, size in mark.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            if not any(path.name.startswith(part) for part in RESTORED):
                raise damaged(folder, f"{name} is missing")
        elif path.stat().st_size != size and name != STATE:
            raise damaged(folder, f"{name} has {path.stat().st_size:,} bytes, and was saved with {size:,}")
    try:
        step_of(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"{STATE} cannot be read ({type(error).__name__}: {error})") from error
    for path in (path for pattern in WEIGHTS for path in folder.glob(pattern)):
        check_weights(folder, path)
    for path in (path for part in RESTORED for path in folder.glob(f"{part}*") if path.is_file()):
        if not zipfile.is_zipfile(path):
            raise damaged(folder, f"{path.name} is cut off")


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was saved."""
    return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"])


def check_weights(folder: Path, path: Path) -> None:
    """Raise where a file of weights is cut off: its head says how long it is.

    Raises:
        ResumeError: see above.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        if not zipfile.is_zipfile(path):
            raise damaged(folder, f"{path.name} is cut off")
        return
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise damaged(folder, f"{path.name} is cut off or no safetensors file ({error})") from error


def damaged(folder: Path, what: str) -> ResumeError:
    """The error of a checkpoint that nobody can go on from, with the one before it as a way out."""
    others = sorted(
        (int(path.parent.name.rsplit("-", 1)[1]), str(path.parent))
        for path in folder.parent.glob(f"checkpoint-*/{COMPLETE_MARK}")
        if path.parent.name.rsplit("-", 1)[1].isdigit() and path.parent.resolve() != folder.resolve()
    )
    way = f"go on from {others[-1][1]} (delete {folder})" if others else f"delete {folder} and start anew"
    return ResumeError(f"{folder} is damaged: {what}; {way}")


def missing_states(folder: Path, mark: Mapping[str, Any], rank: int | None) -> list[str]:
    """What a run would silently begin anew: optimizer, schedule, random numbers; in words."""
    random = "rng_state.pth" if rank is None else f"rng_state_{rank}.pth"
    names = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "rng_state": random}
    lacking = [part for part, name in names.items() if not (folder / name).is_file()]
    only_model = mark and not any(name in names.values() for name in mark.get("files", {}))
    why = " (saved with save_only_model)" if only_model else ""
    return [f"{RESTORED[part]}, {names[part]}{why}" for part in lacking]


def differences(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Each thing that a checkpoint's run had otherwise, in words; what one of them does not know is passed over."""
    then = then or {}
    return [
        f"{name} was {shown(then[name])}, is {shown(value)}"
        for name, value in now.items()
        if name in then and name not in MAY_CHANGE and then[name] != value
    ]


def shown(value: Any) -> str:
    """A value for a message; of a fingerprint the beginning."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:10]}..." if len(text) == 32 and all(c in "0123456789abcdef" for c in text) else text
