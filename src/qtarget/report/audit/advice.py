"""Which target? What the benchmarks of this repository say about data and a base like these, and where they say nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from qtarget.data.checks.findings import Finding

FARTHEST = 0.15
"""Difference of the share of labels that are the base's first choice, beyond which the map says nothing."""
ALIKE = 0.05
"""Difference of that share up to which two bases cannot be told apart."""
RANKED = 3
CLEARLY_WORSE = 5.0
"""Points of accuracy beyond plain SFT's worst at which a target is advised against."""
FEWEST_SCORED_ROWS = 100
"""From here on the standard error of a share is at most 5 points, even if all labels of a row agree: sqrt(0.25 / 100)."""


@dataclass(frozen=True)
class Statement:
    """One ranked or discouraged group of targets, with what it rests on.

    Attributes:
        targets: registry names; several are a tie.
        reason: measured fact of this data, and what the benchmark found, in one sentence.
        evidence: files of this repository, each with what it measured.
    """

    targets: tuple[str, ...]
    reason: str
    evidence: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Advice:
    """The answer to "which target?", for a terminal, JSON (``as_dict``) and a page.

    Attributes:
        verdict: ``suggestion``, or ``not enough evidence``.
        summary: one or two sentences.
        facts: what was measured here; null where there was no cache.
        ranked: best first; empty without enough evidence.
        avoid: targets that failed under the same conditions.
        notes: what to do with this data whatever the target, and what to measure next.
    """

    verdict: str
    summary: str
    facts: Mapping[str, Any]
    ranked: tuple[Statement, ...] = ()
    avoid: tuple[Statement, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """Lists, mappings, text and numbers only."""
        # through JSON, so that tuples are lists already
        return json.loads(json.dumps(asdict(self)))


@cache
def evidence() -> dict[str, Any]:
    """``evidence.json``, which ``scripts/update_evidence.py`` collects from ``benchmarks/results``."""
    return json.loads(files("qtarget.report.audit").joinpath("evidence.json").read_text(encoding="utf-8"))


def facts_of(findings: Sequence[Finding], *, rows: int, teacher: bool) -> dict[str, Any]:
    """The numbers that a suggestion may use.

    Args:
        findings: of the whole audit.
        rows: of the data.
        teacher: whether a teacher is at hand (``teacher``).
    """
    by_name = {found.check: found for found in findings}

    def share(check: str) -> float:
        return round(by_name[check].count / rows, 4) if check in by_name and rows else 0.0

    surprise = dict(by_name["base_surprise"].evidence) if "base_surprise" in by_name else {}
    names = ("mean_surprise", "median_surprise", "mean_entropy", "favourite_share")
    scored = bool(surprise)
    suspected = by_name["surprising_tokens"].evidence["share"] if "surprising_tokens" in by_name else 0.0
    flawed = by_name["flawed_prior"].evidence["share"] if "flawed_prior" in by_name else 0.0
    scored_rows = by_name["base_surprise"].count if scored else 0
    checked = scored and "flawed_prior_unchecked" not in by_name
    return {name: surprise.get(name) for name in names} | {
        "suspected_share": suspected if scored else None,
        "flawed_prior_share": flawed if checked else None,
        "bad_rows": by_name["row_kinds"].count if "row_kinds" in by_name else None,
        "duplicate_share": share("duplicates"),
        "contradictory_share": share("contradictory_duplicates"),
        "rows": rows,
        "scored_rows": scored_rows,
        "teacher": teacher,
    }


def which_target(facts: Mapping[str, Any]) -> Advice:
    """A short ranked suggestion from measured facts, or "not enough evidence".

    The rule: find the points of the noise map (`qtarget bench noise`) whose base knows as much of its rows as this one of
    these. Several bases may: one that knows little of clean rows, and one that knows most of noisy ones. At all of them, rank
    targets by how far they ever fall behind the best one, over all noise that was tried.

    Args:
        facts: of ``facts_of``.
    """
    notes = _notes(facts)
    gap = _what_is_missing(facts)
    if gap is not None:
        return Advice("not enough evidence", f"Not enough evidence: {gap}", facts, notes=notes)
    return Advice("suggestion", *_from_the_map(facts), notes=notes)


def about_target(advice: Advice, target: str) -> list[str]:
    """Advice on one target in two lines: what the user's own rows say, and what the synthetic map alone does.

    Args:
        target: a registry name.
    """
    lines = [f"your rows: {'; '.join(own_evidence(advice.facts)) or 'nothing was measured'}"]
    named = [statement for statement in (*advice.ranked, *advice.avoid) if target in statement.targets]
    if advice.verdict != "suggestion":
        return [*lines, advice.summary]
    best = advice.ranked[0].targets[0]
    if any(statement in advice.avoid for statement in named):
        word = f"advises against {target}: {named[0].reason.rstrip('.')}; it has {best} least behind"
    elif named:
        word = f"has {target} among the {len(advice.ranked)} that fall least behind the best one"
    else:
        word = f"has {best} least behind, and says little of {target}"
    own = "; compare both on validation rows of yours: `qtarget compare`"
    return [*lines, f"the synthetic map alone, no evidence of your rows: it {word}{own}"]


def own_evidence(facts: Mapping[str, Any]) -> list[str]:
    """What was measured on the user's rows, in words."""
    out = []
    if facts["favourite_share"] is not None:
        out.append(f"{facts['favourite_share']:.0%} of the labels are the base's first choice")
    if facts["mean_surprise"] is not None:
        out.append(f"its surprise is {facts['mean_surprise']:.2f} nats a token")
    if facts["suspected_share"]:
        out.append(f"{facts['suspected_share']:.2%} of the labels look suspicious")
    if facts["flawed_prior_share"]:
        out.append(f"on {facts['flawed_prior_share']:.2%} rows agree against a sure base (`guard: true`)")
    return out


def _what_is_missing(facts: Mapping[str, Any]) -> str | None:
    """Why nothing can be suggested, and the next step; None where something can."""
    favourite, scored_rows = facts["favourite_share"], facts["scored_rows"]
    if favourite is None:
        missing = "no cache with top-k" if facts["mean_surprise"] is not None else "no reference cache"
        return (
            f"{missing}, so how much the base already knows is unmeasured. Run `qtarget score CONFIG.yaml` and "
            "audit again."
        )
    if scored_rows < FEWEST_SCORED_ROWS:
        return (
            f"only {scored_rows} rows were scored; below {FEWEST_SCORED_ROWS} the share of labels that are the base's "
            "first choice is known to no better than 5 points. Score more rows and audit again."
        )
    share = _nearest(facts)["favourite_share"]
    if abs(favourite - share) > FARTHEST:
        return (
            f"{favourite:.0%} of the labels are the base's first choice, and the nearest base that targets were compared on "
            f"had {share:.0%}. Train `sft` and one other with equal budgets and compare them on clean held-out rows."
        )
    return None


def _nearest(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The point of the map whose base knows most nearly as much of its rows."""
    points = evidence()["noise_map"]["points"]
    return min(points, key=lambda point: abs(point["favourite_share"] - facts["favourite_share"]))


def _from_the_map(
    facts: Mapping[str, Any],
) -> tuple[str, Mapping[str, Any], tuple[Statement, ...], tuple[Statement, ...]]:
    """Summary, facts, ranked and avoided targets."""
    near, known = _nearest(facts), evidence()["noise_map"]["points"]
    farthest = abs(near["favourite_share"] - facts["favourite_share"]) + ALIKE
    bases = {p["base"] for p in known if abs(p["favourite_share"] - facts["favourite_share"]) <= farthest}
    points = [point for point in known if point["base"] in bases]
    regret = regrets(points)
    avoided = [name for name in regret if regret[name] > regret["sft"] + CLEARLY_WORSE]
    ranked = [name for name in sorted(regret, key=lambda name: regret[name]) if name not in avoided][:RANKED]
    where = (
        f"{facts['favourite_share']:.0%} of the labels are the base's first choice ({near['favourite_share']:.0%} at the "
        "benchmark's nearest point)"
    )
    tried = ", ".join(point_words(point) for point in points)
    best = tuple(
        Statement(
            (name,),
            f"{where}. There {name} was never more than {regret[name]:.1f} points behind the best target ({tried}).",
            (_at(points, name),),
        )
        for name in ranked
    )
    avoid = tuple(
        Statement(
            (name,), f"{regret[name]:.1f} points behind the best target at its worst there.", (_at(points, name),)
        )
        for name in avoided
    )
    summary = (
        f"No verdict on your rows yet. The synthetic map (one family of tasks, a tiny base) has {ranked[0]} least behind where "
        "the base knows as much of its rows: compare it with plain sft on validation rows of yours, `qtarget compare`."
    )
    return summary, facts, best, avoid


def regrets(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How far each target that stands at all points ever is behind the best one, in points of accuracy.

    Example:
        >>> regrets([{"accuracy_percent": {"sft": [50, 0, 0], "dft": [60, 0, 0]}},
        ...          {"accuracy_percent": {"sft": [70, 0, 0], "dft": [0, 0, 0], "asft": [1, 0, 0]}}])
        {'sft': 10, 'dft': 70}
    """
    found = [point["accuracy_percent"] for point in points]
    everywhere = [name for name in found[0] if all(name in accuracy for accuracy in found)]
    best = [max(mean for mean, _, _ in accuracy.values()) for accuracy in found]
    return {
        name: max(top - accuracy[name][0] for top, accuracy in zip(best, found, strict=True)) for name in everywhere
    }


def point_words(point: Mapping[str, Any]) -> str:
    """``base that knows most: 40 % random tokens``."""
    noise = f"{100 * point['rate']:g} % {point['kind'].replace('_', ' ')}" if point["rate"] else "clean rows"
    return f"base that knows {point['base']}: {noise}"


def _at(points: Sequence[Mapping[str, Any]], target: str) -> dict[str, Any]:
    """A target's numbers and sft's, with their file."""
    known = evidence()["noise_map"]
    return {
        "file": known["file"],
        "seeds": known["seeds"],
        "accuracy_percent": {
            point_words(point): {name: point["accuracy_percent"][name] for name in (target, "sft")} for point in points
        },
    }


def _notes(facts: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if facts["duplicate_share"] or facts["contradictory_share"]:
        notes.append(
            f"{facts['duplicate_share']:.1%} of the rows repeat an earlier one and {facts['contradictory_share']:.1%} answer "
            "an earlier prompt differently: correct that in the data; no benchmark here compares targets on it."
        )
    if facts["flawed_prior_share"]:
        notes.append(
            f"on {facts['flawed_prior_share']:.2%} of the labels demonstrations agree against a confident base: a weight or "
            "anchor from this base (dft, p_power, asft, sft_kl, target_sft with the base as teacher) pulls least there: set "
            "`guard: true` (docs/benchmarks.md, `qtarget bench prior`)."
        )
    if facts.get("bad_rows"):
        notes.append(
            f"{facts['bad_rows']:,} rows look bad to the base, and the evidence shows two kinds of rows: `qtarget filter` shows "
            "them, and `filter: auto` leaves them out of any target's training."
        )
    if facts["suspected_share"]:
        notes.append(
            f"{facts['suspected_share']:.2%} of the labels look suspicious: read the examples. How far base surprise can be "
            "trusted on a base like yours: docs/audit.md."
        )
    if facts["teacher"]:
        real = evidence()["real_noise"]
        numbers = "; ".join(f"{d}: target_sft {v['target_sft']}, sft {v['sft']}" for d, v in real["clean_nll"].items())
        notes.append(
            f"a teacher is at hand: not enough evidence that it pays. The one run here ({real['file']}, one seed, clean NLL) "
            f"had {numbers}."
        )
    return tuple(notes)
