"""Entry point of the ``qtarget`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qtarget.core.errors import MissingDependencyError, QTargetError

FAILED = 2


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0, or 2 with one readable block where qtarget knows what is wrong.

    Args:
        arguments: without the program's name; ``sys.argv`` by default. ``--debug`` before the verb keeps tracebacks.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = bool(arguments) and arguments[0] == "--debug"
    try:
        _app()(arguments, prog_name="qtarget")
    except QTargetError as error:
        if debug:
            raise
        print(f"{type(error).__name__}: {error}\n(`qtarget --debug ...` shows where it was raised)", file=sys.stderr)
        sys.exit(FAILED)


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
