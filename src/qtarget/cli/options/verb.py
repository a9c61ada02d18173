"""Options of the verb that runs, for messages on a key that may be meant as one of them."""

from __future__ import annotations

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
