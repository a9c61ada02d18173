"""Entry point of the ``qtarget`` command."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from qtarget.cli.boundary import told
from qtarget.cli.options.interrupts import signals_end_it
from qtarget.command import forget
from qtarget.core.errors import MissingDependencyError, QTargetError
from qtarget.storage.files import as_storage_error

CLOSED_PIPE = 141
"""Exit code where whoever read our output has gone (``qtarget ... | head``): what a shell gives for SIGPIPE."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0, or 2 with one readable block where it is known what is wrong, else 1; 130 or 143 after a signal.

    Args:
        arguments: without the program's name; ``sys.argv`` by default. ``--debug`` before the verb keeps tracebacks.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = bool(arguments) and arguments[0] == "--debug"
    if not sys.stderr.isatty():
        # a bar in a file is a line that nobody reads; the libraries look when they are imported, transformers at the hub's
        for library in ("DATASETS", "HUB"):
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    # PEFT 0.21 reads a name that transformers 5 renamed; no user can do anything about it
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    # rows are tokenised whole and cut later; those that stay too long are named by our checks (`beyond_model`), but in a stream
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_not_too_long)
    with signals_end_it():
        try:
            _app()(arguments, prog_name="qtarget")
        except BrokenPipeError:
            # nobody reads: the interpreter's own flush at exit would complain once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(CLOSED_PIPE)
        except Exception as error:
            if debug:
                raise
            known = (
                as_storage_error(error) if isinstance(error, OSError) and not isinstance(error, QTargetError) else None
            )
            text, code = told(known or error, arguments)
            with contextlib.suppress(OSError):  # stderr on the full disk: the exit code says it alone
                print("\n" * bars_are_open() + text, file=sys.stderr, flush=True)
            sys.exit(code)
        finally:
            forget()


def _not_too_long(record: logging.LogRecord) -> bool:
    return "sequence length is longer than the specified maximum" not in record.getMessage()


def bars_are_open() -> bool:
    """Whether a progress bar has the line on which the next words would go on."""
    module = sys.modules.get("tqdm.auto") or sys.modules.get("tqdm")
    return bool(module and len(getattr(module.tqdm, "_instances", ())))


def _app():
    try:
        from qtarget.cli.app import app
    except ModuleNotFoundError as error:
        # a module of ours that is missing is a fault of ours, and no package to install
        if (error.name or "").split(".")[0] == "qtarget":
            raise
        raise MissingDependencyError(
            f"the command line needs {error.name}; run `pip install 'qtarget[train]'`"
        ) from error
    return app


if __name__ == "__main__":
    run()
