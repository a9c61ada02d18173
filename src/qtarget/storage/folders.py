"""Whose a folder is: no verb writes over what it reads, or into what is not its own.

Folders that qtarget makes carry a marker, ``.qtarget``: their kind, the version and the verb that made them. Folders of
versions without markers are known by what lies in them.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qtarget.core.errors import ConfigError
from qtarget.storage.files import TEMPORARY, storage_errors, write_json
from qtarget.storage.locks import LOCK, locked

MARKER = ".qtarget"
FORMAT = 1
CACHE, RUN, MODEL, EXPORT, DEMO = "cache", "run", "model", "export", "demo"
FILTER, COMPARISON = "filter", "comparison"
KNOWN_BY: Mapping[str, tuple[str, ...]] = {
    CACHE: ("manifest.json", "plan.json"),
    RUN: ("train_summary.json", "qtarget_run.json", "checkpoint-*/qtarget_complete"),
    DEMO: ("results.json",),
    MODEL: ("config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin"),
}
"""What tells folders without a marker apart: the first kind of which a file is there."""
NAMES = {
    CACHE: "a cache",
    RUN: "a training run",
    MODEL: "a model",
    EXPORT: "an exported cache",
    DEMO: "a demo's results",
    FILTER: "filtered rows",
    COMPARISON: "a comparison",
}
NEAR_WORD = 0.75
"""How like a folder's name and a word without a slash are, from 0 to 1, for the word to be no hub's."""
PASSED_OVER = (
    ".decoded", LOCK, f"{LOCK}.*", f"*{TEMPORARY}", "lost+found", ".DS_Store", ".gitkeep", ".gitignore", ".nfs*", ".snapshot",
    "*.log", "*.out", "*.err",
)  # fmt: skip
"""Names that make no folder somebody's: leftovers, file systems' own, and what a launcher logs beside a run."""


@contextmanager
def owned(
    folder: str | Path,
    kind: str,
    *,
    option: str = "--output",
    inputs: Iterable[str | Path | None] = (),
    beside: Iterable[str | Path] = (),
) -> Iterator[Path]:
    """Hold a folder of one kind for writing: checked, made, locked and marked.

    Args:
        kind: ``cache``, ``run``, ``export``, ``demo`` or ``comparison``.
        option: what names the folder, for messages.
        inputs: files and folders that are read.
        beside: files that may lie in it, as a run's config.

    Raises:
        ConfigError: see ``check_folder``, or another process holds the folder.
        StorageError: it cannot be written to.
    """
    path = check_folder(folder, kind, option=option, inputs=inputs, beside=beside)
    existed = path.exists()
    make_folder(path, option)
    try:
        with locked(path):
            mark_folder(path, kind)
            yield path
    except BaseException:
        if not existed and [found.name for found in path.iterdir()] == [MARKER]:  # what was refused leaves nothing
            (path / MARKER).unlink()
            path.rmdir()
        raise


def check_folder(
    folder: str | Path,
    kind: str,
    *,
    option: str = "--output",
    inputs: Iterable[str | Path | None] = (),
    beside: Iterable[str | Path] = (),
) -> Path:
    """Raise where a folder of one kind must not be written; writes nothing.

    Raises:
        ConfigError: it is, holds or lies in what is read, it is no folder, of another kind, or somebody else's.
    """
    path = Path(folder)
    refuse_overlap(path, inputs, option)
    if not path.exists():
        return path
    if not path.is_dir():
        raise ConfigError(f"{option} {path} is a file; name a folder")
    found = kind_of(path)
    if found not in (None, kind):
        raise ConfigError(
            f"{option} {path} holds {NAMES.get(found, found)}, and {NAMES[kind]} would be written over it; choose another "
            "folder"
        )
    if found is None and (foreign := foreign_names(path, beside)):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConfigError(
            f"{option} {path} holds what qtarget did not write ({', '.join(foreign[:3])}{more}); choose a new or empty "
            "folder"
        )
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all: written beside its place, and renamed when the block ends without an error.

    transformers writes config.json before the weights (``save_pretrained``, 5.23), so a folder with a config may have been
    cut off; whoever takes its presence for "done" must get it by a rename. What a kill left beside is cleared.

    Args:
        path: the place; nothing, or an empty folder.

    Raises:
        ConfigError: another process writes there.
        StorageError: the disk is full, or the folder cannot be written to.
    """
    beside = path.with_name(path.name + TEMPORARY)
    make_folder(beside)
    try:
        with storage_errors(path), locked(beside):
            for found in beside.iterdir():
                if found.name != LOCK:
                    shutil.rmtree(found) if found.is_dir() and not found.is_symlink() else found.unlink()
            yield beside
        with storage_errors(path):
            os.replace(beside, path)
    except BaseException:
        if not (beside / LOCK).exists():  # else it is another process's
            shutil.rmtree(beside, ignore_errors=True)
        raise


def make_folder(path: Path, option: str = "--output") -> None:
    """Make a folder and those above it.

    Raises:
        ConfigError: there is a file in the way, or no right to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be made: {error.strerror}; choose another folder") from error


def mark_folder(path: Path, kind: str) -> None:
    """Leave the marker, unless it is there."""
    from qtarget import __version__

    if read_marker(path).get("kind") != kind:
        write_json(path / MARKER, {"kind": kind, "format": FORMAT, "version": __version__, "made_by": "qtarget"})


def read_marker(path: Path) -> dict[str, Any]:
    """What a marker says; nothing where there is none that can be read."""
    try:
        found = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def kind_of(path: Path) -> str | None:
    """What a folder is: by its marker, else by its files; None for an empty or foreign one."""
    if marked := read_marker(path).get("kind"):
        return str(marked)
    for kind, names in KNOWN_BY.items():
        if any(_is_ours(kind, found) for name in names for found in path.glob(name)):
            return kind
    return None


def _is_ours(kind: str, path: Path) -> bool:
    """Whether a file of a common name is really of that kind."""
    keys = {CACHE: ("shards", "vocab_size"), DEMO: ("benchmark",)}.get(kind)
    if keys is None:
        return True
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind == CACHE and any(path.parent.glob("shard-*"))
    return isinstance(found, dict) and all(key in found for key in keys)


def foreign_names(path: Path, beside: Iterable[str | Path] = ()) -> list[str]:
    """Names in a folder that make it somebody's, in their order."""
    own = {os.path.realpath(other) for other in beside}
    return sorted(
        found.name
        for found in path.iterdir()
        if not any(fnmatch(found.name, pattern) for pattern in PASSED_OVER)
        and os.path.realpath(found) not in own
        and not (found.is_dir() and kind_of(found) == CACHE)  # of a teacher that was scored before the run began
    )


def missing_folder(name: str, places: Sequence[Path] = (Path(),)) -> str | None:
    """What to say of a model's folder that is not there, with those of like names; None for what may be a hub's name.

    Args:
        places: where it is looked for.

    Example:
        >>> missing_folder("owner/name"), missing_folder("/nowhere/model")
        (None, 'there is no folder /nowhere/model; check the path, or give the name of a model on the hub')
    """
    path = Path(name).expanduser()
    found = [place / path for place in places]
    inside = any("/" in name and one.parent.is_dir() for one in found)
    if any(one.exists() for one in found) or "://" in name:
        return None
    if not (name.startswith((".", "/", "~")) or name.count("/") > 1 or inside):
        return _mistyped(name, found)
    looked = list(dict.fromkeys(str(place.resolve()) for place in places))
    where = "" if path.is_absolute() else f" in {' or in '.join(looked)}"
    near = list({os.path.realpath(like): like for one in found for like in near_folders(one)}.values())
    hint = f"did you mean {' or '.join(near)}?" if near else "check the path, or give the name of a model on the hub"
    return f"there is no folder {name}{where}; {hint}"


def _mistyped(name: str, found: Sequence[Path]) -> str | None:
    """What to say of a word that may be a hub's name, where a model's folder of nearly that name is there.

    The hub's own are OWNER/NAME, but for a few old ones; asking it for a folder's name takes half a minute offline.
    """
    if "/" in name:
        return None
    near = [
        like for one in found for like in near_folders(one, NEAR_WORD) if kind_of(Path(like)) in (MODEL, RUN, CACHE)
    ]
    near = list({os.path.realpath(like): like for like in near}.values())
    if not near or _is_downloaded(name):
        return None
    return f"there is no folder {name}; did you mean {' or '.join(near)}? A model on the hub is OWNER/NAME"


def _is_downloaded(name: str) -> bool:
    """Whether the hub's cache on this machine has a model of that name."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # HFValidationError: no name that the hub could have
        return False


def near_folders(path: Path, cutoff: float = 0.6) -> list[str]:
    """Folders named like the first part of a path that is not there, beside where it would be.

    Args:
        cutoff: difflib's, how like from 0 to 1.
    """
    gone = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    if not gone.parent.is_dir() or not os.access(gone.parent, os.R_OK):
        return []
    beside = sorted(found.name for found in gone.parent.iterdir() if found.is_dir())
    return [str(gone.parent / like) for like in difflib.get_close_matches(gone.name, beside, cutoff=cutoff)]


def refuse_overlap(output: str | Path, inputs: Iterable[str | Path | None], option: str = "--output") -> None:
    """Raise where an output is an input, lies in one, or holds one; links and spellings of one name are seen through.

    Args:
        inputs: files and folders; names of nothing that exists here (a hub's) are passed over.

    Raises:
        ConfigError: names both.
    """
    for source in inputs:
        if source is None or not os.path.exists(source):
            continue
        if is_same(output, source):
            where = "is"
        elif is_inside(output, source):
            where = "lies in"
        elif is_inside(source, output):
            where = "holds"
        else:
            continue
        raise ConfigError(f"{option} {output} {where} {source}, which is read here; choose another path")


def is_same(one: str | Path, other: str | Path) -> bool:
    """Whether two paths are one file or folder: also by links, hard links, or a name in other letters where that is one."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, there or not, lies below a folder."""
    return os.path.isdir(folder) and any(is_same(above, folder) for above in Path(os.path.realpath(path)).parents)
