"""Targets named on the command line: ``sft,asft(kl_weight=0.1)``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qtarget.cli.options.settings import parse_yaml
from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.core.types import Target


def named_targets(text: str, known: Mapping[str, Callable[[], tuple[str, Target]]]) -> dict[str, Target]:
    """Targets by the name they are shown under.

    Args:
        text: names apart by commas, hyper-parameters in brackets.
        known: names that stand for a target with hyper-parameters; each gives its label and the target.

    Raises:
        ConfigError: brackets that do not close, or values that are no ``key=value``.
        UnknownTargetError, HyperparameterError: as for ``qtarget train``.
    """
    from qtarget.registry import get_target

    out: dict[str, Target] = {}
    # not at the commas inside brackets, which stand between hyper-parameters
    for part in re.split(r",(?![^(]*\))", text):
        match = re.fullmatch(r"\s*([^()\s]+)\s*(?:\(([^()]*)\))?\s*", part)
        if match is None:
            raise ConfigError(f"--targets: {part!r} is no target; expected name or name(key=value, key=value)")
        name, inside = match[1], match[2]
        if inside is None and name in known:
            label, target = known[name]()
            out[label] = target
            continue
        keywords = {}
        if inside is not None:
            pairs = [pair.partition("=") for pair in inside.split(",") if pair.strip()]
            if any(not equals for _, equals, _ in pairs):
                raise ConfigError(f"--targets: {part!r}: expected name(key=value, key=value)")
            keywords = {key.strip(): parse_yaml(value) for key, _, value in pairs}
        out[part.strip()] = get_target(name, **keywords)  # pyright: ignore[reportCallIssue]
    return out
