"""From evidence to a verdict: are there two kinds of rows at all, and which of them are bad?"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from qtarget.core.errors import ConfigError
from qtarget.filtering.copies import UNEXPECTED
from qtarget.filtering.evidence import WITNESSES, ScoredRows
from qtarget.filtering.mixture import Mixture, compare
from qtarget.filtering.prompts import told_by_prompt

Verdict = Literal["two kinds", "cannot tell", "kept by share", "not filtered"]
As = Literal["drop", "weight"]

RULES = ("auto", *WITNESSES, "none")
AUTO = "surprise"
"""What ``auto`` asks: it needs no count over all rows and no second pass of the model, and is the best single witness of
`benchmarks/results/filter.json` wherever the base knows the format."""
LEAST_GAIN = 5.0
"""Nats of held-out likelihood, all rows together, that two kinds have to gain on one."""
LEAST_ERRORS = 3.0
"""Standard errors of that gain above 0."""
FEWEST_BAD = 8
"""Rows; fewer are no kind."""
FEWEST_ROWS = 50
"""Below this neither component is known."""
TOLD = 0.8
"""ROC-AUC from which on prompts alone tell the suspected rows: then they are a task, not noise."""
CERTAIN = 0.5
"""P(bad) above which a row is dropped."""


@dataclass(frozen=True)
class Filter:
    """What a user asks for.

    Attributes:
        rule: one of ``RULES``.
        keep: share of the rows to keep, best first, whatever the evidence looks like; None: the evidence decides.
        form: ``drop`` rows, or ``weight`` them by P(good).
    """

    rule: str = "auto"
    keep: float | None = None
    form: As = "drop"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            near = difflib.get_close_matches(str(self.rule), RULES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"filter: rule {self.rule!r} is unknown; expected one of {', '.join(RULES)}{hint}")
        number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool)
        if self.keep is not None and not (number and 0 < self.keep < 1):
            raise ConfigError(f"filter: keep is {self.keep!r}; expected a share of the rows, above 0 and below 1")
        if self.keep is not None and self.rule == "none":
            raise ConfigError("filter: rule none keeps every row; leave keep out, or name another rule")
        if self.form not in get_args(As):
            raise ConfigError(f"filter: as is {self.form!r}; expected drop or weight")
        if self.form == "weight" and self.keep is not None:
            raise ConfigError(
                f"filter: keep {self.keep:g} leaves rows out whatever the evidence, so no row has a P(right) to be weighed by; "
                "leave keep out, or set as: drop"
            )

    def __bool__(self) -> bool:
        return self.rule != "none"

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Filter | None) -> Filter:
        """From a config's key: a rule's name, or a mapping of ``rule``, ``keep`` and ``as``.

        Raises:
            ConfigError: it is neither, or names what is unknown.

        Example:
            >>> Filter.of({"rule": "surprise", "keep": 0.6})
            Filter(rule='surprise', keep=0.6, form='drop')
        """
        if isinstance(value, Filter):
            return value
        if value is None or isinstance(value, str):
            return cls(value or "none")
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"filter: {value!r}; expected a rule ({', '.join(RULES)}), or {{rule: surprise, keep: 0.6}}"
            )
        if unknown := sorted(set(map(str, value)) - {"rule", "keep", "as"}):
            raise ConfigError(f"filter: unknown key {', '.join(unknown)}; expected rule, keep and as")
        return cls(value.get("rule", "auto"), value.get("keep"), value.get("as", "drop"))


@dataclass(frozen=True)
class Decision:
    """What to do with each row, and why.

    Attributes:
        keep: ``[rows]`` booleans. All true under ``cannot tell`` and ``not filtered``.
        posterior: ``[rows]`` P(row is bad) in [0, 1]. All 0 where nothing can be told; 0 or 1 under ``kept by share``.
        verdict: ``two kinds``, ``cannot tell``, ``kept by share`` (the user said how many), or ``not filtered``.
        rule: the score that decided; ``auto`` names the one it took.
        threshold: a row is dropped where its score is above; None where none is dropped.
        score: ``[rows]`` of ``rule``, larger is worse; nats.
        summary: one sentence: "two kinds: 77 of 400 rows look bad (...)".
        facts: what the verdict rests on, numbers and text.
        mixture: of the two components, where one was fitted.
    """

    keep: np.ndarray
    posterior: np.ndarray
    verdict: Verdict
    rule: str
    threshold: float | None
    score: np.ndarray
    summary: str
    facts: Mapping[str, Any]
    mixture: Mixture | None = None

    @property
    def dropped(self) -> int:
        """How many rows are left out."""
        return int((~self.keep).sum())

    @property
    def tells(self) -> bool:
        """Whether the evidence separates rows, so that ``posterior`` says something of each."""
        return self.verdict == "two kinds"

    @property
    def weights(self) -> np.ndarray:
        """``[rows]`` P(row is good), what ``as: weight`` multiplies; of no meaning unless the decision ``tells``."""
        return 1 - self.posterior

    @property
    def copies_may_tell(self) -> bool:
        """Whether the base cannot tell because it does not know the rows: copies learn their format first."""
        doubted = self.verdict == "cannot tell" and WITNESSES[self.rule].asks == "base"
        return doubted and self.facts.get("kept_excess", 0.0) > UNEXPECTED

    def reason(self, row: int, form: As = "drop") -> str:
        """Why a row is kept or dropped, or weighed as it is, in words."""
        if self.verdict in ("cannot tell", "not filtered"):
            return f"kept: {self.verdict}"
        side = "at most" if self.keep[row] else "above"
        sure = "" if self.verdict == "kept by share" else f", P(bad) {self.posterior[row]:.2f}"
        what = "kept" if self.keep[row] else "dropped"
        if form == "weight":
            what = f"weighed {self.weights[row]:.2f}"
        return f"{what}: {self.rule} {self.score[row]:.2f} nats, {side} {self.threshold:.2f}{sure}"


def decide(rows: ScoredRows, wanted: str | Mapping[str, Any] | Filter = "auto", seed: int = 0) -> Decision:
    """Judge rows by one witness.

    Without ``keep`` nothing is dropped unless the evidence shows two kinds of rows: two components beat one on held-out rows
    (``qtarget.filtering.mixture``); the bad one lies apart; at least half of the rows are kept, and these surprise the base
    no more than it expects; and the prompts alone do not tell which rows are bad.

    Args:
        rows: with the base's numbers.
        wanted: a rule, ``{rule, keep, as}``, or a ``Filter``.
        seed: of the folds.

    Raises:
        ConfigError: ``wanted`` is nothing known, keeps no row, or asks for a witness that was not scored.
    """
    asked = Filter.of(wanted)
    count, rule = len(rows), AUTO if asked.rule == "auto" else asked.rule
    nothing = np.ones(count, dtype=bool), np.zeros(count)
    if rule == "none":
        return Decision(
            *nothing, "not filtered", rule, None, np.zeros(count), f"not filtered: all {count:,} rows are kept", {}
        )
    if asked.keep is not None:
        doubt = rows.knowledge if WITNESSES[rule].asks_copies else None
        found = _by_share(WITNESSES[rule].score(rows), rule, asked.keep)
        if doubt is None or doubt.known:
            return found
        return replace(found, summary=f"{found.summary}; but {doubt.sentence}; {rows.way_out}")
    return _decide(rows, rule, seed)


def _decide(rows: ScoredRows, rule: str, seed: int) -> Decision:
    """By the evidence of one witness."""
    count, score = len(rows), WITNESSES[rule].score(rows)
    doubt, facts, mixture, posterior = _judge(rows, rule, score, seed)
    if doubt is not None:
        summary = f"cannot tell good rows from bad by {rule}: {doubt}; all {count:,} rows are kept"
        keep, nobody = np.ones(count, dtype=bool), np.zeros(count)
        return Decision(keep, nobody, "cannot tell", rule, None, score, summary, facts, mixture)
    keep = posterior <= CERTAIN
    bad, threshold = int((~keep).sum()), float(score[keep].max())
    summary = (
        f"two kinds: {bad:,} of {count:,} rows look bad (P(bad) above {CERTAIN:g}; {rule} above {threshold:.1f} nats, on average "
        f"{facts['bad_mean']:.1f} where most rows have {round(facts['good_mode'], 1) + 0.0:.1f})"
    )
    return Decision(keep, posterior, "two kinds", rule, threshold, score, summary, facts, mixture)


def _by_share(score: np.ndarray, rule: str, share: float) -> Decision:
    """The best rows, so many; equal scores in their order."""
    kept = round(share * len(score))
    if not kept:
        raise ConfigError(f"filter: keep {share:g} of {len(score):,} rows is no row; raise keep, or leave filter out")
    keep = np.zeros(len(score), dtype=bool)
    keep[np.argsort(score, kind="stable")[:kept]] = True
    threshold = float(score[keep].max())
    summary = f"kept by share: {kept:,} of {len(score):,} rows, those of least {rule} (at most {threshold:.1f} nats)"
    return Decision(keep, (~keep).astype(float), "kept by share", rule, threshold, score, summary, {"share": share})


def _judge(
    rows: ScoredRows, rule: str, score: np.ndarray, seed: int
) -> tuple[str | None, dict[str, Any], Mixture | None, np.ndarray]:
    """Why nothing can be told, or None; what was measured; the mixture and each row's P(bad)."""
    zero, apart, asks = np.zeros(len(rows)), WITNESSES[rule].apart, WITNESSES[rule].asks
    if len(rows) < FEWEST_ROWS:
        return f"{len(rows)} rows are too few, at least {FEWEST_ROWS} are needed", {}, None, zero
    if asks == "base" and rows.entropy is None:
        return "the cache has no entropy, so nobody knows what the base expected", {}, None, zero
    if asks == "copies" and not rows.knowledge.known:
        return f"{rows.knowledge.sentence}; {rows.way_out}", {"typical_excess": rows.knowledge.unexpected}, None, zero
    found = compare(score, seed)
    if found is None:
        return "all rows score alike", {}, None, zero
    mixture = found.mixture
    posterior = mixture.posterior(score)
    bad = posterior > CERTAIN
    judged = rows.crossfit_excess if asks == "copies" else rows.excess
    expected = float(rows.mean(judged)[~bad].mean()) if not bad.all() else float("inf")
    facts = {
        "gain": found.gain, "gain_error": found.error, "good_mode": mixture.good.mode, "bad_mean": mixture.bad.mean,
        "share": mixture.share, "bad_rows": int(bad.sum()), "kept_excess": expected,
    }  # fmt: skip
    if asks != "rows" and expected > UNEXPECTED:
        whom = "it" if asks == "base" else "them"
        surprised = f"even those to keep surprise {whom} by {expected:.1f} nats a token more than expected"
        doubt = (
            f"the base does not know these rows ({surprised}; the rule `crossfit` asks copies that learn the format first)"
            if asks == "base"
            else f"the copies know most of these rows and not the other kind ({surprised})"
        )
    elif found.gain < max(LEAST_GAIN, LEAST_ERRORS * found.error):
        doubt = (
            f"two kinds explain held-out rows not surely better than one ({found.gain:+.1f} nats, standard error "
            f"{found.error:.1f}; {max(LEAST_GAIN, LEAST_ERRORS * found.error):.1f} are needed)"
        )
    elif mixture.bad.mean - mixture.good.mode < apart:
        difference = mixture.bad.mean - mixture.good.mode
        doubt = f"the upper kind lies only {difference:.1f} nats above the lower, {apart:g} are needed"
    elif bad.sum() < FEWEST_BAD:
        doubt = f"only {bad.sum()} rows stand out, at least {FEWEST_BAD} are needed"
    elif bad.mean() > 0.5:
        doubt = f"more than half of the rows ({bad.mean():.0%}) would be the bad ones"
    else:
        facts["told_by_prompt"] = told_by_prompt(rows, bad, seed)
        doubt = None
        if facts["told_by_prompt"] >= TOLD:
            doubt = (
                f"the {bad.sum():,} rows that surprise the base are told by their prompts alone (ROC {facts['told_by_prompt']:.2f}"
                "), so they are a task that it does not know rather than noise; look at them"
            )
    return doubt, facts, mixture, posterior
