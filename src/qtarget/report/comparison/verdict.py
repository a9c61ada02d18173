"""The verdict in one sentence: who is better than the baseline by more than rows, seeds and the choice of many explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PROBABLE = 0.5
"""Confidence from which a contender is taken though its interval holds 0: it went further than the luckiest of equals does
in one case of two, and waiting for proof has a price too, the gain."""


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        metric: a judge's name, or ``nll``.
        rows, seeds: how many.
        cut_off: whether every contender was stopped in most of its answers.
    """

    metric: str
    rows: int
    seeds: int
    cut_off: bool = False

    @property
    def is_nll(self) -> bool:
        return self.metric == "nll"

    @property
    def certainty(self) -> str:
        """What the intervals are of."""
        if self.seeds == 1:
            return "1 seed, so the 95 % intervals are of the rows alone: another seed may lie outside"
        return f"{self.seeds} seeds; 95 % intervals that hold for all contenders together"


@dataclass(frozen=True)
class Line:
    """One contender's numbers, larger is better.

    Attributes:
        level: mean over seeds and rows.
        difference: ``mean``, ``low`` and ``high`` to the baseline; None for the baseline itself.
        deviation: between seeds.
        confidence: in 0 .. 1, that it is better than the baseline; None where it was not asked.
        enough_rows: with which its gain would be shown; None where more rows alone would not do.
    """

    name: str
    level: float
    difference: Mapping[str, float] | None
    deviation: float = 0.0
    confidence: float | None = None
    enough_rows: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What to do.

    Attributes:
        take: the contender; None where nothing could be told.
        better: all that are better than the baseline, the best first.
    """

    take: str | None
    better: tuple[str, ...]
    sentence: str


def verdict(lines: Sequence[Line], measure: Measure, untrained: Mapping[str, Line]) -> Verdict:
    """The best contender whose interval lies above the baseline, else the best that is probably better, else the baseline.

    Args:
        lines: the baseline first.
        untrained: contender -> the untrained base minus it.

    Example:
        >>> lines = [Line("sft", 0.5, None), Line("dft", 0.6, {"mean": 0.1, "low": 0.02, "high": 0.18})]
        >>> verdict(lines, Measure("exact", 100, 3), {}).sentence
        'dft +10.0 points over sft (+2.0 .. +18.0); stop here'
    """
    baseline, others = lines[0], [line for line in lines if line.difference is not None]
    if not measure.is_nll and not any(line.level for line in (*lines, *untrained.values())):
        step = (
            "most answers are cut off: give more --max-new-tokens"
            if measure.cut_off
            else "choose another --metric, or nll"
        )
        said = f"no model answers one of {measure.rows} rows right by {measure.metric}, so nothing can be told; {step}"
        return Verdict(None, (), said)
    better = [line for line in others if line.difference and line.difference["low"] > 0]
    better.sort(key=lambda line: -line.level)
    # half of all chance lies above 0: of one contender the confidence in no gain at all is one half
    least = 0.0 if measure.is_nll else 1 / measure.rows  # a gain of less than one row is no gain
    probable = [
        line
        for line in others
        if line.difference and line.difference["mean"] > least and (line.confidence or 0.0) >= PROBABLE
    ]
    likely = max(probable, key=lambda line: line.level, default=None)
    if better and measure.seeds > 1:
        take, said = better[0].name, _ahead(better, baseline, measure)
    elif likely and measure.seeds > 1:
        take, said = likely.name, _likely(likely, baseline, measure)
    else:
        take, said = baseline.name, _not_ahead(others, baseline, measure)
    return Verdict(take, tuple(line.name for line in better), _beside_untrained(said, take, untrained, measure))


def _ahead(better: Sequence[Line], baseline: Line, measure: Measure) -> str:
    best = better[0]
    others = [f"{line.name} ({_change(line, measure)})" for line in better[1:]]
    more = f"; also better: {', '.join(others)}" if others else ""
    return f"{best.name} {_change(best, measure, to=baseline.name)}{more}; stop here"


def _likely(line: Line, baseline: Line, measure: Measure) -> str:
    sure = f"confidence {100 * (line.confidence or 0.0):.0f} %"
    said = f"probably {line.name}, {_change(line, measure, to=baseline.name)}, {sure}"
    return f"{said}: take it; {_to_show(line, measure)}"


def _to_show(line: Line, measure: Measure) -> str:
    """What would settle it."""
    if line.enough_rows is None:
        return f"more than {measure.seeds} seeds would be needed to show it"
    return f"about {_rounded(max(line.enough_rows, measure.rows + 1)):,} validation rows would show it"


def _rounded(rows: int) -> int:
    """Up, to one digit: an estimate.

    Example:
        >>> _rounded(104), _rounded(7), _rounded(1900)
        (200, 7, 2000)
    """
    step = 10 ** (len(str(rows)) - 1)
    return -(-rows // step) * step


def _not_ahead(others: Sequence[Line], baseline: Line, measure: Measure) -> str:
    take = f"take {baseline.name}"
    if not others:
        return f"nothing to compare {baseline.name} with: {take}"
    best = max(others, key=lambda line: line.level)
    said = f"the next is {best.name}, {_change(best, measure, to=baseline.name)}"
    if measure.seeds < 2:
        return f"one seed cannot show a difference, for its luck is unknown ({said}): {take}, or run more --seeds"
    if all(line.difference and line.difference["high"] < 0 for line in others):
        return f"{baseline.name} is best ({said}): {take}"
    hope = f"; if it is real, {_to_show(best, measure)}" if best.difference and best.difference["mean"] > 0 else ""
    return f"no difference that {measure.seeds} seeds and {measure.rows} rows can show ({said}): {take}{hope}"


def _beside_untrained(said: str, take: str, untrained: Mapping[str, Line], measure: Measure) -> str:
    """The sentence with what the untrained base does; that it does better comes first."""
    line = untrained.get(take)
    if line is None or line.difference is None or line.difference["mean"] < 0:
        return said
    if line.difference["low"] > 0:
        change = amount(line.difference, measure)
        return (
            f"the untrained base is better than {take} ({change}): these rows do not help it; of the contenders: {said}"
        )
    return f"{said}; the untrained base does as well as that"


def _change(line: Line, measure: Measure, *, to: str | None = None) -> str:
    assert line.difference is not None
    ahead = "over" if line.difference["mean"] > 0 and not measure.is_nll else "against"
    return amount(line.difference, measure, ends=to is not None, to=f" {ahead} {to}" if to else "")


def amount(difference: Mapping[str, float], measure: Measure, *, ends: bool = True, to: str = "") -> str:
    """A difference in words, larger is better: points, or nats a token with the sign that nll has.

    Example:
        >>> amount({"mean": 0.041, "low": 0.012, "high": 0.07}, Measure("exact", 10, 3))
        '+4.1 points (+1.2 .. +7.0)'
        >>> amount({"mean": 0.041, "low": 0.012, "high": 0.07}, Measure("nll", 10, 3))
        '-0.041 nats a token (-0.070 .. -0.012)'
    """
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    if measure.is_nll:
        return f"{_signed(-mean, 3)} nats a token{to}" + (
            f" ({_signed(-high, 3)} .. {_signed(-low, 3)})" if ends else ""
        )
    around = f" ({_signed(100 * low, 1)} .. {_signed(100 * high, 1)})" if ends else ""
    return f"{_signed(100 * mean, 1)} points{to}{around}"


def _signed(value: float, digits: int) -> str:
    """Nothing is neither more nor less.

    Example:
        >>> _signed(0.25, 1), _signed(-0.04, 1)
        ('+0.2', '0.0')
    """
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]
