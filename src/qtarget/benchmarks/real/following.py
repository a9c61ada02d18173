"""Instruction following as cells of a table, in percent, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qtarget.benchmarks.real.instructions import MEASURES, share_percent
from qtarget.benchmarks.tables import with_ends

WHOLE = "prompt_strict"
"""What contenders are compared by: all instructions of a prompt."""
HEADS = [name.replace("_", ", ") for name in MEASURES]
Followed = Mapping[str, Any]
"""What ``instruction_following`` found of one model."""


def followed_cells(runs: Sequence[Followed], asked: Sequence[int]) -> list[str]:
    """A cell a measure."""
    found = ((name, [run[name] for run in runs]) for name in MEASURES)
    return [with_ends(share_percent(counts, [1] * len(asked) if "prompt" in name else asked)) for name, counts in found]


def gained_cell(runs: Sequence[Followed], baseline: Sequence[Followed]) -> str:
    """Points above a baseline, paired prompt by prompt."""
    counts, before = ([run[WHOLE] for run in some] for some in (runs, baseline))
    return with_ends(share_percent(counts, [1] * len(counts[0]), before), "+.1f", "+.0f")


def ended_cell(runs: Sequence[Followed]) -> str:
    """What share of the answers came to an end."""
    return f"{100 * fmean(fmean(run['ended']) for run in runs):.0f}"
