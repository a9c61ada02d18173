"""What a confident flaw of the base does to a ranking: who leans on the base keeps what demonstrations would correct."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qtarget.report.audit.measured import measured

AS_GOOD = 5.0
"""Points of a planted flaw, on average, that a target may correct less than sft does and still count as correcting it."""


def corrected(target: str, *, guard: bool = False) -> float | None:
    """Percent of a planted flaw that it corrected, mean over flaws (`qtarget bench prior`); None where it was not measured."""
    flaws = measured(target)["flawed_prior"].get("flaws", [])
    name = "guarded" if guard else target
    found = [flaw[name] for flaw in flaws if name in flaw]
    return float(np.mean(found)) if found else None


def keeps_flaw(target: str, *, guard: bool = False) -> bool:
    """Whether it is not shown to correct a flaw of the base about as well as sft.

    Example:
        >>> keeps_flaw("sft"), keeps_flaw("dft"), keeps_flaw("dft", guard=True), keeps_flaw("consensus", guard=True)
        (False, True, False, True)
    """
    sft, own = corrected("sft"), corrected(target, guard=guard)
    return target != "sft" and (own is None or sft is None or own < sft - AS_GOOD)


def flaw_words(target: str, *, guard: bool = False) -> str:
    """What was measured of it, beside sft, in words."""
    own = corrected(target, guard=guard)
    if own is None:
        return f"whether {target} corrects a flaw of the base was not measured"
    named = f"{target} with guard" if guard else target
    return f"{named} corrected {own:.0f} % of a planted flaw of the base, sft {corrected('sft'):.0f} %"


def guard_words(names: Iterable[str]) -> str:
    """For which of some targets that keep a flaw ``guard: true`` makes up for it, and for which it does not; may be empty.

    Example:
        >>> guard_words(["sft", "dft", "consensus"])
        '`guard: true` makes up for it in dft, and does not in consensus'
    """
    keeps = [name for name in names if keeps_flaw(name) and corrected(name, guard=True) is not None]
    repaired = [name for name in keeps if not keeps_flaw(name, guard=True)]
    others = [name for name in keeps if name not in repaired]
    if not keeps:
        return ""
    if not repaired:
        return f"`guard: true` does not make up for it in {', '.join(others)}"
    return f"`guard: true` makes up for it in {', '.join(repaired)}" + f", and does not in {', '.join(others)}" * bool(
        others
    )
