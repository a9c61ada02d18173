"""What is typed after a verb: the names of its options, for messages on a key that may be meant as one, and numbers."""

from __future__ import annotations

import math
from contextvars import ContextVar

import typer

_options: ContextVar[tuple[str, ...]] = ContextVar("options", default=())


def remember_options(context: typer.Context) -> None:
    """Remember the options of the verb that is about to run, until its context closes.

    Args:
        context: of the application, which knows its verbs.
    """
    verbs = getattr(context.command, "commands", {})
    verb = verbs.get(context.invoked_subcommand)
    names = [name for one in getattr(verb, "params", ()) for name in (*one.opts, *one.secondary_opts)]
    token = _options.set(tuple(name for name in names if name.startswith("--")))
    context.call_on_close(lambda: _options.reset(token))


def verb_options() -> tuple[str, ...]:
    """Options as they are written, ``--metric``; none where Python called."""
    return _options.get()


def finite(value: float) -> float:
    """Refuse ``nan`` and ``inf``, which pass an option's own range: every comparison with NaN is false.

    Raises:
        typer.BadParameter: which the command line words by itself.
    """
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value
