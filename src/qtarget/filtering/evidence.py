"""What speaks against a row: one number a row from each witness, larger is worse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from qtarget.command import command_for
from qtarget.composed.guarded import SUPPORT
from qtarget.core.errors import ConfigError, ShapeError
from qtarget.data.agreement import agreement
from qtarget.filtering.copies import IMPOSSIBLE, Knowledge, knowledge_of

APART = 3.5
"""Nats: 33 times less likely than the base expected. The farthest that a skewed clean set came was 3.1 (a spike with a tail of one
nat, drawn), and 2.4 of the measured ones; the nearest noise in a known format was 3.7."""
CROSSFIT_APART = 2.0
"""The same of copies, which learn from noisy rows to be surprised by little."""
WORST = 3
"""Tokens of a row that count: a wrong answer is a few tokens among many right ones."""


@dataclass(frozen=True)
class ScoredRows:
    """Rows with a frozen base's numbers at their trained tokens, flat; tokens of row i are ``offsets[i] : offsets[i + 1]``.

    Attributes:
        numbers: ``[rows]`` each row's number in the user's data.
        ids: ``[tokens]`` token ids.
        offsets: ``[rows + 1]``.
        trained: ``[tokens]`` whether a token is trained; at least one in each row.
        log_probs: ``[trained]`` of the labels, nats.
        entropy: ``[trained]`` of the base there, nats; None where a cache has none.
        alone: ``[trained]`` log-probs of the labels without the prompt; None where nobody asked.
        crossfit: ``[trained]`` log-probs of the labels under a copy of the base that has not seen the row; None without one.
        crossfit_entropy: ``[trained]`` of that copy there, nats.
        contradiction: ``[rows]`` nats by which another row's prompt makes the answer likelier to that copy than its own; None
            where nobody asked (``qtarget.data.crossfit.neighbours``).
        judged: whether the copies know the rows, by their caches; None: by these rows alone.
        way_out: what to do where they do not.
    """

    numbers: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray
    log_probs: np.ndarray
    entropy: np.ndarray | None = None
    alone: np.ndarray | None = None
    crossfit: np.ndarray | None = None
    crossfit_entropy: np.ndarray | None = None
    contradiction: np.ndarray | None = None
    judged: Knowledge | None = None
    way_out: str = "train them longer"

    def __post_init__(self) -> None:
        if len(self.log_probs) != int(self.trained.sum()) or (len(self) and not (np.diff(self.bounds) > 0).all()):
            raise ShapeError(
                f"{len(self.log_probs)} log-probs for {int(self.trained.sum())} trained tokens; expected one each, and a trained "
                "token in every row"
            )

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def of(
        cls,
        ids: Sequence[Any],
        trained: Sequence[Any],
        log_probs: Sequence[Any],
        entropy: Sequence[Any] | None = None,
        alone: Sequence[Any] | None = None,
        numbers: Sequence[int] | None = None,
        crossfit: Sequence[Any] | None = None,
        crossfit_entropy: Sequence[Any] | None = None,
        contradiction: Any = None,
        judged: Knowledge | None = None,
        way_out: str = "train them longer",
    ) -> ScoredRows:
        """From one array a row each; what is less likely than ``IMPOSSIBLE`` is that.

        Raises:
            ShapeError: other numbers of log-probs than of trained tokens, or a row without any.

        Example:
            >>> ScoredRows.of([[5, 6, 7]], [[False, True, True]], [[-0.1, -4.0]]).bounds.tolist()
            [0, 2]
        """

        def flat(parts: Sequence[Any] | None, dtype: type) -> np.ndarray | None:
            return None if parts is None else np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)

        def said(parts: Sequence[Any] | None) -> np.ndarray | None:
            found = flat(parts, np.float64)
            return None if found is None else np.maximum(found, IMPOSSIBLE)

        offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
        return cls(
            np.asarray(range(len(ids)) if numbers is None else numbers, dtype=np.int64),
            flat(ids, np.int64),  # pyright: ignore[reportArgumentType]
            offsets,
            flat(trained, bool),  # pyright: ignore[reportArgumentType]
            said(log_probs),  # pyright: ignore[reportArgumentType]
            flat(entropy, np.float64),
            said(alone),
            said(crossfit),
            flat(crossfit_entropy, np.float64),
            None if contradiction is None else np.asarray(contradiction, dtype=np.float64),
            judged,
            way_out,
        )

    @cached_property
    def bounds(self) -> np.ndarray:
        """``[rows + 1]`` as ``offsets``, counting trained tokens alone."""
        return np.concatenate([[0], np.cumsum(self.trained)])[self.offsets]

    @cached_property
    def row_of_trained(self) -> np.ndarray:
        """``[trained]`` index of each trained token's row."""
        return np.repeat(np.arange(len(self)), np.diff(self.bounds))

    @cached_property
    def excess(self) -> np.ndarray:
        """``[trained]`` surprise beyond what the base expected there, ``-log p - H``; the surprise itself without entropy."""
        return -self.log_probs - (0 if self.entropy is None else self.entropy)

    @cached_property
    def crossfit_excess(self) -> np.ndarray:
        """``[trained]`` as ``excess``, of a copy that has not seen the row.

        Raises:
            ConfigError: nobody trained copies.
        """
        if self.crossfit is None or self.crossfit_entropy is None:
            raise ConfigError(
                "no copies of the base have judged these rows, or their cache has no entropy; run "
                f"`{command_for('filter', '--rule', 'crossfit')}`, which trains them first"
            )
        return -self.crossfit - self.crossfit_entropy

    @cached_property
    def knowledge(self) -> Knowledge:
        """Whether the copies know the rows.

        Raises:
            ConfigError: nobody trained copies.
        """
        if self.judged is not None:
            return self.judged
        said = self.crossfit_excess + self.crossfit_entropy  # which refuses where nobody did
        cuts = self.bounds[1:-1]
        entropy, base = np.split(self.crossfit_entropy, cuts), np.split(self.log_probs, cuts)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return knowledge_of(np.split(-said, cuts), entropy, base)

    @cached_property
    def agreed(self) -> np.ndarray:
        """``[trained]`` of ``qtarget.data.agreement.agreement``."""
        cuts = self.offsets[1:-1]
        return np.concatenate([np.zeros(0), *agreement(np.split(self.ids, cuts), np.split(self.trained, cuts))])  # pyright: ignore[reportArgumentType]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """``[rows]`` mean of ``values [trained]`` over each row."""
        return np.add.reduceat(values, self.bounds[:-1]) / np.diff(self.bounds) if len(self) else np.zeros(0)

    def worst(self, values: np.ndarray) -> np.ndarray:
        """``[rows]`` mean of the three largest of ``values [trained]`` in each row, or of all where there are fewer."""
        order = np.lexsort((-values, self.row_of_trained))
        rank = (
            np.arange(len(values)) - self.bounds[:-1][self.row_of_trained]
        )  # rows keep their places, so this is the rank
        kept = np.where(rank < WORST, values[order], 0.0)
        counts = np.minimum(np.diff(self.bounds), WORST)
        return np.add.reduceat(kept, self.bounds[:-1]) / counts if len(self) else np.zeros(0)


def surprise(rows: ScoredRows) -> np.ndarray:
    """Nats by which the three most unexpected tokens exceed what the base expected there.

    Example:
        >>> import numpy as np
        >>> row = ScoredRows.of([[1, 2, 3]], [[False, True, True]], [[-0.5, -9.0]], [[0.5, 0.2]])
        >>> surprise(row).round(2).tolist()
        [4.4]
    """
    return rows.worst(rows.excess)


def disagreement(rows: ScoredRows) -> np.ndarray:
    """Mean of ``-log(A + 0.02)``, nats: 0 for what all other rows say, 3.9 for what none says."""
    return rows.mean(-np.log(rows.agreed + SUPPORT))


def combined(rows: ScoredRows) -> np.ndarray:
    """As ``surprise``, each token only as far as the other rows do not say it: ``(-log p - H) (1 - A)``."""
    return rows.worst(rows.excess * (1 - rows.agreed))


def lost_by_prompt(rows: ScoredRows) -> np.ndarray:
    """Mean of ``log p(answer) - log p(answer | prompt)``, nats a token: an answer that its prompt makes less likely.

    Raises:
        ConfigError: the answers were not scored alone.
    """
    if rows.alone is None:
        raise ConfigError(
            f"the answers were not scored without their prompts; run `{command_for('filter', '--rule', 'gain')}`"
        )
    return rows.mean(rows.alone - rows.log_probs)


def crossfit_surprise(rows: ScoredRows) -> np.ndarray:
    """As ``surprise``, of a copy that was trained on the other rows: it knows the format, and has not seen this row.

    What the copy is unsure of, a hard row, is expected; a row that contradicts what it is sure of is not. An answer that
    another prompt makes likelier counts on top, shared among the three tokens; none ever counts for a row.

    Raises:
        ConfigError: nobody trained copies.

    Example:
        >>> rows = ScoredRows.of([[1, 2, 3]], [[False, True, True]], [[-9.0, -9.0]], crossfit=[[-0.5, -4.0]],
        ...                      crossfit_entropy=[[0.5, 0.0]], contradiction=[3.0])
        >>> crossfit_surprise(rows).round(2).tolist()
        [3.0]
    """
    found = rows.worst(rows.crossfit_excess)
    return found if rows.contradiction is None else found + np.maximum(rows.contradiction, 0) / WORST


Asked = Literal["base", "copies", "rows"]


@dataclass(frozen=True)
class Witness:
    """One kind of evidence.

    Attributes:
        score: ``[rows]``, nats, larger is worse.
        apart: nats that the bad rows' mean has to lie above the good rows' mode; less is no other kind of rows.
        about: in words, for pages.
        asks: the ``base`` (alone or with others), cross-fitted ``copies`` of it, or the ``rows`` alone. A model has to know
            the rows that it judges.
    """

    score: Callable[[ScoredRows], np.ndarray]
    apart: float
    about: str
    asks: Asked = "base"

    @property
    def asks_copies(self) -> bool:
        """Whether somebody has to train copies first."""
        return self.asks == "copies"


WITNESSES: Mapping[str, Witness] = {
    "surprise": Witness(surprise, APART, "nats by which the three worst tokens exceed what the base expected"),
    "agreement": Witness(disagreement, 2.0, "mean -log of how far other rows say the same", "rows"),
    "combined": Witness(combined, APART, "surprise of the three worst tokens, as far as no other row says them"),
    "gain": Witness(lost_by_prompt, APART, "nats a token that the prompt takes from its answer"),
    "crossfit": Witness(
        crossfit_surprise,
        CROSSFIT_APART,
        "nats by which the three worst tokens exceed what copies expected that have not seen them",
        "copies",
    ),
}
"""By the name of the rule. Another witness is another line here."""
