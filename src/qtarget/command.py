"""The command line that runs, for messages that name the next one: what they print runs as it stands."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path

PLACEHOLDER = "CONFIG.yaml"
"""Of a config, where a library call and no command line is running."""
CALLED_AS = "QTARGET_CALLED_AS"
"""Environment of a process that scores for another: config and overrides of the command line that the user gave."""
FROZEN = (
    "witness", "target", "target_kwargs", "guard", "filter", "max_steps", "num_train_epochs", "learning_rate",
)  # fmt: skip
"""Keys of one training, which say nothing to a frozen model and its copies: `score` refuses some of them."""
_given: ContextVar[tuple[str, tuple[str, ...]]] = ContextVar("given", default=(PLACEHOLDER, ()))
_options: ContextVar[tuple[str, ...]] = ContextVar("options", default=())


def remember(config: str | Path, overrides: Iterable[str] = ()) -> None:
    """Remember the config of this command line and its ``--key value`` overrides, until ``forget``."""
    if CALLED_AS in os.environ:
        config, *overrides = shlex.split(os.environ[CALLED_AS])
    _given.set((str(config), tuple(overrides)))


def forget() -> None:
    """Whoever calls the library later gave no command line."""
    _given.set((PLACEHOLDER, ()))
    _options.set(())


def remember_options(names: Iterable[str]) -> None:
    """Remember the options of the verb that runs, as ``--metric``, until ``forget``."""
    _options.set(tuple(names))


def verb_options() -> tuple[str, ...]:
    """Options of the verb that runs, for messages on a key that may be meant as one of them; none where Python called."""
    return _options.get()


def called_as() -> dict[str, str]:
    """What a process needs in its environment to speak of this command line."""
    config, overrides = _given.get()
    return {CALLED_AS: shlex.join([config, *overrides])}


def _kept(arguments: Iterable[str], without: Iterable[str]) -> Iterable[str]:
    """The arguments but for some options and their values.

    Example:
        >>> list(_kept(["--target", "sft", "--seed=1", "--packing"], {"target"}))
        ['--seed=1', '--packing']
    """
    kept = True
    for argument in arguments:
        if argument.startswith("--"):
            kept = _key(argument) not in without
        if kept:
            yield argument


def _key(option: str) -> str:
    return option[2:].partition("=")[0].replace("-", "_")


def command_for(verb: str, *options: str) -> str:
    """A verb with this command line's config and overrides, quoted for a shell; what ``options`` name replaces an override.

    Example:
        >>> remember("run.yaml", ["--seed", "1", "--target", "dft"])
        >>> command_for("score", "--output", "my cache")
        "qtarget score run.yaml --seed 1 --output 'my cache'"
        >>> command_for("train", "--target", "sft")
        'qtarget train run.yaml --seed 1 --target sft'
        >>> forget()
    """
    config, overrides = _given.get()
    without = {"resume", *(FROZEN if verb == "score" else ()), *(_key(o) for o in options if o.startswith("--"))}
    shortened = [from_here(option) if os.path.isabs(option) else option for option in options]
    return shlex.join(["qtarget", verb, config, *_kept(overrides, without), *shortened])


def crossfit_command(folder: str | Path = "witness") -> str:
    """How copies of the default recipe come about, and how they are named; in words that run as they stand."""
    return (
        f"`{command_for('score', '--crossfit', '2', '--output', str(folder))}`, then add `--witness {quoted(folder)}`"
    )


def quoted(path: str | Path) -> str:
    """A path from here where that is shorter, quoted for a shell."""
    return shlex.quote(from_here(path))


def from_here(path: str | Path) -> str:
    """A path from here where it lies below, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
