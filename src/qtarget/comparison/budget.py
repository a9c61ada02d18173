"""What fits into the time there is, and what is left out for it, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qtarget.core.errors import ConfigError

FEWEST_SEEDS = 2
"""One seed has no spread, so nothing could be said of its luck."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        contenders: names, the baseline first, in the order of the user's interest.
        rates: the grid, the config's own first.
        seeds: of the final runs.
    """

    contenders: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int

    @property
    def tuning(self) -> int:
        """Runs that choose learning rates: none where there is nothing to choose."""
        return len(self.contenders) * len(self.rates) if len(self.rates) > 1 else 0

    @property
    def final(self) -> int:
        """Runs that judge, where both halves of the rows choose one rate."""
        return len(self.contenders) * self.seeds


def parse_budget(text: str) -> float:
    """Seconds.

    Raises:
        ConfigError: no time.

    Example:
        >>> parse_budget("30m"), parse_budget("1h30m"), parse_budget("90s")
        (1800.0, 5400.0, 90.0)
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not parts or "".join(a + b for a, b in parts) != text.strip() or sum(float(a) for a, _ in parts) <= 0:
        raise ConfigError(f"--budget {text!r} is no time; expected something like 90s, 30m or 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def smaller(plan: Plan) -> Iterator[Plan]:
    """The plan, and ever smaller ones: fewer seeds down to 3, fewer contenders from the end, one rate, 2 seeds."""
    yield plan
    least = min(plan.seeds, 3)
    for seeds in range(plan.seeds - 1, least - 1, -1):
        yield replace(plan, seeds=seeds)
    for rates in dict.fromkeys((plan.rates, plan.rates[:1])):
        for count in range(len(plan.contenders), 1, -1):
            yield replace(plan, contenders=plan.contenders[:count], rates=rates, seeds=least)
    if plan.seeds > FEWEST_SEEDS:
        yield replace(plan, contenders=plan.contenders[:2], rates=plan.rates[:1], seeds=FEWEST_SEEDS)


def fitting(plan: Plan, seconds: float, a_run: float, at_once: int, *, tuned: bool = False) -> Plan:
    """The largest plan that fits.

    Args:
        seconds: left.
        a_run: seconds of one run.
        at_once: runs at a time.
        tuned: whether rates are chosen already, so that only final runs count and the grid stays.

    Raises:
        ConfigError: not even the smallest comparison fits.
    """
    last = plan
    for last in smaller(plan):
        if tuned and last.rates != plan.rates:
            continue
        runs = last.final + (0 if tuned else last.tuning)
        if -(-runs // at_once) * a_run <= seconds:
            return last
    if tuned:  # what was spent on tuning is not thrown away: the smallest comparison is run all the same
        return replace(plan, contenders=plan.contenders[:2], seeds=min(plan.seeds, FEWEST_SEEDS))
    needed = -(-(last.final + last.tuning) // at_once) * a_run
    raise ConfigError(
        f"--budget: {seconds:.0f} s are left, one run takes {a_run:.0f} s, and the smallest comparison (sft and one more, "
        f"one learning rate, {last.seeds} seeds, {at_once} at once) about {needed:.0f} s; allow more time, or fewer max_steps"
    )


def left_out(wanted: Plan, fits: Plan, a_run: float) -> list[str]:
    """What of a plan a smaller one leaves out, and why; a line a kind."""
    why = f"a run takes {a_run:.0f} s"
    lines = []
    if dropped := wanted.contenders[len(fits.contenders) :]:
        lines.append(f"{', '.join(dropped)}: not run; {why}, and --budget has no room")
    if len(fits.rates) < len(wanted.rates):
        lines.append(f"learning rates {_listed(wanted.rates[len(fits.rates) :])}: not tried; {why}")
    if fits.seeds < wanted.seeds:
        lines.append(f"seeds {fits.seeds} to {wanted.seeds - 1}: not run; {why}")
    return lines


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def about(seconds: float) -> str:
    """A time in the unit that people would say it in.

    Example:
        >>> about(42), about(500), about(9000)
        ('about 42 s', 'about 8 min', 'about 2.5 h')
    """
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def mean_seconds(found: Mapping[str, Mapping[str, float]]) -> float:
    """Of a run, over those that are known."""
    known = [one["seconds"] for one in found.values()]
    return sum(known) / len(known)
