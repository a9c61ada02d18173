"""``qtarget filter``: which rows of a config look bad to the frozen base, and files of what to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtarget.cli.options.outputs import OverwriteOption
from qtarget.command import command_for
from qtarget.core.errors import ConfigError, counted, inflected
from qtarget.data.groups import row_groups

if TYPE_CHECKING:
    import numpy as np

    from qtarget.cli.options.config import RunConfig
    from qtarget.cli.options.outputs import Mark
    from qtarget.filtering import Decision, Filter, ScoredRows
    from qtarget.scoring.cache.reader import ReferenceCache

Rule = Literal["auto", "surprise", "agreement", "gain", "combined", "crossfit", "none"]
ROW_FILES = ("keep.jsonl", "drop.jsonl", "weights.jsonl", "reasons.jsonl")
PAGE, VERDICT = "filter.html", "filter.json"
COUNTED_ALWAYS = 200_000
"""Trained tokens up to which agreement is counted whatever the rule; it takes seconds a hundred thousand tokens."""


def filter_rows(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The config that `qtarget train` will get.")],
    rule: Annotated[
        Rule | None, typer.Option(help="What judges the rows; default: the config's filter, else auto.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the rows to keep, whatever the evidence looks like.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for rows, reasons and page; default: the config's output_dir with -filtered."),
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group_by", help="Column to count by, or language; default: source, ...")
    ] = None,
    mark: Annotated[
        str | None, typer.Option(help="Known noise for the ROC: COLUMN=VALUE; default: rows with noise_spans.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Split the training rows into those to keep and those to drop; any key of CONFIG.yaml can be set by `--key value`."""
    from qtarget.cli.audit_data import HARDWARE
    from qtarget.cli.crossfit import refuse_training_keys
    from qtarget.cli.options.config import build_config
    from qtarget.cli.options.datasets import row_files
    from qtarget.cli.options.early import check_config
    from qtarget.cli.options.outputs import Mark, refuse_existing, say_written
    from qtarget.cli.options.settings import Setting, read_settings
    from qtarget.command import remember
    from qtarget.filtering.decision import Filter
    from qtarget.integrations.sft.config import refuse_prompts
    from qtarget.storage.folders import FILTER, owned

    remember(config, context.args)
    refuse_training_keys(context.args, "filter")
    check_config(config, context.args)
    settings = read_settings(config, context.args)
    if "reference_cache" in settings and rule not in (
        "gain",
        "crossfit",
    ):  # then no model runs, so the machine need not be able to
        settings |= {key: Setting(value, "filter") for key, value in HARDWARE.items()}
    run = build_config(settings, config)
    beside = Path(str(run.training.output_dir))
    output = output or beside.with_name(f"{beside.name}-filtered")
    refuse_prompts(run.training.prompt_weight)  # before the base is scored
    wanted = wish(Filter.of(run.training.filter), rule, keep)
    read = [config, *run.inputs]
    made = Mark.of("filter", [config, *row_files(run)])
    with owned(output, FILTER, inputs=read):
        if not overwrite:
            refuse_existing(output / VERDICT, "--output", made)
        found = filter_config(run, wanted)
        document = write_filtered(run, found, output, group, mark, made)
    print_filtered(document)
    if found.decision.copies_may_tell:
        typer.echo(f"next: `{command_for('filter', '--rule', 'crossfit')}`")
    say_written(output / name for name in (*ROW_FILES, PAGE, VERDICT))


def wish(named: Filter, rule: str | None, keep: float | None) -> Filter:
    """The config's filter, or another rule with a share of its own.

    Raises:
        ConfigError: no such share.
    """
    from qtarget.filtering import Filter

    if rule is not None:
        return Filter(rule, keep, named.form)
    return Filter(named.rule if named else "auto", named.keep if keep is None else keep, named.form)


@dataclass(frozen=True)
class Filtered:
    """A verdict on the training rows of a config.

    Attributes:
        decision: of ``rows``, in their order.
        rows: the judged rows; ``rows.numbers`` are their places in the training data set.
        count: rows of the training data set; those that are not judged train on nothing.
        raw: the rows themselves.
        tokenizer: which made the tokens.
        cache: what judged.
    """

    decision: Decision
    rows: ScoredRows
    count: int
    raw: Sequence[Mapping[str, Any]]
    tokenizer: Any
    cache: Path

    @property
    def kept(self) -> np.ndarray:
        """Numbers of the rows to train on, for ``dataset.select``; those that train on nothing are among them."""
        import numpy as np

        keep = np.ones(self.count, dtype=bool)
        keep[self.rows.numbers[~self.decision.keep]] = False
        return np.flatnonzero(keep)


def filter_config(config: RunConfig, wanted: Filter) -> Filtered:
    """``decide_config`` where the base may have to be scored first; training takes the same cache."""
    from qtarget.cli.missing import reference_for, witness_for
    from qtarget.cli.options.datasets import load_datasets
    from qtarget.cli.options.frozen import found_reference, found_witness
    from qtarget.filtering import WITNESSES

    rows = load_datasets(config)
    asks = wanted.rule in WITNESSES and WITNESSES[wanted.rule].asks_copies
    found = config.training.witness if asks and config.training.witness else found_witness(config, rows)
    if (asks and found is None) or found_reference(config, rows) is None:
        refuse_few(len(rows[0]), wanted)
    config.training.witness = witness_for(config, rows, f"the filter {wanted.rule}") if asks else found
    return decide_config(config, wanted, cache=reference_for(config, rows, "the filter"), data=rows[0])


def refuse_few(rows: int, wanted: Filter) -> None:
    """Say that rows are too few for any verdict before a model is run over them.

    Raises:
        DataError: they are, and the user asks for a verdict and not for a share.
    """
    from qtarget.core.errors import DataError
    from qtarget.filtering.decision import FEWEST_ROWS

    if wanted and wanted.keep is None and rows < FEWEST_ROWS:
        raise DataError(
            f"{rows} rows are too few to tell good ones from bad, at least {FEWEST_ROWS} are needed; nothing was scored. "
            "`--keep SHARE` keeps the best of any number"
        )


def decide_config(
    config: RunConfig,
    wanted: str | Mapping[str, Any] | Filter | None = None,
    *,
    cache: str | Path | None = None,
    alone: str | Path | None = None,
    data: Any = None,
) -> Filtered:
    """Judge the training rows of a config, tokenised as training does.

    Args:
        wanted: a rule or a filter; default: the config's.
        cache: of the base; default: the config's ``reference_cache``.
        alone: folder of the answers without prompts, for ``gain``; default: beside the cache.
        data: the training rows, where they are read already.

    Raises:
        ConfigError: there is no cache, or ``wanted`` is nothing known.
        MissingStatisticError: the rule asks copies, and the config names no ``witness``.
        CacheMismatchError: a cache is of other rows or of another tokenizer.
        DataError: the rows are unusable.
    """
    import numpy as np

    from qtarget.cli.audit_data import cache_findings, load_tokenizer, open_cache
    from qtarget.cli.options.datasets import load_datasets
    from qtarget.core.errors import CacheMismatchError, DataError
    from qtarget.filtering import Filter, decide
    from qtarget.filtering.lookup import rows_in_cache
    from qtarget.integrations.sft.audit import cut, tokenise
    from qtarget.integrations.sft.data.filtering import alone_folder, open_copies
    from qtarget.integrations.shared.frozen import way_out
    from qtarget.scoring.cache.reader import ReferenceCache
    from qtarget.scoring.cache.schema import supervised_mask
    from qtarget.scoring.cache.signature import read_key

    training = config.training
    asked = Filter.of(training.filter if wanted is None else wanted)
    key = None if training.cache_verify_key is None else read_key(training.cache_verify_key)
    named = str(cache) if cache else training.reference_cache
    opened = open_cache(named, True) if key is None or named is None else ReferenceCache.open(named, key=key)
    if opened is None:
        raise ConfigError(
            f"filter compares what the frozen base says of all rows, before training: {way_out('reference')}"
        )
    data = load_datasets(config)[0] if data is None else data
    tokenizer, size, _ = load_tokenizer(config)
    tokens = tokenise(training, data, tokenizer)
    if tokens.rows is None:
        raise DataError("\n".join(found.message for found in tokens.findings if found.severity == "error"))
    for finding in cache_findings(opened, tokens, size, len(data)):
        raise CacheMismatchError(finding.message)
    rows = [cut(row, training) for row in tokens.rows]
    labels: list[Any] = [row["labels"] for row in rows]
    masks = [np.asarray(supervised_mask(row), dtype=bool) for row in labels]
    raw: Any = list(data)
    judged = [i for i, mask in enumerate(masks) if mask.any() and raw[i].get("weight") != 0]
    if not judged:
        raise DataError("no row trains on anything; `qtarget audit-data` says why")
    ids, trained = [rows[i]["input_ids"] for i in judged], [masks[i] for i in judged]
    answers = None
    if asked.rule == "gain":
        answers = _answers_alone(config, ids, trained, opened, Path(alone or alone_folder(opened.path)))
    copies = open_copies(training.witness, asked, opened, key)
    scored = rows_in_cache(opened, ids, trained, judged, answers, copies, sided=key is None)
    return Filtered(decide(scored, asked), scored, len(rows), raw, tokens.tokenizer, opened.path)


def _answers_alone(
    config: RunConfig, ids: Sequence[np.ndarray], trained: Sequence[np.ndarray], cache: ReferenceCache, folder: Path
) -> list[np.ndarray]:
    """From the folder where it is finished; else the base is loaded and scores the answers into it."""
    import torch

    from qtarget.filtering.alone import read_alone, score_alone, without_prompt
    from qtarget.integrations.shared.heads import probe_head
    from qtarget.scoring.cache.schema import MANIFEST
    from qtarget.storage.models import load_whole

    if (folder / MANIFEST).is_file():
        return read_alone([without_prompt(*row) for row in zip(ids, trained, strict=True)], folder)
    name, training = str(config.model.model_name_or_path), config.training
    typer.echo(f"scoring the answers without their prompts into {folder}; later calls read it")
    model = load_whole(
        "model", name, allow_new_weights=training.allow_new_weights, revision=config.model.model_revision,
        dtype=config.model.dtype, trust_remote_code=training.trust_remote_code,
    ).eval().to(training.device)  # fmt: skip
    with torch.no_grad():
        head = probe_head(model)
    return score_alone(model, ids, trained, folder, cache, logit_scale=head.scale, logit_softcap=head.softcap)


def write_filtered(
    config: RunConfig, found: Filtered, folder: Path, group: str | None, mark: str | None, made: Mark
) -> dict[str, Any]:
    """Write rows, reasons, numbers and page, ``filter.json`` last; returns the document.

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
    counted = len(found.rows.log_probs) <= COUNTED_ALWAYS
    document = filter_document(
        found.decision, found.rows, found.count, title=config.data.name, cache=str(found.cache),
        marks=None if marks is None else marks[found.rows.numbers], groups=groups, counted=counted,
        decode=lambda ids: found.tokenizer.decode(ids, skip_special_tokens=False),
    )  # fmt: skip
    (folder / VERDICT).unlink(missing_ok=True)  # while the files are of two calls, there is none
    write_rows(config, found, folder, document["scores"])
    del document["scores"]
    write_page(folder / PAGE, filter_page(document), made)
    write_numbers(folder / VERDICT, document, made)
    return document


def write_rows(config: RunConfig, found: Filtered, folder: Path, scores: Mapping[str, np.ndarray]) -> None:
    """Each of ``ROW_FILES``."""
    from qtarget.storage.files import writing

    texts, decision = originals(config, found.raw), found.decision
    places = dict(zip(found.rows.numbers.tolist(), range(len(found.rows)), strict=True))
    columns = {name: values.tolist() for name, values in scores.items()}
    with ExitStack() as files:
        keep, drop, weights, reasons = (files.enter_context(writing(folder / name, text=True)) for name in ROW_FILES)
        for number, text in enumerate(texts):
            place = places.get(number)
            kept = place is None or bool(decision.keep[place])
            (keep if kept else drop).write(text + "\n")
            factor = 1.0 if place is None else float(decision.weights[place])
            weights.write(_weighted(text, factor) + "\n")
            line: dict[str, Any] = {"row": number, "kept": kept}
            if place is None:
                line["reason"] = "kept: not judged, it trains on nothing"
            else:
                line |= {"posterior": round(float(decision.posterior[place]), 6)}
                line |= {"scores": {name: round(values[place], 4) for name, values in columns.items()}}
                line["reason"] = decision.reason(place)
            reasons.write(json.dumps(line, ensure_ascii=False) + "\n")


def originals(config: RunConfig, raw: Sequence[Mapping[str, Any]]) -> list[str]:
    """JSON text of each row as it came in: a JSONL file's own lines."""
    from qtarget.cli.options.datasets import row_options
    from qtarget.data.loading import original_texts

    data = config.data
    if data.train_file is None:
        return [json.dumps(dict(row), ensure_ascii=False, default=str) for row in raw]
    options = row_options(
        data.data_format, data.null_content, data.roles, data.tools_file, text_field=config.training.dataset_text_field
    )
    return original_texts(data.train_file, options)


def _weighted(text: str, factor: float) -> str:
    """A row with its weight times ``factor``."""
    row = json.loads(text)
    own = row.get("weight")
    return json.dumps(row | {"weight": round((1.0 if own is None else float(own)) * factor, 6)}, ensure_ascii=False)


def print_filtered(document: Mapping[str, Any]) -> None:
    """The verdict, and counts by source."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if (groups := document["groups"]) is not None:
        table = Table("", "rows", "dropped", title=f"by {groups['column']}")
        for line in groups["rows"]:
            table.add_row(Text(line["value"]), f"{line['rows']:,}", f"{line['dropped']:,}")
        console.print(table)
    console.print(Text(document["summary"]), soft_wrap=True)
    if (roc := document["roc"]) is not None:
        said = ", ".join(f"{name} {value:.3f}" for name, value in roc["auc"].items() if value is not None)
        console.print(Text(f"ROC-AUC against the marks of {counted(roc['marked'], 'row')}: {said}"), soft_wrap=True)
    if silent := document["not_judged"]:
        words = f"{counted(silent, 'row')} {inflected(silent, 'train')} on nothing and {inflected(silent, 'were')} not judged"
        console.print(Text(words), soft_wrap=True)
