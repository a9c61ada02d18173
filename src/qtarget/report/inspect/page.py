"""The page of ``qtarget inspect``: numbers of single tokens in one byte each, and as many rows as fit its size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtarget.core.errors import counted
from qtarget.report.inspect.inspection import Inspection, View, overview, row_means
from qtarget.report.inspect.quantise import Codes, quantise
from qtarget.report.inspect.weights import TargetNumbers
from qtarget.report.page import pack_column, render_page
from qtarget.report.tokens import ModelNumbers, TokenRows, spans

SHOWN = 5
"""Alternatives of a token that travel in a page."""
PAGE_BYTES = 24_000_000
"""Packed tokens of a page at most: fewer rows travel, then fewer alternatives, and the page says so."""
RESERVED = 8192
"""Bytes of a page kept for its notes and for one row's alternatives, whatever the budget."""
DETAILED = 0.5
"""Share of the rows whose alternatives should travel too, where not all rows fit."""
LEAST_SHOWN = 0.005
"""Alternatives of a smaller probability are counted in the rest."""


@dataclass(frozen=True)
class TokenView:
    """One view's numbers at single tokens, rounded to one byte; ``alternatives`` and ``q`` at some rows alone.

    ``crossfit``: log-probs of copies that have not seen the row, where there are any.
    """

    log_probs: Codes
    entropy: Codes
    ranks: np.ndarray
    weights: list[Codes]
    moved: list[Codes | None]
    alternatives: np.ndarray | None
    probs: Codes | None
    q: list[Codes | None]
    crossfit: Codes | None = None


def simple(target: TargetNumbers, live: ModelNumbers) -> bool:
    """Whether the gradient's size is ``|a| (1 - p)``, which need not be stored."""
    expected = np.abs(target.label_weights) * -np.expm1(live.label_log_probs.astype(np.float64))
    return bool(np.allclose(target.moved, expected, atol=1e-4))


def quantised(view: View, rows: TokenRows) -> TokenView:
    """Round all numbers of a view."""
    live = view.live
    listed = live.ranks(rows.labels)
    ids, probs = None, None
    if live.topk_ids is not None and live.topk_log_probs is not None:
        share = np.exp(live.topk_log_probs[:, :SHOWN].astype(np.float32))
        kept = share >= LEAST_SHOWN
        ids = np.where(kept, live.topk_ids[:, :SHOWN], -1)
        probs = quantise(np.where(kept, share, np.nan))
    return TokenView(
        quantise(live.label_log_probs),
        quantise(live.entropy),
        np.zeros(len(rows.labels), np.uint8) if listed is None else np.minimum(listed, 255).astype(np.uint8),
        [quantise(t.label_weights) for t in view.targets],
        [None if simple(t, live) else quantise(t.moved) for t in view.targets],
        ids,
        probs,
        [None if t.q is None else quantise(t.q) for t in view.targets],
        None if live.crossfit is None else quantise(live.crossfit),
    )


def ids_shown(rows: TokenRows, views: Sequence[View]) -> np.ndarray:
    """All ids that a page may name, most frequent first: small numbers for frequent tokens pack best."""
    listed = [view.live.topk_ids[:, :SHOWN].ravel() for view in views if view.live.topk_ids is not None]
    everything = (rows.ids, *listed)
    size = max(int(ids.max(initial=0)) for ids in everything) + 1
    counts = np.sum([np.bincount(ids[ids >= 0], minlength=size) for ids in everything], axis=0)
    order = np.argsort(-counts, kind="stable")
    return order[counts[order] > 0]


def planes(numbers: np.ndarray) -> list[dict[str, Any]]:
    """Whole numbers as packed bytes, lowest first; equal high bytes cost nothing."""
    count = max(1, (int(numbers.max(initial=0)).bit_length() + 7) // 8)
    return [pack_column(((numbers >> (8 * i)) & 255).astype(np.uint8)) for i in range(count)]


class Packer:
    """The page's columns for some of the rows, alternatives for some of those."""

    def __init__(self, found: Inspection) -> None:
        self.found = found
        self.views = [quantised(view, found.rows) for view in found.views]
        self.vocabulary = ids_shown(found.rows, found.views)
        self._number = np.full(int(self.vocabulary.max(initial=0)) + 2, 0, dtype=np.int64)
        self._number[self.vocabulary] = np.arange(len(self.vocabulary))

    def tokens(self, kept: np.ndarray) -> dict[str, Any]:
        """Everything at single tokens but alternatives, for the rows ``kept``."""
        part = self.found.rows.take(kept)
        trained = spans(self.found.rows.trained_offsets, kept)
        changes = np.flatnonzero(np.diff(part.supervised.astype(np.int8), prepend=0))
        marks = self.found.token_marks
        return {
            "rows": kept.tolist(),
            "ids": planes(self._number[part.ids]),
            "mask_changes": pack_column(changes.astype(np.uint32)),
            "marks": None if marks is None else pack_column(marks[trained].astype(np.uint8)),
            "views": [
                {
                    "log_probs": _packed(view.log_probs.rows(trained)),
                    "entropy": _packed(view.entropy.rows(trained)),
                    "crossfit": None if view.crossfit is None else _packed(view.crossfit.rows(trained)),
                    "ranks": pack_column(view.ranks[trained]),
                    "weights": [_packed(codes.rows(trained)) for codes in view.weights],
                    "moved": [None if codes is None else _packed(codes.rows(trained)) for codes in view.moved],
                }
                for view in self.views
            ],
        }

    def alternatives(self, kept: np.ndarray) -> dict[str, Any]:
        """Alternatives and ``Q`` at the rows ``kept``, in ascending order."""
        trained = spans(self.found.rows.trained_offsets, kept)
        out = []
        for view in self.views:
            if view.alternatives is None or view.probs is None:
                out.append(None)
                continue
            ids = view.alternatives[trained]
            out.append(
                {
                    "ids": planes(np.where(ids < 0, 0, self._number[ids.clip(min=0)])),
                    "probs": _packed(view.probs.rows(trained)),
                    "q": [None if codes is None else _packed(codes.rows(trained)) for codes in view.q],
                }
            )
        return {"rows": kept.tolist(), "views": out}

    def texts(self) -> list[dict[str, Any]]:
        """Shown text and full length of each number of the vocabulary."""
        raw = json.dumps([shorten(self.found.texts[int(i)]) for i in self.vocabulary]).encode()
        return [pack_column(np.frombuffer(raw, np.uint8)), pack_column(self.vocabulary.astype(np.uint32))]


TEXT_SHOWN = 300


def shorten(text: str) -> str:
    """A token's text, its middle left out beyond 300 characters: the page says how much."""
    if len(text) <= TEXT_SHOWN:
        return text
    return f"{text[:200]}[... {len(text) - 250:,} characters ...]{text[-50:]}"


def _packed(codes: Codes) -> dict[str, Any]:
    return {"codes": pack_column(codes.codes), "values": codes.values}


def size_of(value: Any) -> int:
    """Bytes of it as JSON."""
    return len(json.dumps(value))


def pack(found: Inspection, budget: int = PAGE_BYTES) -> tuple[dict[str, Any], Packer]:
    """What travels in the page: all rows if they fit, else evenly spread ones; alternatives of the most surprising first.

    Returns:
        The document that the page reads, and its packer.
    """
    packer = Packer(found)
    everything = overview(found)
    texts = packer.texts()
    left = budget - RESERVED - size_of(everything) - size_of(texts)
    kept = np.arange(len(found.rows))
    tokens = packer.tokens(kept)
    room = left if size_of(tokens) <= left else int(left * _tokens_share(packer, kept))
    while size_of(tokens) > room and len(kept) > 1:
        # a little less than in proportion: a part of the size does not depend on the number of rows
        count = max(1, int(len(kept) * 0.97 * room / size_of(tokens)))
        kept = np.unique(np.linspace(0, len(found.rows) - 1, count).astype(int))
        tokens = packer.tokens(kept)
    left += RESERVED // 2 - size_of(tokens)
    surprise = row_means(-found.views[0].live.label_log_probs, found.rows)[kept]
    order = kept[np.argsort(-np.nan_to_num(surprise), kind="stable")]
    alternatives = packer.alternatives(np.sort(order))
    while (size := size_of(alternatives)) > left and len(order) > 1:
        order = order[: max(1, int(len(order) * 0.97 * max(left, 0) / size))]
        alternatives = packer.alternatives(np.sort(order))
    notes = [
        "Numbers at single tokens are rounded to 255 levels (square scale, finest at zero); page and JSON hold the same. "
        "Means, shares, distributions and areas come from unrounded numbers.",
        f"Single tokens of {len(kept):,} of {counted(len(found.rows), 'row')} are in this page; alternatives of "
        f"{counted(len(order), 'row')}, most surprising first: at most {SHOWN} a token, "
        f"each of probability {LEAST_SHOWN:g} or more.",
    ]
    return {**everything, "notes": notes, "texts": texts, "tokens": tokens, "alternatives": alternatives}, packer


def _tokens_share(packer: Packer, rows: np.ndarray) -> float:
    """Of the room for rows, what their tokens may take so that alternatives of ``DETAILED`` of them fit beside; by a sample."""
    sample = rows[:: max(1, len(rows) // 200)]
    tokens, alternatives = size_of(packer.tokens(sample)), size_of(packer.alternatives(sample))
    return tokens / (tokens + DETAILED * alternatives)


def render_inspection(document: Mapping[str, Any]) -> str:
    """The page of a document."""
    return render_page(
        "inspect.html", document, title=document["title"], styles=("inspect.css",), scripts=("inspect.js",)
    )
