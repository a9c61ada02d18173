"""A config of a few lines, each with its reason behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 46
"""Where the reasons begin."""


@dataclass(frozen=True)
class Line:
    """One key of a config, its value, and why it is that."""

    key: str
    value: Any
    why: str = ""


def with_given(lines: Sequence[Line], given: Mapping[str, Any]) -> list[Line]:
    """The lines with the user's own values, in place of those of their keys, or at the end.

    Example:
        >>> with_given([Line("a", 1, "why")], {"a": 2, "b": 3})
        [Line(key='a', value=2, why='yours'), Line(key='b', value=3, why='yours')]
    """
    mine = [Line(line.key, given[line.key], "yours") if line.key in given else line for line in lines]
    known = {line.key for line in lines}
    return mine + [Line(key, value, "yours") for key, value in given.items() if key not in known]


def config_text(lines: Sequence[Line], heading: str) -> str:
    """The file: a heading, then ``key: value  # why``.

    Example:
        >>> print(config_text([Line("learning_rate", 2e-5, "usual")], "Rows.").rstrip())
        # Rows.
        learning_rate: 2.0e-05                        # usual
    """
    out = [f"# {heading}"]
    for line in lines:
        text = f"{line.key}: {scalar(line.value)}"
        out.append(f"{text:<{WIDTH - 2}}  # {line.why}" if line.why else text)
    return "\n".join(out) + "\n"


def scalar(value: Any) -> str:
    """A value as YAML on one line; numbers so that YAML 1.1 and 1.2 read the same."""
    import yaml

    if isinstance(value, float) and not isinstance(value, bool) and value and abs(value) < 0.01:
        return f"{value:.1e}" if float(f"{value:.1e}") == value else f"{value:.16e}"
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()
