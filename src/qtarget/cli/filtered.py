"""What ``qtarget filter`` writes and prints: rows to keep and to drop, or weights; reasons, page and numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import ConfigError, counted, inflected
from qtarget.data.columns import LIGHT, parsed_weight
from qtarget.data.groups import row_groups

if TYPE_CHECKING:
    import numpy as np

    from qtarget.cli.filter import Filtered
    from qtarget.cli.options.config import RunConfig
    from qtarget.cli.options.outputs import Mark
    from qtarget.filtering import Filter

KEEP, DROP, WEIGHTS, REASONS = "keep.jsonl", "drop.jsonl", "weights.jsonl", "reasons.jsonl"
PAGE, VERDICT = "filter.html", "filter.json"
COUNTED_ALWAYS = 200_000
"""Trained tokens up to which agreement is counted whatever the rule; it takes seconds a hundred thousand tokens."""


def refuse_weighed(config: RunConfig, wanted: Filter) -> None:
    """Refuse to weigh rows that a filter has weighed: the same evidence would count twice.

    Raises:
        ConfigError: a file of rows is the ``weights.jsonl`` of a filter.
    """
    if wanted and wanted.form == "weight" and (path := weighed_file(config)) is not None:
        raise ConfigError(
            f"filter: as: weight, and the rows of {path} are weighed by a filter already, so its evidence would count twice; "
            "train on them with `--filter none`, or name the rows that they were made of"
        )


def weighed_file(config: RunConfig) -> Path | None:
    """The file of training rows that a filter has weighed, if there is one."""
    from qtarget.data.files import expand
    from qtarget.storage.folders import FILTER, kind_of

    files = [] if config.data.train_file is None else expand(config.data.train_file)
    return next((path for path in files if path.name == WEIGHTS and kind_of(path.parent) == FILTER), None)


def write_filtered(
    config: RunConfig, found: Filtered, folder: Path, group: str | None, mark: str | None, made: Mark
) -> tuple[dict[str, Any], list[Path]]:
    """Write rows, reasons, numbers and page, ``filter.json`` last; returns the document, and what was written.

    Raises:
        ConfigError: no such column.
    """
    from qtarget.cli.options.outputs import write_numbers, write_page
    from qtarget.report.filtering.document import filter_document
    from qtarget.report.filtering.page import filter_page
    from qtarget.report.inspect.marks import check_marks, row_marks

    marks = row_marks(found.raw, mark)
    check_marks(mark, marks)
    training = config.training
    groups = row_groups(found.raw, group or training.group_by, text_field=training.dataset_text_field)
    few = len(found.rows.log_probs) <= COUNTED_ALWAYS
    weighs = found.wanted.form == "weight" and found.decision.tells
    light = light_rows(found, groups, training.dataset_text_field) if weighs else []
    document = filter_document(
        found.decision, found.rows, found.count, title=config.data.name, cache=str(found.cache),
        marks=None if marks is None else marks[found.rows.numbers], groups=groups, counted=few, form=found.wanted.form,
        decode=lambda ids: found.tokenizer.decode(ids, skip_special_tokens=False), own=own_weights(found) if weighs else 0,
        light=light,
    )  # fmt: skip
    names = row_files(found, is_weighed=weighed_file(config) is not None)
    for stale in (
        VERDICT,
        *{KEEP, DROP, WEIGHTS} - set(names),
    ):  # while the files are of two calls, there is no verdict
        (folder / stale).unlink(missing_ok=True)
    write_rows(config, found, folder, names, document["scores"])
    del document["scores"]
    write_page(folder / PAGE, filter_page(document), made)
    write_numbers(folder / VERDICT, document, made)
    return document, [folder / name for name in (*names, PAGE, VERDICT)]


def row_files(found: Filtered, *, is_weighed: bool) -> list[str]:
    """Which files of rows a verdict leaves: no weights where the evidence says nothing of any row, or has been counted before."""
    rows = [] if found.wanted.form == "weight" else [KEEP, DROP]
    return [*rows, *([WEIGHTS] if found.decision.tells and not is_weighed else []), REASONS]


def own_weights(found: Filtered) -> int:
    """How many of the judged rows had a weight before."""
    own = [parsed_weight(found.raw[number].get("weight"), "weight") for number in found.rows.numbers.tolist()]
    return sum(value is not None and value != 1 for value in own)


def light_rows(found: Filtered, groups: tuple[str, Sequence[str]] | None, text_field: str) -> list[str]:
    """Lines that count the rows that hardly teach, by source and with examples."""
    import numpy as np

    from qtarget.data.groups import response
    from qtarget.integrations.sft.data.start import silent_rows

    factors, numbers = found.decision.weights, found.rows.numbers
    values = ["" if groups is None else str(groups[1][number]) for number in numbers.tolist()]
    place_of = {name: place for place, name in enumerate(dict.fromkeys(values))}
    return silent_rows(
        factors, np.arange(len(factors)), np.ones(len(factors), dtype=int), list(place_of),
        np.array([place_of[value] for value in values]),
        lambda place: response(found.raw[int(numbers[place])], text_field), numbers, ("has a weight", "have a weight"),
    )  # fmt: skip


def write_rows(
    config: RunConfig, found: Filtered, folder: Path, names: Sequence[str], scores: Mapping[str, np.ndarray]
) -> None:
    """Each of ``names``."""
    from qtarget.storage.files import writing

    texts, decision, form = originals(config, found.raw), found.decision, found.wanted.form
    places = dict(zip(found.rows.numbers.tolist(), range(len(found.rows)), strict=True))
    columns = {name: values.tolist() for name, values in scores.items()}
    with ExitStack() as files:
        into = {name: files.enter_context(writing(folder / name, text=True)) for name in names}
        for number, text in enumerate(texts):
            place = places.get(number)
            kept = place is None or form == "weight" or bool(decision.keep[place])
            if KEEP in into:
                into[KEEP if kept else DROP].write(text + "\n")
            if WEIGHTS in into:
                into[WEIGHTS].write(_weighted(text, 1.0 if place is None else float(decision.weights[place])) + "\n")
            line: dict[str, Any] = {"row": number, "kept": kept}
            if place is None:
                line["reason"] = "kept: not judged, it trains on nothing"
            else:
                line |= {"posterior": round(float(decision.posterior[place]), 6)}
                line |= {"scores": {name: round(values[place], 4) for name, values in columns.items()}}
                line["reason"] = decision.reason(place, form)
            into[REASONS].write(json.dumps(line, ensure_ascii=False) + "\n")


def originals(config: RunConfig, raw: Sequence[Mapping[str, Any]]) -> list[str]:
    """JSON text of each row as it came in: a JSONL file's own lines."""
    from qtarget.cli.options.datasets import options_of, row_settings
    from qtarget.data.loading import original_texts

    if config.data.train_file is None:
        return [json.dumps(dict(row), ensure_ascii=False, default=str) for row in raw]
    return original_texts(config.data.train_file, options_of(row_settings(config)))


def _weighted(text: str, factor: float) -> str:
    """A row with its weight times ``factor``; six digits of it, so that a small one is not 0, which would leave the row out."""
    row = json.loads(text)
    own = parsed_weight(row.get("weight"), "weight")
    weight = (1.0 if own is None else own) * factor
    return json.dumps(row | {"weight": float(f"{weight:.6g}")}, ensure_ascii=False)


def print_filtered(document: Mapping[str, Any]) -> None:
    """The verdict, and counts by source."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, weights = Console(), document["weights"]
    if (groups := document["groups"]) is not None:
        heads = ["dropped"] if weights is None else ["weights", f"under {LIGHT:g}"]
        table = Table("", "rows", *heads, title=f"by {groups['column']}")
        for line in groups["rows"]:
            cells = [f"{line['dropped']:,}"] if weights is None else [f"{line['weight']:,.1f}", f"{line['light']:,}"]
            table.add_row(Text(line["value"]), f"{line['rows']:,}", *cells)
        console.print(table)
    console.print(Text(document["summary"]), soft_wrap=True)
    for line in weight_lines(document):
        console.print(Text(line), soft_wrap=True)
    if (roc := document["roc"]) is not None:
        said = ", ".join(f"{name} {value:.3f}" for name, value in roc["auc"].items() if value is not None)
        console.print(Text(f"ROC-AUC against the marks of {counted(roc['marked'], 'row')}: {said}"), soft_wrap=True)
    if silent := document["not_judged"]:
        words = f"{counted(silent, 'row')} {inflected(silent, 'train')} on nothing: not judged, and among the rows that are kept"
        console.print(Text(words), soft_wrap=True)


def weight_lines(document: Mapping[str, Any]) -> list[str]:
    """What the weights of rows come to, in words; that there are none, where the evidence says nothing."""
    if document["as"] != "weight":
        return []
    if (weights := document["weights"]) is None:
        return [f"no weights are written: {document['verdict']}"]
    judged = document["rows"] - document["not_judged"]
    lines = [
        f"every row is kept, weighed by P(right): {weights['sum']:,.1f} of {counted(judged, 'row')} in all, mean "
        f"{weights['mean']:.2f}, {weights['light']:,} under {LIGHT:g}"
    ]
    if own := weights["own"]:
        lines.append(f"{counted(own, 'row')} had a weight of {'its' if own == 1 else 'their'} own, which is multiplied")
    return lines + list(weights["lines"])
