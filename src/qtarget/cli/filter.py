"""``qtarget filter``: which rows of a config look bad to the frozen base, and files of what to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtarget.cli.options.outputs import OverwriteOption
from qtarget.command import command_for
from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from qtarget.cli.options.config import RunConfig
    from qtarget.filtering import Decision, Filter, ScoredRows
    from qtarget.scoring.cache.reader import ReferenceCache

Rule = Literal["auto", "surprise", "agreement", "gain", "combined", "crossfit", "none"]
As = Literal["drop", "weight"]


def filter_rows(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The config that `qtarget train` will get.")],
    rule: Annotated[
        Rule | None, typer.Option(help="What judges the rows; default: the config's filter, else auto.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the rows to keep, whatever the evidence looks like.")
    ] = None,
    form: Annotated[
        As | None,
        typer.Option(
            "--as", help="drop rows that look bad, or weight every row by P(right); default: the config's, else drop."
        ),
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
    """Split the training rows into those to keep and to drop, or weigh them; any key of CONFIG.yaml can be set by `--key value`."""
    from qtarget.cli.audit_data import HARDWARE
    from qtarget.cli.crossfit import refuse_training_keys
    from qtarget.cli.filtered import VERDICT, print_filtered, refuse_weighed, write_filtered
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
    wanted = wish(Filter.of(run.training.filter), rule, keep, form)
    refuse_weighed(run, wanted)
    read = [config, *run.inputs]
    made = Mark.of("filter", [config, *row_files(run)])
    with owned(output, FILTER, inputs=read):
        if not overwrite:
            refuse_existing(output / VERDICT, "--output", made)
        found = filter_config(run, wanted)
        document, written = write_filtered(run, found, output, group, mark, made)
    print_filtered(document)
    say_written(written)
    if found.decision.copies_may_tell:
        options = ["--rule", "crossfit", *(["--as", form] if form else [])]
        typer.echo(f"next: `{command_for('filter', *options)}`")
    elif (step := next_step(found, output)) is not None:
        typer.echo(f"next: {step}")


def wish(named: Filter, rule: str | None, keep: float | None, form: str | None = None) -> Filter:
    """The config's filter, or another rule with a share of its own.

    Raises:
        ConfigError: no such share, or one of rows that are to be weighed.
    """
    from qtarget.filtering import Filter

    shape: Any = form or named.form
    if form == "weight" and rule is None and keep is None and named.keep is not None:
        raise ConfigError(
            f"--as weight, and the config's filter keeps a share, {named.keep:g}, which is no probability; name a --rule for "
            "this call"
        )
    if rule is not None:
        return Filter(rule, keep, shape)
    return Filter(named.rule if named else "auto", named.keep if keep is None else keep, shape)


def next_step(found: Filtered, folder: Path) -> str | None:
    """How to train on the rows that are kept, or on the weights; None where all rows are alike."""
    from qtarget.cli.filtered import KEEP, WEIGHTS

    by_weight = found.wanted.form == "weight"
    if not (found.decision.tells if by_weight else found.decision.dropped):
        return None
    file = folder / (WEIGHTS if by_weight else KEEP)
    if found.from_files:  # the config's own filter would judge the rows once more
        again = ["--filter", "none"] if found.named else []
        return f"`{command_for('train', '--train_file', str(file), *again)}`"
    again = ", and `filter: none`" if found.named else ""
    return f"train with `train_file: {file}` in the place of `dataset_name`{again}"


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
        wanted: the filter that was asked for.
        named: whether the config itself names a filter.
        from_files: whether the rows are of ``train_file``.
    """

    decision: Decision
    rows: ScoredRows
    count: int
    raw: Sequence[Mapping[str, Any]]
    tokenizer: Any
    cache: Path
    wanted: Filter
    named: bool
    from_files: bool

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
    from qtarget.data.columns import parsed_weight
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
    tokenizer, model, _ = load_tokenizer(config)
    tokens = tokenise(training, data, tokenizer)
    if tokens.rows is None:
        raise DataError("\n".join(found.message for found in tokens.findings if found.severity == "error"))
    for finding in cache_findings(opened, tokens, model.vocab_size, len(data)):
        raise CacheMismatchError(finding.message)
    rows = [cut(row, training) for row in tokens.rows]
    labels: list[Any] = [row["labels"] for row in rows]
    masks = [np.asarray(supervised_mask(row), dtype=bool) for row in labels]
    raw: Any = list(data)
    judged = [i for i, mask in enumerate(masks) if mask.any() and parsed_weight(raw[i].get("weight"), "weight") != 0]
    if not judged:
        raise DataError("no row trains on anything; `qtarget audit-data` says why")
    ids, trained = [rows[i]["input_ids"] for i in judged], [masks[i] for i in judged]
    answers = None
    if asked.rule == "gain":
        answers = _answers_alone(config, ids, trained, opened, Path(alone or alone_folder(opened.path)))
    copies = open_copies(training.witness, asked, opened, key)
    scored = rows_in_cache(opened, ids, trained, judged, answers, copies, sided=key is None)
    return Filtered(
        decide(scored, asked), scored, len(rows), raw, tokens.tokenizer, opened.path, asked, bool(Filter.of(training.filter)),
        config.data.train_file is not None,
    )  # fmt: skip


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
