"""Entry point of the ``qtarget`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qtarget.cli.options.interrupts import signals_end_it
from qtarget.core.errors import MissingDependencyError, QTargetError
from qtarget.storage.files import as_storage_error

FAILED = 2


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0, or 2 with one readable block where qtarget knows what is wrong; 130 or 143 after a signal.

    Args:
        arguments: without the program's name; ``sys.argv`` by default. ``--debug`` before the verb keeps tracebacks.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = bool(arguments) and arguments[0] == "--debug"
    with signals_end_it():
        try:
            _app()(arguments, prog_name="qtarget")
        except (QTargetError, OSError) as error:
            known = error if isinstance(error, QTargetError) else as_storage_error(error)
            if debug or known is None:
                raise
            print(
                f"{type(known).__name__}: {known}\n(`qtarget --debug ...` shows where it was raised)", file=sys.stderr
            )
            sys.exit(FAILED)


def _app():
    try:
        from qtarget.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "qtarget":
            raise
        raise MissingDependencyError(
            f"the command line needs {error.name}; run `pip install 'qtarget[train]'`"
        ) from error
    return app


if __name__ == "__main__":
    run()
