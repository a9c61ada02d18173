"""Do the copies know the rows? One judgement, from what base and copies say of rows that no copy has seen; every verb reads it.

It is made of the two caches alone, so `train`, `compare`, `filter`, `audit-data` and `inspect` say the same numbers. It is of the
typical row, the median: some rows are noise, and good copies find those unlikely.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtarget.command import command_for, crossfit_command, quoted
from qtarget.core.errors import CacheMismatchError, MissingStatisticError
from qtarget.data.crossfit.steps import FEWEST_STEPS, sensible_steps, steps_of
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.contradictions import COPIES
from qtarget.targets.crossfit_consensus import NOISE_DENSITY

UNEXPECTED = 1.0
"""Nats a token by which rows may surprise a model beyond what it expected. One that knows rows of a kind is about as surprised
as it expects to be (-1.2 to 0 where measured); one that does not was off by 1.2 to 12."""
NOISE = -math.log(NOISE_DENSITY)
"""Nats a token from which on noise explains a row as well: copies that spread over a whole vocabulary expect to be surprised."""
IMPOSSIBLE = -30.0
"""Nats below which no difference counts: a few labels that a model excludes must not hide the rows that are merely wrong."""
LONGER, GENTLER, LORA_RATE = 4, 0.25, 1e-3
"""Factors on steps and rate of the recipe that is advised, and the least rate of a LoRA that is advised to learn longer."""
MARGIN = 0.1
"""Nats a token by which copies are worse than the base before training is said to have harmed them; few steps leave them equal."""
OFTEN = 40
"""Passes over its rows after which a copy that does not know the others has learnt its own by heart."""


@dataclass(frozen=True)
class Knowledge:
    """What copies know of rows that they have not seen; nats a token, of the typical row.

    Attributes:
        rows: how many were compared.
        copies: surprise of the copies.
        unexpected: that surprise less what the copies expected, their entropy; None where a cache has none.
        base: surprise of the base at the same rows; None where nobody asked it.

    Example:
        >>> found = Knowledge(90, copies=8.0, unexpected=6.3, base=9.1)
        >>> found.known, found.behind
        (False, False)
        >>> found.sentence.partition(":")[0]
        'the copies do not know these rows'
    """

    rows: int
    copies: float
    unexpected: float | None
    base: float | None = None

    @property
    def known(self) -> bool:
        """Whether the copies know the rows: a typical one is about as likely to them as they expect, and likelier than noise."""
        return (self.unexpected is None or self.unexpected <= UNEXPECTED) and self.copies <= NOISE

    @property
    def behind(self) -> bool:
        """Whether the copies do not know the rows, and training made them no better than the base that they began as."""
        return not self.known and self.base is not None and self.copies >= self.base

    @property
    def harmed(self) -> bool:
        """Whether training took from the copies what the base knows: a gentler one helps, and a longer one does not."""
        return self.behind and self.base is not None and self.copies > self.base + MARGIN

    @property
    def sentence(self) -> str:
        """Whether they know the rows, in words."""
        base = "" if self.base is None else f", the base {self.base:.1f}"
        if self.known:
            return f"the copies know these rows ({self.copies:.1f} nats a token at a typical one{base})"
        worse = f", and know {'less' if self.harmed else 'no more'} than the base" if self.behind else ""
        why = f"a typical one is no likelier to them than noise, {NOISE:.1f} nats a token or more"
        if self.unexpected is not None and self.unexpected > UNEXPECTED:
            why = f"a typical one surprises them by {self.unexpected:.1f} nats a token more than they expected"
        return f"the copies do not know these rows{worse}: {why} ({self.copies:.1f} nats a token{base})"

    def facts(self) -> dict[str, Any]:
        """For records: numbers rounded to 4 digits."""
        numbers = {"copies": self.copies, "unexpected": self.unexpected, "base": self.base}
        rounded = {name: None if value is None else round(value, 4) for name, value in numbers.items()}
        return {"known": self.known, "rows": self.rows, **rounded}


def knowledge_of(
    copies: Sequence[np.ndarray], entropy: Sequence[np.ndarray] | None, base: Sequence[np.ndarray] | None
) -> Knowledge:
    """From one array a row each, ``[tokens]`` log-probs of the labels, nats; rows without tokens do not count.

    Example:
        >>> said = [np.log([0.5, 0.5]), np.log([0.25])]
        >>> knowledge_of(said, [np.array([0.7, 0.7]), np.array([1.4])], None).known
        True
    """
    counted = [i for i, row in enumerate(copies) if len(row)]
    surprise = [-np.maximum(np.asarray(copies[i], np.float64), IMPOSSIBLE) for i in counted]
    beyond = None
    if entropy is not None:
        beyond = _typical([row - np.asarray(entropy[i], np.float64) for i, row in zip(counted, surprise, strict=True)])
    of_base = None
    if base is not None:
        of_base = _typical([-np.maximum(np.asarray(base[i], np.float64), IMPOSSIBLE) for i in counted])
    return Knowledge(len(counted), _typical(surprise), beyond, of_base)


def _typical(rows: Sequence[np.ndarray]) -> float:
    return float(np.median([row.mean() for row in rows])) if rows else 0.0


def judge_copies(witness: ReferenceCache, reference: ReferenceCache | None = None) -> Knowledge:
    """What the copies of a finished cross-fit know, by all of its rows that the base has judged, too.

    Args:
        witness: of the copies.
        reference: of the base; without it the base is left out.

    Raises:
        CacheMismatchError: the two have no rows in common.
    """
    names = sorted(witness.checksums())
    if reference is not None:
        names = [name for name, place in zip(names, reference.find(names), strict=True) if place >= 0]
    if not names:
        beside = "" if reference is None else f" that {reference.path} has, too"
        raise CacheMismatchError(
            f"witness: {witness.path} has no rows{beside}, so nobody can tell what its copies know; expected rows of this "
            f"config: score the base with `{command_for('score')}`, and the copies with {crossfit_command()}"
        )
    said = [witness.row(place) for place in witness.locate(names)]
    entropy = [row["entropy"] for row in said] if "entropy" in witness.manifest.columns else None
    base = None if reference is None else [reference.row(i)["label_log_probs"] for i in reference.locate(names)]
    return knowledge_of([row["label_log_probs"] for row in said], entropy, base)


def next_step(knowledge: Knowledge, witness: ReferenceCache) -> str:
    """How to train copies that know more: a command that runs as it stands, and what to do with its folder.

    Never fewer steps than the default recipe takes: too few leave copies where the base was, and no rate mends that.
    """
    told: Mapping[str, Any] = witness.manifest.crossfit or {}
    recipe = told.get("recipe", {})
    (steps, passes), sensible = steps_of(told), sensible_steps(told)
    rate, rank = float(recipe.get("learning_rate", LORA_RATE)), int(recipe.get("rank", 16))
    if knowledge.harmed or passes > OFTEN:  # more of the same makes them worse
        what = "train them at a lower rate" if steps >= sensible else "train them longer, at a lower rate"
        steps, rate = max(steps, sensible), rate * GENTLER
    else:
        what, steps = "train them longer", max(LONGER * steps, FEWEST_STEPS, sensible)
        rate = max(rate, LORA_RATE) if rank else rate
    folder = f"{re.sub(r'-[0-9]+-steps-[0-9.e-]+$', '', str(witness.path))}-{steps}-steps-{rate:g}"
    options = [
        "--crossfit", str(told.get("folds", 2)), "--crossfit-steps", str(steps), "--crossfit-rate", f"{rate:g}",
        "--crossfit-rank", str(rank), "--output", folder,
    ]  # fmt: skip
    return f"{what}: `{command_for('score', *options)}`, then add `--witness {quoted(folder)}`"


def refuse_behind(knowledge: Knowledge, witness: ReferenceCache, asked_by: str) -> None:
    """Refuse to be led by copies that are worse than the base.

    Raises:
        MissingStatisticError: they are, with the next step.
    """
    if knowledge.behind:
        raise MissingStatisticError(
            f"{asked_by}: witness {witness.path}: {knowledge.sentence}; {next_step(knowledge, witness)}"
        )


def require_witness(witness: ReferenceCache, reference: ReferenceCache | None) -> None:
    """Make sure that a cross-fit is one, finished, and of the base that the reference cache is of, where there is one.

    Raises:
        CacheMismatchError: says which of these it is not.
    """
    if (witness.path / COPIES).exists():
        raise CacheMismatchError(
            f"witness: {witness.path} is not finished: its copies wait in {COPIES} to be asked under other prompts; run the "
            "command that began it again, and it goes on there"
        )
    if witness.manifest.crossfit is None:
        raise CacheMismatchError(
            f"witness: {witness.path} is an ordinary cache, whose model may have seen the rows; expected a "
            f"cross-fit: {crossfit_command()}"
        )
    if reference is None:
        return
    if (found := witness.manifest.base_fingerprint) != (wanted := reference.manifest.base_fingerprint):
        raise CacheMismatchError(
            f"witness: the copies of {witness.path} began as the model {found}, {reference.path} is of {wanted}; expected one "
            "base: score both with this config"
        )
