"""The JSON of ``qtarget inspect``: the numbers of its page, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qtarget.report.inspect.inspection import Inspection
from qtarget.report.inspect.page import Packer, TokenView, shorten
from qtarget.report.inspect.quantise import Codes, six
from qtarget.storage.files import writing


def write_json(path: Path, found: Inspection, document: Mapping[str, Any], packer: Packer) -> None:
    """Write what ``json_parts`` yields."""
    with writing(path, text=True) as file:
        file.writelines(json_parts(found, document, packer))


def json_parts(found: Inspection, document: Mapping[str, Any], packer: Packer) -> Iterator[str]:
    """The JSON, piece by piece: the overview as it is, then the rows of the page with plain numbers.

    A row has ``row``, ``ids``, ``texts``, ``trained`` (places of the trained tokens), and for each view ``log_prob``,
    ``crossfit`` where there are copies, ``entropy``, ``rank`` (null beyond the list), and for each target ``weight`` and
    ``moved``; ``alternatives`` where the page has them.
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
        copies = f'"crossfit":{table.text(view.crossfit, part)},' if view.crossfit else ""
        more = f',"alternatives":{json.dumps(_alternatives_json(view, part))}' if detailed else ""
        views.append(
            f'{{"log_prob":{table.text(view.log_probs, part)},{copies}"entropy":{table.text(view.entropy, part)},'
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
