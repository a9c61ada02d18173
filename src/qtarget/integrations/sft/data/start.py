"""How much each row weighs before the first step, so that nobody's minority is silenced without a word."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from qtarget.core.types import Outcomes, Reference, Target, TokenView
from qtarget.data.columns import LIGHT

SHOWN = 3
"""Examples of each source."""
LONGEST = 60
"""Characters of an example."""
AT_ONCE = 2**20
"""Tokens that are weighed at once."""


def can_weigh(target: Target) -> bool:
    """Whether a token's weight follows from what the frozen model and the rows say of it, and nothing else."""
    needs = target.needs
    live = needs.entropy or needs.mean_log_prob or needs.top_k or needs.log_probs
    frozen = (needs.reference | needs.teacher) & {"entropy", "log_probs"}
    return target.scope == "token" and target.has_label_term and not live and not frozen


def start_weights(target: Target, known: np.ndarray, fields: dict[str, np.ndarray], role: str) -> np.ndarray:
    """``[tokens]`` label weight of each trained token where the live model still is the frozen one.

    Args:
        known: ``[tokens]`` log-probs of the labels, nats.
        fields: of ``Reference``, ``[tokens]`` each.
        role: whose they are.
    """
    out = np.empty(len(known), dtype=np.float32)
    for a in range(0, len(known), AT_ONCE):
        part = slice(a, a + AT_ONCE)
        said = torch.from_numpy(known[part].astype(np.float32))
        live = said.clone().requires_grad_()
        told = {name: torch.from_numpy(values[part].astype(np.float32)) for name, values in fields.items()}
        # one outcome, on which both agree: the anchor pulls nowhere yet
        same = Outcomes(torch.zeros(len(said), 1), torch.zeros(len(said), 1))
        frozen = {role: Reference(label_log_probs=said, **told), f"on_{role}": same}  # pyright: ignore[reportArgumentType]
        terms = target.losses(TokenView(live, 1, **frozen))  # pyright: ignore[reportArgumentType]
        assert terms.label is not None, "see can_weigh"
        (slope,) = torch.autograd.grad(terms.label.sum(), live)
        out[part] = -slope.numpy()
    return out


def silent_rows(
    weights: np.ndarray,
    rows: np.ndarray,
    counts: np.ndarray,
    names: list[str],
    of_row: np.ndarray,
    text: Callable[[int], str],
    numbers: np.ndarray | None = None,
    verbs: tuple[str, str] = ("starts with a mean weight", "start with a mean weight"),
) -> list[str]:
    """Lines that count the rows of mean weight under ``LIGHT`` by source, with examples; none where there are none.

    Args:
        weights, rows: ``[tokens]`` label weight of each trained token, and its row.
        counts: ``[rows]`` trained tokens of each.
        names, of_row: the sources, and which of them each row is of.
        text: shows a row, by its place.
        numbers: ``[rows]`` of each row in the data, from 0; default: its place.
        verbs: what one row does, and what several do.

    Example:
        >>> silent_rows(np.array([0.9, 0.01]), np.array([0, 1]), np.array([1, 1]), ["en", "fr"], np.array([0, 1]), "row {}".format)
        ["fr: 1 of 1 rows starts with a mean weight under 0.05 and hardly teaches: row 2, 'row 1'"]
    """
    trained = counts > 0
    means = np.ones(len(counts))
    means[trained] = np.bincount(rows, weights, minlength=len(counts))[trained] / counts[trained]
    number_of = np.arange(len(counts)) if numbers is None else numbers
    lines = []
    for number, name in enumerate(names):
        mine = (of_row == number) & trained
        silent = np.flatnonzero(mine & (means < LIGHT))
        if not len(silent):
            continue
        lowest = silent[np.argsort(means[silent], kind="stable")][:SHOWN]
        shown = "; ".join(f"row {number_of[row] + 1}, {shortened(text(int(row)))!r}" for row in lowest)
        verb, teach = (verbs[0], "teaches") if len(silent) == 1 else (verbs[1], "teach")
        lines.append(
            f"{name + ': ' if name else ''}{len(silent):,} of {int(mine.sum()):,} rows {verb} under {LIGHT:g} and hardly "
            f"{teach}: {shown}"
        )
    return lines


def shortened(text: str) -> str:
    """The start of a text.

    Example:
        >>> shortened("x" * 80)[-3:]
        '...'
    """
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
