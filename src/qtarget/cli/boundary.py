"""One boundary for all verbs: whatever is raised becomes one block that says what, where, and the next step."""

from __future__ import annotations

import errno
import os
import shlex
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from qtarget.core.errors import QTargetError
from qtarget.storage.files import NEXT_STEP

KNOWN, UNKNOWN = 2, 1
"""Exit codes: something that the user can mend, and a fault of ours."""

MEMORY = "lower per_device_train_batch_size or max_length, or take a machine with more memory"
HUB = "name a folder on this machine, or check the network and HF_HUB_OFFLINE"
FILE = "copy or download the file again"

BY_CLASS: dict[str, tuple[str, str]] = {
    "safetensors.SafetensorError": ("a .safetensors file is damaged or cut off", FILE),
    "jinja2.exceptions.TemplateError": (
        "the chat template cannot be rendered",
        "mend the template, or name another one: chat_template_path",
    ),
    "pyarrow.lib.ArrowException": ("an Arrow or Parquet file cannot be read", FILE),
    "huggingface_hub.errors.HfHubHTTPError": ("the hub refuses", HUB),
    "huggingface_hub.errors.OfflineModeIsEnabled": ("the hub cannot be asked", HUB),
    "huggingface_hub.errors.LocalEntryNotFoundError": ("the hub cannot be reached", HUB),
    "huggingface_hub.errors.HFValidationError": ("this is neither a folder nor a hub name", HUB),
    "torch.OutOfMemoryError": ("the device has not enough memory", MEMORY),
    "builtins.MemoryError": ("this machine has not enough memory", MEMORY),
    "builtins.RecursionError": ("something is nested too deep", "look for a value inside itself, or flatten the row"),
    "builtins.UnicodeDecodeError": ("a file is not UTF-8 text", "convert it: iconv -f ENCODING -t UTF-8 OLD > NEW"),
    "json.decoder.JSONDecodeError": ("a JSON file is broken", FILE),
    "yaml.error.YAMLError": ("a YAML file is broken", "mend it at the line that is named"),
    "gzip.BadGzipFile": ("a .gz file is damaged", FILE),
    "zlib.error": ("a compressed file is damaged", FILE),
    "builtins.EOFError": ("a file ends too early", FILE),
    "builtins.ModuleNotFoundError": (
        "a package is missing",
        "install it: pip install 'qtarget[train]', or the package named",
    ),
}
# what is about the disk becomes a StorageError before it gets here
BY_ERRNO: dict[int, tuple[str, str]] = {
    errno.ENOENT: ("a file or folder is not there", "check the path"),
    errno.ENOTDIR: ("a path leads through a file", "check the path"),
    errno.EISDIR: ("a folder stands where a file was expected", "name a file"),
    errno.ENOMEM: ("this machine has not enough memory", MEMORY),
}
BY_WORDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    # torch writes its own archives; a full disk shows as an assertion of the archive's length (2.13)
    (
        ("enforce fail at inline_container", "unexpected pos", "file write failed"),
        "a file could not be written",
        NEXT_STEP,
    ),
    (("not enough memory", "can't allocate memory", "out of memory"), "there is not enough memory", MEMORY),
    (("No space left on device",), "the disk is full", NEXT_STEP),
    (("Exceeds the limit", "integer string conversion"), "a number has thousands of digits", "shorten it, or quote it"),
)
LIBRARIES = (
    "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "huggingface_hub", "pyarrow",
    "torch", "ray", "mosec", "jinja2", "yaml", "matplotlib", "httpx2", "msgspec",
)  # fmt: skip
"""An error that starts in one of these is told in its words, as a refusal of that library."""


def explain(error: BaseException) -> tuple[str, str] | None:
    """What is wrong, and the next step; None for an error that nobody foresaw.

    Example:
        >>> explain(OSError(errno.ENOENT, "No such file or directory", "runs/a"))[0]
        'a file or folder is not there'
    """
    if isinstance(error, OSError) and error.errno in BY_ERRNO:
        return BY_ERRNO[error.errno]
    for words, what, step in BY_WORDS:
        if any(word in str(error) for word in words):
            return what, step
    # by package and class: modules inside a package are its own affair, and they move
    public = {(name.partition(".")[0], name.rpartition(".")[2]): words for name, words in BY_CLASS.items()}
    classes = [(cls.__module__.partition(".")[0], cls.__qualname__) for cls in type(error).__mro__]
    found = next((public[name] for name in classes if name in public), None)
    if found is not None:
        return found
    library = origin(error)
    if library is None:
        return None
    return f"{library} refuses", "change what it names; `qtarget --debug ...` shows where it was raised"


def origin(error: BaseException) -> str | None:
    """The library that an error comes from: the last of ``LIBRARIES`` in its traceback, if no frame of ours is below it."""
    frames = [
        frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    for name in reversed(frames):
        if name == "qtarget":
            break  # our own line raised it, whatever called that line
        if name in LIBRARIES:
            return name
    module = type(error).__module__.partition(".")[0]
    if module in LIBRARIES:
        return module
    # compiled libraries (tokenizers) have no frames, and raise plain exceptions out of the frame that called them
    return "tokenizers" if type(error) is Exception and "tokenizer" in str(error).lower() else None


def told(error: Exception, arguments: Sequence[str]) -> tuple[str, int]:
    """The block that the user sees, and the exit code.

    Args:
        arguments: of the command line, without the program's name.
    """
    if isinstance(error, QTargetError):
        where = "".join(f"\n  where  {note}" for note in notes(error))
        return f"{type(error).__name__}: {error}{where}\n(`qtarget --debug ...` shows where it was raised)", KNOWN
    path = keep_traceback(error)
    found = explain(error)
    command = shlex.join(["qtarget", *arguments])
    if found is None:
        kind = f"{type(error).__name__}: {first_line(error)}"
        return (
            f"`{command}` stopped with an error that qtarget did not foresee: {kind}\n  the traceback is in {path}",
            UNKNOWN,
        )
    what, step = found
    lines = [f"`{command}` stopped: {what}", f"  what   {type(error).__name__}: {first_line(error)}"]
    lines += [f"  where  {note}" for note in notes(error)]
    return "\n".join([*lines, f"  next   {step}", f"  (the traceback is in {path})"]), KNOWN


def notes(error: BaseException) -> Iterator[str]:
    """Where it happened: what was noted on the way up, and the file of an ``OSError``."""
    yield from getattr(error, "__notes__", [])
    name: Any = getattr(error, "filename", None)
    if name is not None and str(name) not in str(error):
        yield str(name)


def first_line(error: BaseException) -> str:
    """Its message, one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def keep_traceback(error: Exception) -> str:
    """Write the traceback into a file of its own, and say where; a full disk leaves it out."""
    try:
        handle, path = tempfile.mkstemp(prefix="qtarget-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            traceback.print_exception(error, file=file)
    except OSError as failed:
        return f"no file, because it could not be written ({failed})"
    return path
