"""The document of ``qtarget inspect``: what is computed, what of it travels in the page, and the page and JSON of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qtarget.report.distribution import distribution
from qtarget.report.marks import UNPLACED, scored
from qtarget.report.page import pack_column, render_page
from qtarget.report.quantise import Codes, quantise, six
from qtarget.report.tokens import ModelNumbers, TokenRows, spans
from qtarget.report.weights import TargetNumbers

SHOWN = 5
"""Alternatives of a token that travel in a page."""
PAGE_BYTES = 24_000_000
"""Packed tokens of a page at most: fewer rows travel, then fewer alternatives, and the page says so."""
RESERVED = 8192
"""Bytes of a page kept for its notes and for one row's alternatives, whatever the budget."""
LEAST_SHOWN = 0.005
"""Alternatives of a smaller probability are counted in the rest."""


@dataclass(frozen=True)
class View:
    """One model's numbers, and each target's at them: the base, or a checkpoint."""

    live: ModelNumbers
    targets: list[TargetNumbers]


@dataclass(frozen=True)
class Inspection:
    """All that is known of some rows.

    Attributes:
        title: of the page.
        about: facts for people, as they are shown: name and text.
        rows: the tokens.
        views: the base first.
        hidden: targets that cannot be shown, with the reason.
        texts: text of each token id that occurs anywhere.
        groups: a name for each row, and what it is called (``source``).
        row_marks, token_marks: known noise, by row (booleans) and by trained token (0, 1, or ``UNPLACED``).
        audit: ``DataAudit.as_dict()``, or None.
    """

    title: str
    about: list[tuple[str, str]]
    rows: TokenRows
    views: list[View]
    hidden: dict[str, str]
    texts: Mapping[int, str]
    groups: tuple[str, list[str]] | None = None
    row_marks: np.ndarray | None = None
    token_marks: np.ndarray | None = None
    audit: Mapping[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


# -- numbers ---------------------------------------------------------------------------------------------------------


def row_means(values: np.ndarray, rows: TokenRows) -> np.ndarray:
    """``[rows]`` mean over each row's trained tokens; NaN for a row without any."""
    index = rows.row_of_trained
    counts = np.bincount(index, minlength=len(rows))
    sums = np.bincount(index, values.astype(np.float64), len(rows))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def plain(values: np.ndarray) -> list[float | None]:
    """A column as JSON numbers, six digits."""
    return [six(v) if np.isfinite(v) else None for v in values.tolist()]


def marks_of(found: Inspection, view: View) -> dict[str, Any] | None:
    """ROC of each of a model's scores against the marks, by row and by token."""
    if found.row_marks is None:
        return None
    rows = found.rows
    surprise, entropy = -view.live.label_log_probs, view.live.entropy
    by_token = {"surprise, -log p": surprise, "surprise - entropy": surprise - entropy, "entropy": entropy}
    by_token |= {f"low weight under {t.name}": -t.label_weights for t in view.targets if np.ptp(t.label_weights) > 0}
    trained = np.diff(rows.trained_offsets) > 0
    by_row = {f"mean {name}": row_means(v, rows)[trained] for name, v in by_token.items()}
    largest = [surprise[a:b].max() for a, b in zip(rows.trained_offsets, rows.trained_offsets[1:]) if b > a]
    by_row["largest surprise"] = np.array(largest)
    by_row["trained tokens"] = np.diff(rows.trained_offsets)[trained].astype(np.float64)
    kept = found.row_marks[trained]
    out = {"rows": len(kept), "marked_rows": int(kept.sum()), "by_row": scored(by_row, kept, rows=True)}
    if found.token_marks is not None:
        placed = found.token_marks != UNPLACED
        marked = found.token_marks[placed] == 1
        out["unplaced_rows"] = len(np.unique(rows.row_of_trained[~placed]))
        if marked.any():
            by_token = {name: scores[placed] for name, scores in by_token.items()}
            out |= {
                "tokens": len(marked),
                "marked_tokens": int(marked.sum()),
                "by_token": scored(by_token, marked, rows=False),
            }
    return out


def overview(found: Inspection) -> dict[str, Any]:
    """Everything but single tokens: exact numbers over all rows."""
    rows = found.rows
    views = []
    for view in found.views:
        groups = found.groups[1] if found.groups else None
        views.append(
            {
                "model": view.live.name,
                "top_k": view.live.top_k,
                **distribution(rows, view.live, view.targets, groups),
                "marks": marks_of(found, view),
                "row_nll": plain(row_means(-view.live.label_log_probs, rows)),
                "row_weight": [plain(row_means(t.label_weights, rows)) for t in view.targets],
                "row_moved": [plain(row_means(t.moved, rows)) for t in view.targets],
            }
        )
    return {
        "title": found.title,
        "about": [list(pair) for pair in found.about],
        "targets": [t.name for t in found.views[0].targets],
        "hidden": found.hidden,
        "views": views,
        "group": found.groups[0] if found.groups else None,
        "groups": found.groups[1] if found.groups else None,
        "row_numbers": rows.numbers.tolist(),
        "row_tokens": rows.lengths.tolist(),
        "row_trained": np.diff(rows.trained_offsets).tolist(),
        "row_marked": None if found.row_marks is None else found.row_marks.tolist(),
        "audit": found.audit,
        **found.extra,
    }


# -- single tokens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenView:
    """One view's numbers at single tokens, rounded to one byte; ``alternatives`` and ``q`` at some rows alone."""

    log_probs: Codes
    entropy: Codes
    ranks: np.ndarray
    weights: list[Codes]
    moved: list[Codes | None]
    alternatives: np.ndarray | None
    probs: Codes | None
    q: list[Codes | None]


def simple(target: TargetNumbers, live: ModelNumbers) -> bool:
    """Whether the gradient's size is ``|a| (1 - p)``, which need not be stored."""
    expected = np.abs(target.label_weights) * -np.expm1(live.label_log_probs.astype(np.float64))
    return bool(np.allclose(target.moved, expected, atol=1e-4))


def quantised(view: View, rows: TokenRows) -> TokenView:
    """Round all numbers of a view."""
    live = view.live
    listed = None
    if live.topk_ids is not None:
        at = live.topk_ids == rows.labels[:, None]
        listed = np.where(at.any(1), at.argmax(1) + 1, 0)
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
    while size_of(tokens) > left and len(kept) > 1:
        count = max(1, int(len(kept) * 0.97 * left / size_of(tokens)))
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
        f"Single tokens of {len(kept):,} of {len(found.rows):,} rows are in this page; alternatives of {len(order):,} rows, "
        f"most surprising first: at most {SHOWN} a token, each of probability {LEAST_SHOWN:g} or more.",
    ]
    return {**everything, "notes": notes, "texts": texts, "tokens": tokens, "alternatives": alternatives}, packer


def render_inspection(document: Mapping[str, Any]) -> str:
    """The page of a document."""
    return render_page(
        "inspect.html", document, title=document["title"], styles=("inspect.css",), scripts=("inspect.js",)
    )


# -- JSON ------------------------------------------------------------------------------------------------------------


def json_parts(found: Inspection, document: Mapping[str, Any], packer: Packer) -> Iterator[str]:
    """The JSON, piece by piece: the overview as it is, then the rows of the page with plain numbers.

    A row has ``row``, ``ids``, ``texts``, ``trained`` (places of the trained tokens), and for each view ``log_prob``,
    ``entropy``, ``rank`` (null beyond the list), and for each target ``weight`` and ``moved``; ``alternatives`` where
    the page has them.
    """
    packed = ("texts", "tokens", "alternatives")
    head = json.dumps({k: v for k, v in document.items() if k not in packed}, ensure_ascii=True, allow_nan=False)
    yield head[:-1] + ', "rows": [\n'
    detailed = set(document["alternatives"]["rows"])
    tables = [_Tables(view) for view in packer.views]
    for n, i in enumerate(document["tokens"]["rows"]):
        yield (",\n" if n else "") + _row_json(found, packer, tables, i, i in detailed)
    yield "\n]}\n"


class _Tables:
    """Rounded numbers of a view as JSON text, one look-up a number."""

    def __init__(self, view: TokenView) -> None:
        self.view = view
        self._words: dict[int, list[str]] = {}

    def text(self, codes: Codes, part: slice) -> str:
        if id(codes) not in self._words:
            self._words[id(codes)] = [*map(json.dumps, codes.values), "null"]
        words = self._words[id(codes)]
        return "[" + ",".join([words[c] for c in codes.codes[part].tolist()]) + "]"


def _row_json(found: Inspection, packer: Packer, tables: list[_Tables], i: int, detailed: bool) -> str:
    rows = found.rows
    a, b = int(rows.offsets[i]), int(rows.offsets[i + 1])
    part = slice(int(rows.trained_offsets[i]), int(rows.trained_offsets[i + 1]))
    ids = rows.ids[a:b].tolist()
    head = {
        "row": int(rows.numbers[i]),
        "ids": ids,
        "texts": [shorten(found.texts[t]) for t in ids],
        "trained": np.flatnonzero(rows.supervised[a:b]).tolist(),
    }
    if found.token_marks is not None:
        head["marked"] = found.token_marks[part].astype(int).tolist()
    views = []
    for table in tables:
        view = table.view
        ranks = [r or None for r in view.ranks[part].tolist()]
        targets = []
        for weight, moved in zip(view.weights, view.moved, strict=True):
            size = table.text(moved, part) if moved else json.dumps(derived_moved(weight, view.log_probs, part))
            targets.append(f'{{"weight":{table.text(weight, part)},"moved":{size}}}')
        more = f',"alternatives":{json.dumps(_alternatives_json(view, part))}' if detailed else ""
        views.append(
            f'{{"log_prob":{table.text(view.log_probs, part)},"entropy":{table.text(view.entropy, part)},'
            f'"rank":{json.dumps(ranks)},"targets":[{",".join(targets)}]{more}}}'
        )
    return json.dumps(head, ensure_ascii=True)[:-1] + f', "views":[{",".join(views)}]}}'


def derived_moved(weight: Codes, log_probs: Codes, part: slice) -> list[float]:
    """``|a| (1 - p)`` of the rounded numbers, as the page works it out."""
    a, p = (np.array([*c.values, np.nan])[c.codes[part]] for c in (weight, log_probs))
    return [six(v) for v in (np.abs(a) * -np.expm1(p)).tolist()]


def _alternatives_json(view: TokenView, part: slice) -> dict[str, Any] | None:
    """``tokens``: ``[id, p]`` of each alternative; ``q``: of each target ``Q`` at its slots and at the label, or null."""
    if view.alternatives is None or view.probs is None:
        return None
    ids, probs = view.alternatives[part].tolist(), _decoded(view.probs, part)
    tokens = [[[t, p] for t, p in zip(row, share) if t >= 0] for row, share in zip(ids, probs)]
    return {"tokens": tokens, "q": [None if codes is None else _decoded(codes, part) for codes in view.q]}


def _decoded(codes: Codes, part: slice) -> list[Any]:
    values = np.array([*codes.values, None], dtype=object)
    return values[codes.codes[part]].tolist()
