"""Which target? By a comparison of the user's rows, else by what was measured on them and the synthetic map, each named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qtarget.command import command_for
from qtarget.data.checks.findings import Finding
from qtarget.report.audit.compared import Compared
from qtarget.report.audit.contenders import USUAL, Proposal, proposal
from qtarget.report.audit.evidence import evidence
from qtarget.report.audit.flaw import flaw_words, guard_words, keeps_flaw
from qtarget.report.audit.noise_map import FARTHEST, at, bases_words, nearest, points_like, regrets

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
        verdict: ``compared``: by a comparison of these rows; ``suggestion``: what to compare; or ``not enough evidence``.
        summary: a few sentences, the next command among them.
        facts: what was measured here; null where there was no cache.
        ranked: best first; empty without enough evidence, and where a comparison has decided.
        avoid: targets that failed under the same conditions.
        notes: what the findings say of targets, beyond their own words.
        compare: what is worth a comparison.
        compared: the comparison that has decided.
    """

    verdict: str
    summary: str
    facts: Mapping[str, Any]
    ranked: tuple[Statement, ...] = ()
    avoid: tuple[Statement, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    compare: Proposal = field(default_factory=Proposal)
    compared: Compared | None = None

    def as_dict(self) -> dict[str, Any]:
        """Lists, mappings, text and numbers only."""
        # through JSON, so that tuples are lists already
        return json.loads(json.dumps(asdict(self)))


def facts_of(
    findings: Sequence[Finding], *, rows: int, teacher: bool, validation: bool | None = None
) -> dict[str, Any]:
    """The numbers that a suggestion may use.

    Args:
        findings: of the whole audit.
        rows: of the data.
        teacher: whether a teacher is at hand (``teacher``).
        validation: whether the config names validation rows; None where there is no config.
    """
    by_name = {found.check: found for found in findings}

    def share(check: str) -> float:
        return round(by_name[check].count / rows, 4) if check in by_name and rows else 0.0

    surprise = dict(by_name["base_surprise"].evidence) if "base_surprise" in by_name else {}
    names = ("mean_surprise", "median_surprise", "mean_entropy", "favourite_share")
    scored = bool(surprise)
    surprising = by_name.get("surprising_tokens")
    # of a base that does not know the rows it is a fact about the base
    suspected = surprising.evidence["share"] if surprising is not None and surprising.severity == "warning" else 0.0
    flawed = by_name["flawed_prior"].evidence["share"] if "flawed_prior" in by_name else 0.0
    scored_rows = by_name["base_surprise"].count if scored else 0
    checked = scored and "flawed_prior_unchecked" not in by_name
    return {name: surprise.get(name) for name in names} | {
        "suspected_share": suspected if scored else None,
        "flawed_prior_share": flawed if checked else None,
        "bad_rows": by_name["row_kinds"].count if "row_kinds" in by_name else None,
        "crossfit_bad_rows": by_name["crossfit_kinds"].count if "crossfit_kinds" in by_name else None,
        "duplicate_share": share("duplicates"),
        "contradictory_share": share("contradictory_duplicates"),
        "rows": rows,
        "scored_rows": scored_rows,
        "teacher": teacher,
        "validation": validation,
    }


def which_target(facts: Mapping[str, Any], compared: Compared | None = None) -> Advice:
    """What a comparison has decided; else a short ranking that says what it rests on, or "not enough evidence".

    The rule: find the points of the noise map (`qtarget bench noise`) whose base knows as much of its rows as this one of
    these. Several bases may: one that knows little of clean rows, and one that knows most of noisy ones. At all of them, rank
    targets by how far they ever fall behind the best one, over all noise that was tried. Where rows agree against a sure
    base, targets that keep a flaw of the base come after those that correct it.

    Args:
        facts: of ``facts_of``.
        compared: a finished comparison of these rows and this model.
    """
    if compared is not None:
        kinds = [
            (facts.get(name) or 0, rule) for name, rule in (("bad_rows", "auto"), ("crossfit_bad_rows", "crossfit"))
        ]
        return Advice("compared", compared.in_audit(*max(kinds)), facts, compared=compared)
    gap = _what_is_missing(facts)
    if gap is not None:
        wanted = proposal(facts)
        summary = f"Not enough evidence: {gap} {next_step(facts, wanted)}"
        return Advice("not enough evidence", summary, facts, notes=_notes(facts), compare=wanted)
    return _from_the_map(facts)


def next_step(facts: Mapping[str, Any], wanted: Proposal) -> str:
    """How a verdict comes about."""
    if facts.get("validation") is False:
        return (
            "A verdict needs validation rows, and this config names none: set validation_file (`qtarget init` splits some "
            "off), then `qtarget compare`."
        )
    return f"On your validation rows `{command_for('compare', *wanted.options())}` decides."


def about_target(advice: Advice, target: str, *, guard: bool = False) -> list[str]:
    """Advice on one target in a few lines: what the user's own rows say, and what the synthetic map alone does.

    Args:
        target: a registry name.
        guard: whether the run has ``guard: true``.
    """
    own = own_evidence(advice.facts)
    if advice.compared is not None:
        return [*(f"your rows: {'; '.join(own)}" for _ in own[:1]), advice.compared.in_training()]
    lines = [f"your rows: {'; '.join(own) or 'nothing was measured'}"]
    if advice.facts["flawed_prior_share"] and keeps_flaw(target, guard=guard):
        ways = "" if guard else guard_words([target])
        lines.append(
            f"where your rows agree against a sure base: {flaw_words(target, guard=guard)}" + f"; {ways}" * bool(ways)
        )
    if advice.verdict != "suggestion":
        return [*lines, advice.summary]
    names = [statement.targets[0] for statement in (*advice.ranked, *advice.avoid)]
    avoided = {name: statement.reason for statement in advice.avoid for name in statement.targets}
    first = advice.ranked[0].targets[0]
    if target in avoided:
        word = f"advises against {target}: {avoided[target].rstrip('.')}; first is {first}"
    elif target in names:
        word = f"has {target} among its first {len(advice.ranked)}"
    else:
        word = f"has {first} first, and says little of {target}"
    # its own comparison has the target that is trained
    wanted = replace(advice.compare, targets=tuple(dict.fromkeys((*advice.compare.targets, target))))
    return [
        *lines,
        f"the synthetic map alone, no verdict on your rows: it {word}. {next_step(advice.facts, wanted)}",
    ]


def own_evidence(facts: Mapping[str, Any]) -> list[str]:
    """What was measured on the user's rows, in words."""
    out = []
    if facts["favourite_share"] is not None:
        out.append(f"{facts['favourite_share']:.0%} of the labels are the base's first choice")
    if facts["mean_surprise"] is not None:
        out.append(f"its surprise is {facts['mean_surprise']:.2f} nats a token")
    if facts["suspected_share"]:
        out.append(f"{facts['suspected_share']:.2%} of the labels surprise it far beyond what it expected")
    if facts["flawed_prior_share"]:
        out.append(f"on {facts['flawed_prior_share']:.2%} of the labels rows agree against a sure base")
    return out


def _what_is_missing(facts: Mapping[str, Any]) -> str | None:
    """Why nothing can be suggested, and the next step; None where something can."""
    favourite, scored_rows = facts["favourite_share"], facts["scored_rows"]
    again = f"`{command_for('audit-data')}`"
    if favourite is None:
        has_cache = facts["mean_surprise"] is not None
        missing = "the base's cache holds no top-k" if has_cache else "the base has not been asked"
        into = ("--top_k", "32", "--output", "base_cache") if has_cache else ()
        named = " and audit again with `--reference base_cache`." if has_cache else f", then {again}."
        return f"{missing}, so what it knows of these rows is unmeasured: `{command_for('score', *into)}`{named}"
    if scored_rows < FEWEST_SCORED_ROWS:
        return (
            f"only {scored_rows} rows were scored; below {FEWEST_SCORED_ROWS} the share of labels that are the base's "
            "first choice is known to no better than 5 points, so it says nothing of targets."
        )
    share = nearest(favourite)["favourite_share"]
    if abs(favourite - share) > FARTHEST:
        return (
            f"{favourite:.0%} of the labels are the base's first choice, and the nearest base that targets were compared on "
            f"had {share:.0%}."
        )
    return None


def _from_the_map(facts: Mapping[str, Any]) -> Advice:
    """By the synthetic map, put in another order by what the user's rows say of the base."""
    points = points_like(facts["favourite_share"])
    regret = regrets(points)
    avoided = [name for name in regret if regret[name] > regret["sft"] + CLEARLY_WORSE]
    flawed = bool(facts["flawed_prior_share"])
    by_map = sorted((name for name in regret if name not in avoided), key=lambda name: regret[name])
    order = sorted(by_map, key=keeps_flaw) if flawed else by_map
    ranked = order[:RANKED]
    firsts = [next(name for name in names if name != "sft") for names in (order, by_map) if set(names) - {"sft"}]
    wanted = proposal(facts, firsts or USUAL)
    best = tuple(Statement((name,), _reason(name, regret, flawed), (at(points, name),)) for name in ranked)
    avoid = tuple(
        Statement((name,), f"{regret[name]:.1f} points behind the best one at its worst there", (at(points, name),))
        for name in avoided
    )
    near = nearest(facts["favourite_share"])["favourite_share"]
    rests = "The order below is the synthetic map's"
    if order[: len(ranked)] != by_map[: len(ranked)]:
        rests += f", with {ranked[0]} put first for what your rows show (`flawed_prior`)"
    summary = (
        f"No verdict on your rows yet. {next_step(facts, wanted)} {rests}: one family of tasks, a tiny base that knew as much of "
        f"its rows ({near:.0%} of the labels its first choice, {facts['favourite_share']:.0%} here); {bases_words(points)}."
    )
    return Advice("suggestion", summary, facts, best, avoid, _notes(facts, ranked), wanted)


def _reason(name: str, regret: Mapping[str, float], flawed: bool) -> str:
    behind = f"never more than {regret[name]:.1f} points behind the best target there"
    if not flawed:
        return f"{behind}."
    if name == "sft":
        return f"first where your rows agree against the base: no weight or anchor of it holds sft back; {behind}."
    return f"{behind}; {flaw_words(name)}."


def _notes(facts: Mapping[str, Any], named: Sequence[str] = ()) -> tuple[str, ...]:
    """What the findings do not say themselves."""
    notes = []
    if facts["flawed_prior_share"]:
        ways = guard_words(named)
        notes.append(
            f"rows agree against a sure base on {facts['flawed_prior_share']:.2%} of the labels (`flawed_prior`): sft corrects "
            f"that, what leans on this base less{f'; {ways}' * bool(ways)} (docs/benchmarks.md, `qtarget bench prior`)."
        )
    if facts["teacher"]:
        real = evidence()["real_noise"]
        numbers = "; ".join(f"{d}: target_sft {v['target_sft']}, sft {v['sft']}" for d, v in real["clean_nll"].items())
        notes.append(
            f"a teacher is at hand: not enough evidence that it pays. The one run here ({real['file']}, one seed, clean NLL) "
            f"had {numbers}."
        )
    return tuple(notes)
