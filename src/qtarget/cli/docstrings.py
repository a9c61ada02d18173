"""What a target's docstring says: its form, its arguments, where it comes from."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Described:
    """A target in the words of its class.

    Attributes:
        form: what it computes.
        arguments: hyper-parameter -> its meaning.
        reference: where it comes from.
        deviations: what is different there.
    """

    form: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    reference: str = ""
    deviations: str = ""


SECTIONS = ("Args:", "Raises:", "Example:", "Attributes:", "Returns:", "Reference:")


def described(text: str | None) -> Described:
    """Read a docstring in the style of this project.

    Example:
        >>> found = described('''``L = -w log p_y``.
        ...
        ... Args:
        ...     alpha: exponent, at
        ...         least 0.
        ...
        ... Reference: arXiv 1234.56789. Deviations: none.
        ... ''')
        >>> found.form, found.arguments, found.reference, found.deviations
        ('``L = -w log p_y``.', {'alpha': 'exponent, at least 0.'}, 'arXiv 1234.56789', 'none.')
    """
    parts: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(text or "").splitlines():
        if (name := next((name for name in SECTIONS if line.startswith(name)), None)) is not None:
            current, line = name, line.removeprefix(name).strip()
        parts.setdefault(current, []).append(line)
    reference, _, deviations = _joined(parts.get("Reference:", [])).partition("Deviations:")
    return Described(
        _joined(parts[""]), _arguments(parts.get("Args:", [])), reference.strip().removesuffix("."), deviations.strip()
    )


def _joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def _arguments(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    key = ""
    for line in lines:
        match = re.fullmatch(r" {4}(\w+): (.*)", line)
        if match is not None:
            key = match[1]
            found[key] = match[2]
        elif key and line.strip():
            found[key] += " " + line.strip()
    return found
