"""Which target? What the benchmarks of this repository say about data and a base like these, and where they say nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from qtarget.data.findings import Finding
from qtarget.report.noise_checks import KNOWS_TOO_LITTLE

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
        return json.loads(json.dumps(asdict(self)))


@cache
def evidence() -> dict[str, Any]:
    """``evidence.json``, which ``scripts/update_evidence.py`` collects from ``benchmarks/results``."""
    return json.loads(files("qtarget.report").joinpath("evidence.json").read_text(encoding="utf-8"))


def facts_of(findings: Sequence[Finding], *, rows: int, teacher: bool) -> dict[str, Any]:
    """The numbers that a suggestion may use.

    Args:
        findings: of the whole audit.
        rows: of the data.
        teacher: whether a teacher is at hand (``teacher_cache`` or ``teacher_model_name_or_path``).
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
        "duplicate_share": share("duplicates"),
        "contradictory_share": share("contradictory_duplicates"),
        "rows": rows,
        "scored_rows": scored_rows,
        "teacher": teacher,
    }


def which_target(facts: Mapping[str, Any]) -> Advice:
    """A short ranked suggestion from measured facts, or "not enough evidence".

    Args:
        facts: of ``facts_of``. Up to ``KNOWS_TOO_LITTLE`` the demo speaks (0.17 there); above, no benchmark of targets.
    """
    notes = _notes(facts)
    gap = _what_is_missing(facts)
    if gap is not None:
        return Advice("not enough evidence", f"Not enough evidence: {gap}", facts, notes=notes)
    return Advice("suggestion", *_new_format(facts), notes=notes)


def _what_is_missing(facts: Mapping[str, Any]) -> str | None:
    """Why nothing can be suggested, and the next step; None where something can."""
    favourite, scored_rows = facts["favourite_share"], facts["scored_rows"]
    if favourite is None:
        missing = "no cache with top-k" if facts["mean_surprise"] is not None else "no reference cache"
        return (
            f"{missing}, so how much the base already knows is unmeasured. Run `qtarget score CONFIG.yaml --top_k 8` and "
            "audit again."
        )
    if scored_rows < FEWEST_SCORED_ROWS:
        return (
            f"only {scored_rows} rows were scored; below {FEWEST_SCORED_ROWS} the share of labels that are the base's "
            "first choice is known to no better than 5 points. Score more rows and audit again."
        )
    if favourite >= KNOWS_TOO_LITTLE:
        return (
            f"{favourite:.0%} of the labels are the base's first choice, so it can already answer in part, and no benchmark "
            "in this repository compares targets on such a base. Train `sft` and one other with equal budgets and compare "
            "them on clean held-out rows."
        )
    return None


def _new_format(
    facts: Mapping[str, Any],
) -> tuple[str, Mapping[str, Any], tuple[Statement, ...], tuple[Statement, ...]]:
    """The base would write something else nearly everywhere, as on the demo's rows."""
    known = evidence()
    demo = known["demo"]
    accuracy, kept = demo["accuracy_percent"], demo["kept_percent"]
    best = max(mean for mean, _, _ in accuracy.values())
    tied = sorted((name for name, (_, _, high) in accuracy.items() if high >= best), key=lambda name: -kept[name])
    like = known["audit_noise"]["settings"]["unknown_format, random_tokens 0.2"]["favourite_share"]
    ranked = Statement(
        tuple(tied),
        f"{facts['favourite_share']:.0%} of the labels are the base's first choice ({like:.0%} on the benchmark's rows), "
        f"so it does not know this format yet. With {demo['noise']} on {demo['rows']} rows and {demo['seeds']} seeds these "
        f"tie in exact completion ({', '.join(f'{name} {accuracy[name][0]} %' for name in tied)}); they are ordered by how "
        f"much of the base's other skills they kept ({', '.join(f'{kept[name]} %' for name in tied)}).",
        (_numbers(demo, tied),),
    )
    summary = (
        f"Start with {tied[0]} or plain sft: no target here was shown to beat sft on a base that does not know the format. "
        "This is one synthetic benchmark; compare on clean held-out rows of yours."
    )
    return summary, facts, (ranked,), _avoided(known, tied)


def _avoided(known: Mapping[str, Any], tied: Sequence[str]) -> tuple[Statement, ...]:
    """Targets worse than sft in every seed of the demo, then those that taught nothing there."""
    demo, dropped, real = known["demo"], known["demo_dropped"], known["real_noise"]
    accuracy, accuracy_dropped = demo["accuracy_percent"], dropped["accuracy_percent"]
    failed = [name for name, (mean, _, _) in accuracy.items() if mean <= demo["untrained"]]
    failed_dropped = [name for name, (mean, _, _) in accuracy_dropped.items() if mean <= dropped["untrained"]]
    worse = [
        Statement(
            (name,), f"{accuracy[name][0]} % there, every seed below every seed of sft.", (_numbers(demo, [name]),)
        )
        for name in accuracy
        if name not in (*tied, *failed) and accuracy[name][2] < accuracy["sft"][1]
    ]
    names = ("untrained", "sft", "dft", "asft")
    nll = {data: {name: values[name] for name in names} for data, values in real["clean_nll"].items()}
    nothing = Statement(
        (*failed, *failed_dropped),
        "none answered a single prompt there: weights by the model's own probability hardly start where it is near 0. "
        "On real rows dft ended at a higher clean NLL than the untrained base (one seed).",
        (
            _numbers(demo, failed),
            _numbers(dropped, failed_dropped),
            {"file": real["file"], "seeds": real["seeds"], "clean_nll": nll},
        ),
    )
    return (*worse, nothing)


def _numbers(run: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    return {
        "file": run["file"],
        "seeds": run["seeds"],
        "accuracy_percent": {name: run["accuracy_percent"][name] for name in targets},
        "kept_percent": {name: run["kept_percent"][name] for name in targets},
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
            "anchor from this base (dft, p_power, asft, sft_kl, target_sft with the base as teacher) pulls least there. How "
            "much that costs is not benchmarked here."
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
