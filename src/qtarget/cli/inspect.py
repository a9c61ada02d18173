"""``qtarget inspect``: the data as the model sees it, under any number of targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtarget.cli.audit_data import HARDWARE
from qtarget.cli.options.outputs import OverwriteOption
from qtarget.core.errors import CacheMismatchError, ConfigError, DataError, counted
from qtarget.data.groups import row_groups

if TYPE_CHECKING:
    from datasets import Dataset

    from qtarget.cli.options.config import RunConfig
    from qtarget.core.types import Target
    from qtarget.report.inspect.inspection import Inspection
    from qtarget.report.tokens import ModelNumbers, TokenRows
    from qtarget.scoring.cache.reader import ReferenceCache

TOP_K = 20  # listed where a model is run here; eaft reads as many


@dataclass(frozen=True)
class Options:
    """What ``qtarget inspect`` was asked for, beside the config; see the command's help."""

    targets: str | None = None
    rows: int = 5000
    seed: int = 0
    split: Literal["train", "validation"] = "train"
    checkpoints: tuple[str, ...] = ()
    mark: str | None = None
    group: str | None = None
    title: str | None = None
    audit: bool = True


def inspect(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml|RUN", help="A config of `qtarget train`, or the folder of a run.")
    ],
    targets: Annotated[
        str | None,
        typer.Option(help="Targets, apart by commas: sft, dft, target_sft(eta=0.5). Default: sft and the config's."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The page; default: RUN-inspect.html beside output_dir.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="The same numbers as JSON.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows at most; more are sampled uniformly.")] = 5000,
    sample_seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which rows of the config.")] = "train",
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Folders of trained models, apart by commas; default: the run's, if RUN is named."),
    ] = None,
    mark: Annotated[
        str | None, typer.Option(help="COLUMN=VALUE of rows known to be noise; default: rows with noise_spans.")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Column to compare by, or language; default: source, ...")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    page_megabytes: Annotated[
        float,
        typer.Option(min=0.1, help="Beyond it fewer rows are shown in full."),
    ] = 24.0,
    audit: Annotated[bool, typer.Option(help="Also run the checks of `qtarget audit-data`.")] = True,
    overwrite: OverwriteOption = False,
) -> None:
    """Show every token's surprise, weight and gradient in one HTML file; any key of CONFIG.yaml can be set by `--key value`.

    Of a run, named by its folder: its rows before and after, with the config that it left. Of a run of `qtarget rl`: the
    samples that it kept, coloured by weight and advantage.
    """
    from qtarget.cli.options.started import checkpoint_paths, recorded_config

    run = config if config.is_dir() else None
    config = recorded_config(config)
    if config.suffix == ".jsonl":
        from qtarget.cli.inspect_samples import inspect_samples

        inspect_samples(context, run or config, targets, output, json_file, rows, overwrite)
        return
    from qtarget.cli.options.config import build_config
    from qtarget.cli.options.datasets import row_files
    from qtarget.cli.options.early import check_settings
    from qtarget.cli.options.outputs import (
        Mark,
        beside_runs,
        check_outputs,
        say_written,
        write_page,
    )
    from qtarget.cli.options.settings import Setting, read_settings
    from qtarget.command import remember

    settings = read_settings(config, context.args)
    settings |= {key: Setting(value, "inspect") for key, value in HARDWARE.items()}
    check_settings(settings, config)
    from qtarget.report.inspect.document import write_json
    from qtarget.report.inspect.page import pack, render_inspection

    paths = checkpoint_paths(checkpoints, run)
    options = Options(targets, rows, sample_seed, split, paths, mark, group_by, title, audit)
    built = build_config(settings, config)
    parse_targets(targets, built)  # names and contracts, before a model is run
    folder = run or Path(str(built.training.output_dir))
    output, made = (
        output or beside_runs([folder], "inspect.html"),
        Mark.of("inspect", [folder, *row_files(built, split)]),
    )
    read = [config, *built.inputs, *paths]
    check_outputs({"--output": output, "--json": json_file}, read, mark=made, replaces=overwrite)
    remember(config, context.args)
    found = inspect_config(built, options)
    document, packer = pack(found, int(page_megabytes * 1e6))
    write_page(output, render_inspection(document), made)
    if json_file is not None:
        write_json(json_file, found, made.numbers(document), packer)
    for name, reason in found.hidden.items():
        typer.echo(f"not shown: {name} {reason}")
    kept, trained = len(document["tokens"]["rows"]), len(found.rows.labels)
    typer.echo(
        f"{counted(kept, 'row')}, {counted(trained, 'trained token')}, targets {', '.join(document['targets'])}, "
        f"{output.stat().st_size / 1e6:.1f} MB"
    )
    say_written([output, json_file])


def inspect_config(config: RunConfig, options: Options) -> Inspection:
    """Tokenise as training does, look up or score the models, weigh every token.

    Raises:
        ConfigError: no such rows, no target that can be shown, or a checkpoint that cannot be loaded.
        CacheMismatchError: the cache is of other rows.
    """
    from qtarget.cli.audit_data import load_tokenizer
    from qtarget.cli.options.datasets import load_datasets
    from qtarget.cli.options.frozen import found_reference, found_witness
    from qtarget.integrations.sft.audit import cut, tokenise
    from qtarget.report.inspect.inspection import Inspection, View
    from qtarget.report.inspect.page import ids_shown
    from qtarget.report.texts import token_texts
    from qtarget.report.tokens import flatten_rows

    training = config.training
    both = load_datasets(config)
    training.reference_cache, training.witness = found_reference(config, both), found_witness(config, both)
    whole: Any = both[options.split == "validation"]
    if whole is None:
        raise ConfigError(
            "--split validation: the config names no validation_file; set it, or look at the training rows"
        )
    numbers, data = sample(whole, options.rows, options.seed)
    loaded = load_tokenizer(config)
    tokens = tokenise(training, data, loaded[0])
    if tokens.rows is None:
        raise DataError("\n".join(found.message for found in tokens.findings if found.severity == "error"))
    weights = _data_weights(data, tokens, training.prompt_weight)
    cut_rows = [cut(row | more, training) for row, more in zip(tokens.rows, weights, strict=True)]
    rows = flatten_rows([row | {"qtarget_row": n} for row, n in zip(cut_rows, numbers, strict=True)])
    rows = replace(rows, weights_scale=training.weights_scale)  # pyright: ignore[reportArgumentType]
    live, frozen = models_of(config, rows)
    later = [_scored(config, path, rows, Path(path).name) for path in options.checkpoints]
    chosen = parse_targets(options.targets, config)
    shown, hidden = split_targets(chosen, [live, *later], frozen)
    views = [View(model, _weigh(shown, rows, model, frozen)) for model in (live, *later)]
    raw: list[Any] = list(data)
    row_marks, token_marks = _marks(options, raw, rows, tokens.tokenizer)
    sampled = len(whole) > len(data)
    return Inspection(
        options.title or f"{config.data.name or 'data'} as {live.name} sees it",
        about(config, options, rows, len(whole), [live, *later], frozen),
        rows,
        views,
        hidden,
        token_texts(tokens.tokenizer, ids_shown(rows, views)),
        row_groups(raw, options.group or training.group_by, text_field=training.dataset_text_field),
        row_marks,
        token_marks,
        _audit(config, both, raw, tokens, cut_rows, loaded) if options.audit and not sampled else None,
    )


def sample(data: Dataset, rows: int, seed: int) -> tuple[Sequence[int], Dataset]:
    """At most so many rows, uniformly without replacement, in their order; and their numbers."""
    import numpy as np

    if len(data) <= rows:
        return range(len(data)), data
    chosen = np.sort(np.random.default_rng(seed).choice(len(data), rows, replace=False)).tolist()
    return chosen, data.select(chosen)


def _data_weights(data: Dataset, tokens: Any, prompt_weight: float | None) -> list[dict[str, Any]]:
    """``loss_weights`` of each row as training reads them, and the labels of a trained prompt, or nothing."""
    import numpy as np

    from qtarget.integrations.sft.data.weights import ROW, Weighting, prompt_weights, row_weights

    if not Weighting.of(data) and prompt_weight is None:
        return [{} for _ in tokens.rows]
    out = []
    rows: Any = data
    for i, (raw, row) in enumerate(zip(rows, tokens.rows, strict=True)):
        full = {**raw, ROW: i, "input_ids": row["input_ids"].tolist()}
        weights = row_weights(full, tokens.tokenizer, tokens.chat_template) * prompt_weights(
            row["labels"], prompt_weight
        )
        out.append({"loss_weights": weights.astype(np.float32)})
        if prompt_weight is not None:
            out[-1]["labels"] = row["input_ids"]
    return out


def models_of(config: RunConfig, rows: TokenRows) -> tuple[ModelNumbers, dict[str, ModelNumbers]]:
    """The model at the start of training, and the frozen ones: from caches, or run here."""
    from qtarget.report.tokens import numbers_from_cache
    from qtarget.scoring.cache.reader import ReferenceCache

    training, model = config.training, str(config.model.model_name_or_path)
    frozen: dict[str, ModelNumbers] = {}
    for role in ("reference", "teacher"):
        path, named = getattr(training, f"{role}_cache"), getattr(training, f"{role}_model_name_or_path")
        if path is not None:
            cache = ReferenceCache.open(path, verify=False)
            _check_origin(cache.manifest.model_id, named or (model if role == "reference" else None), role)
            frozen[role] = numbers_from_cache(cache, rows)
        elif named is not None:
            frozen[role] = _scored(config, named, rows, named)
    if training.witness is not None and "reference" in frozen:
        copies = ReferenceCache.open(training.witness, verify=False)
        _say_copies(copies, training.reference_cache)
        judged = numbers_from_cache(copies, rows)
        frozen["reference"] = replace(frozen["reference"], crossfit=judged.label_log_probs)
    other = training.reference_model_name_or_path
    if "reference" in frozen and other in (None, model):
        return frozen["reference"], frozen
    live = _scored(config, model, rows, model, config.model.model_revision)
    return live, {"reference": live} | frozen


def _say_copies(copies: ReferenceCache, reference: str | None) -> None:
    """Whether the copies know the rows, where they do not.

    Raises:
        CacheMismatchError: it is no witness of this base.
    """
    from qtarget.filtering.copies import judge_copies, next_step, require_witness
    from qtarget.scoring.cache.reader import ReferenceCache

    base = None if reference is None else ReferenceCache.open(reference, verify=False)
    require_witness(copies, base)
    known = judge_copies(copies, base)
    if not known.known:
        typer.echo(f"witness: {known.sentence}; {next_step(known, copies)}")


def _check_origin(found: str, expected: str | None, role: str) -> None:
    """Raise where a cache's manifest names another model than the config; `train` compares the weights as well.

    Raises:
        CacheMismatchError: says which, and the next step.
    """
    if expected is not None and found != expected:
        raise CacheMismatchError(
            f"{role}_cache was made with model {found!r}, the config says {expected!r}; score again with that model, or "
            f"set {role}_model_name_or_path: {found}"
        )


def _scored(config: RunConfig, path: str, rows: TokenRows, name: str, revision: str = "main") -> ModelNumbers:
    """Run a model over the rows."""
    import torch

    from qtarget.integrations.shared.heads import probe_head
    from qtarget.report.tokens import numbers_from_source
    from qtarget.scoring.sources.local import LocalSource
    from qtarget.storage.models import load_whole

    keywords: dict[str, Any] = {"dtype": config.model.dtype, "trust_remote_code": config.training.trust_remote_code}
    allowed = config.training.allow_new_weights
    model = load_whole("model", path, allow_new_weights=allowed, revision=revision, **keywords).eval()
    with torch.no_grad():
        head = probe_head(model)
    source = LocalSource(model, logit_scale=head.scale, logit_softcap=head.softcap)
    return numbers_from_source(source, rows, name, TOP_K)


def parse_targets(text: str | None, config: RunConfig) -> dict[str, Target]:
    """Targets by the name they are shown under; the config's own has its hyper-parameters.

    Raises:
        ConfigError, UnknownTargetError, HyperparameterError: see ``named_targets``.
    """
    from qtarget.cli.options.contenders import named_targets

    own = config.training.target
    known = {own: lambda: (config.training.target_label, config.training.build_target())}
    return named_targets(text or ("sft" if own == "sft" else f"sft,{own}"), known)


def split_targets(
    targets: dict[str, Target], models: Sequence[ModelNumbers], frozen: dict[str, ModelNumbers]
) -> tuple[dict[str, Target], dict[str, str]]:
    """Those that can be shown for every model, and why the others cannot.

    Raises:
        ConfigError: none can.
    """
    from qtarget.report.inspect.weights import unavailable

    reasons = {}
    for name, target in targets.items():
        reason = next((r for model in models if (r := unavailable(target, model, frozen))), None)
        if reason:
            reasons[name] = reason
    shown = {name: target for name, target in targets.items() if name not in reasons}
    if not shown:
        raise ConfigError("no target can be shown: " + "; ".join(f"{name} {why}" for name, why in reasons.items()))
    return shown, reasons


def _weigh(
    targets: dict[str, Target], rows: TokenRows, live: ModelNumbers, frozen: dict[str, ModelNumbers]
) -> list[Any]:
    from qtarget.report.inspect.page import SHOWN
    from qtarget.report.inspect.weights import target_numbers

    return [target_numbers(target, rows, live, frozen, name=name, shown=SHOWN) for name, target in targets.items()]


def _marks(options: Options, raw: list[dict[str, Any]], rows: TokenRows, tokenizer: Any) -> tuple[Any, Any]:
    """Marks by row and by trained token, where the data has any."""
    import numpy as np

    from qtarget.report.inspect.marks import UNPLACED, check_marks, noise_spans, row_marks, token_marks

    by_row = row_marks(raw, options.mark)
    check_marks(options.mark, by_row)
    if by_row is None or not any(noise_spans(row) for row in raw):
        return by_row, None
    parts = []
    for row, a, b in zip(raw, rows.offsets, rows.offsets[1:], strict=False):
        places = np.flatnonzero(rows.supervised[a:b])
        marked = token_marks(row, rows.ids[a:b], places, tokenizer)
        parts.append(np.full(len(places), UNPLACED, dtype=np.uint8) if marked is None else marked.astype(np.uint8))
    return by_row, np.concatenate(parts)


def _audit(
    config: RunConfig, both: tuple[Any, Any], raw: list[dict[str, Any]], tokens: Any, cut_rows: Any, loaded: tuple
) -> Any:
    """The findings of ``qtarget audit-data`` on the same tokens."""
    from qtarget.cli.audit_data import cache_findings, open_cache, vocabulary_of
    from qtarget.cli.compared import found_comparison
    from qtarget.report.audit.document import audit_data

    training = config.training
    _, model, ends = loaded
    cache = open_cache(training.reference_cache, True)
    return audit_data(
        raw,
        tokens.rows,
        cut_rows,
        tokenizer=tokens.tokenizer,
        vocabulary=vocabulary_of(tokens.tokenizer, model, ends),
        max_length=training.max_length,
        keep_end=training.truncation_mode == "keep_end",
        chat_template=tokens.chat_template,
        assistant_only=training.assistant_only_loss,
        text_field=training.dataset_text_field,
        cache=cache,
        witness=open_cache(training.witness, True),
        sided=training.cache_verify_key is None,
        more=[
            *tokens.findings,
            *(cache_findings(cache, tokens, model.vocab_size, len(raw)) if cache is not None else ()),
        ],
        teacher=bool(training.teacher_cache or training.teacher_model_name_or_path),
        validation=both[1] is not None,
        compared=found_comparison(config, both[0]),
    ).as_dict()


def about(
    config: RunConfig,
    options: Options,
    rows: TokenRows,
    available: int,
    models: Sequence[ModelNumbers],
    frozen: dict[str, ModelNumbers],
) -> list[tuple[str, str]]:
    """Where the numbers come from."""
    of = f"{len(rows):,} of {counted(available, 'row')}"
    how = (
        f"{of}, sampled uniformly without replacement, seed {options.seed}"
        if len(rows) < available
        else f"all {available:,}"
    )
    facts = [
        ("data", f"{config.data.name}, {options.split} rows"),
        ("rows", how),
        ("tokens", f"{len(rows.ids):,}, of them {len(rows.labels):,} trained; max_length {config.training.max_length}"),
        ("models", "; ".join(f"{m.name} (top {m.top_k} listed)" for m in models)),
        ("frozen models", "; ".join(f"{role}: {m.name}" for role, m in frozen.items()) or "none"),
        ("base", "the model as it is at the start of training: weights are those of step one"),
        ("batch targets", "rho1, talr, inverse_likelihood and others see all rows here as one batch"),
        ("mass moved", "1/2 |p - Q|_1 on the listed tokens, the label and one rest: half the absolute logit gradient"),
    ]
    if len(rows) < available:
        facts.append(("audit", "not run on a sample; `qtarget audit-data` looks at all rows"))
    return facts
