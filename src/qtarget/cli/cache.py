"""``qtarget cache``: look at reference caches, check them, join them, and trade them with other projects."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtarget.cli.options.typed import finite
from qtarget.core.errors import CacheMismatchError, ConfigError, counted

if TYPE_CHECKING:
    from qtarget.integrations.sft.score import TrainingRows
    from qtarget.scoring.cache.schema import Manifest

app = typer.Typer(no_args_is_help=True, help="Look at reference caches, check, join, import and export them.")
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

Format = Literal["distillkit", "axolotl", "verl"]
ROUNDING = {
    "float16": "half precision: top-k log-probs off by at most 2**-11 of their value, label's and tail's by 2**-17",
    "float32": "log-probs as they were scored, entropy in half precision",
}


@app.callback()
def options() -> None:
    """Look at reference caches, check, join, import and export them."""


@app.command("info")
def info(
    directory: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of a finished cache.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What a cache is of, what it holds, and what it weighs."""
    from qtarget.scoring.cache.reader import ReferenceCache
    from qtarget.scoring.cache.schema import size_on_disk

    facts = described(ReferenceCache.open(directory, verify=False).manifest, size_on_disk(directory))
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    typer.echo(directory)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = [f"{key} {of}" for key, of in value.items()]
        shown = f"{value:,}" if isinstance(value, int) else ", ".join(value) if isinstance(value, list) else value
        typer.echo(f"  {name:<26}{shown}")


def described(manifest: Manifest, size: int) -> dict[str, Any]:
    """The manifest without its list of shards, and sizes."""
    facts = asdict(manifest) | {"columns": list(manifest.columns), "shards": len(manifest.shards), "bytes": size}
    if manifest.crossfit is None:
        del facts["crossfit"]
    facts["bytes_per_token"] = round(size / max(1, manifest.tokens), 2)
    facts["rounding"] = ROUNDING[manifest.log_probs_dtype]
    return facts


@app.command("verify", context_settings=PASS_ON)
def verify(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of a finished cache.")],
    model: Annotated[str | None, typer.Option(help="Score some rows again with this model.")] = None,
    config: Annotated[Path | None, typer.Option(help="The config that was scored: a cache knows no tokens.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that are scored again.")] = 16,
    tolerance: Annotated[
        float, typer.Option(callback=finite, min=0, help="Largest difference of a log-prob, nats.")
    ] = 0.02,
    seed: Annotated[int, typer.Option("--sample-seed", min=0, help="Which rows.")] = 0,
    verify_key: Annotated[Path | None, typer.Option(help="Key file that the cache must be signed with.")] = None,
) -> None:
    """Re-hash and decode every shard; with --model, score a random sample again. Exit code 2 when anything is wrong."""
    from qtarget.cli.options.early import check_config

    if (model is None) != (config is None):
        raise ConfigError(
            "--model and --config go together: the config has the rows, a cache knows only their checksums"
        )
    if config is not None:
        check_config(config, context.args)
    from qtarget.scoring.cache.reader import ReferenceCache
    from qtarget.scoring.cache.signature import read_key
    from qtarget.scoring.cache.verify import check_counts, check_plan

    cache = ReferenceCache.open(directory, key=None if verify_key is None else read_key(verify_key))
    if model is not None and cache.manifest.crossfit is not None:
        raise ConfigError(
            f"{directory} was judged by {cache.manifest.crossfit['folds']} copies, none of which is kept, so --model cannot score "
            "it again; leave --model and --config out: hashes and counts are checked all the same"
        )
    check_plan(cache)
    check_counts(cache)
    signed = "" if verify_key is None else ", and so is the signature"
    typer.echo(
        f"{directory}: {counted(len(cache.manifest.shards), 'shard')}, {counted(len(cache), 'row')}: "
        f"every hash and count is right{signed}"
    )
    if model is not None and config is not None:
        again(cache, rows_of(config, context.args, model), model, rows, tolerance, seed)


def rows_of(config: Path, arguments: list[str], model: str) -> TrainingRows:
    """The rows of a config, tokenised as its training does, and a model that is no part of it."""
    from transformers import AutoTokenizer

    from qtarget.cli.options.config import load_config
    from qtarget.cli.options.datasets import load_datasets
    from qtarget.cli.options.models import set_model_arguments
    from qtarget.integrations.sft.score import training_rows
    from qtarget.storage.models import check_whole

    run = load_config(config, arguments)
    train_rows, validation_rows = load_datasets(run, overlap=False)
    set_model_arguments(run)
    trust = run.training.trust_remote_code
    check_whole("--model", model, allow_new_weights=run.training.allow_new_weights, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(
        str(run.model.model_name_or_path), revision=run.model.model_revision, trust_remote_code=trust
    )
    return training_rows(model, run.training, train_rows, validation_rows, tokenizer)


def again(cache: Any, job: TrainingRows, model: str, rows: int, tolerance: float, seed: int) -> None:
    """Score a sample again and print the largest differences.

    Raises:
        CacheMismatchError: one exceeds the tolerance.
    """
    from qtarget.scoring.cache.schema import fingerprint_model
    from qtarget.scoring.cache.verify import rescore
    from qtarget.scoring.sources.local import LocalSource

    base, spec = job.trainer._base_model(), job.trainer.head_spec
    source = LocalSource(base, logit_scale=spec.scale, logit_softcap=spec.softcap)
    found = rescore(cache, source, job.rows, count=rows, seed=seed)
    for name, value in found.items():
        typer.echo(
            f"  {name}: {value:.3g}" + ("" if name.endswith("share") else " nats, largest difference beyond rounding")
        )
    if (ours := fingerprint_model(base)) != cache.manifest.model_fingerprint:
        typer.echo(f"  model_fingerprint is {cache.manifest.model_fingerprint} in the cache, {ours} for {model}")
    wrong = [
        f"{name} by {value:.3g}" for name, value in found.items() if not name.endswith("share") and value > tolerance
    ]
    if wrong:
        raise CacheMismatchError(
            f"{model} differs from {cache.path}: {', '.join(wrong)} nats, expected at most {tolerance}; name the model that "
            "was scored, or score again into another folder"
        )


@app.command("sign")
def sign(
    directory: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of a finished cache.")],
    key: Annotated[Path, typer.Option(help="File with at least 32 random bytes; the same key checks.")],
) -> None:
    """Sign a cache that is whole, so that others with the key can tell that it is this one."""
    from qtarget.scoring.cache.reader import ReferenceCache
    from qtarget.scoring.cache.signature import read_key
    from qtarget.scoring.cache.signature import sign as sign_cache

    secret = read_key(key)
    ReferenceCache.open(directory)
    typer.echo(f"{sign_cache(directory, secret)}: signed")


@app.command("merge")
def merge(
    directories: Annotated[list[Path], typer.Argument(metavar="CACHE...", help="Folders of finished caches.")],
    output: Annotated[Path, typer.Option(help="New folder.")],
) -> None:
    """Join caches of one model; a repeated row is taken from the first."""
    from qtarget.cli.score import print_scored
    from qtarget.scoring.cache.merge import merge_caches

    print_scored(merge_caches(directories, output), output)


@app.command("import")
def import_(
    name: Annotated[Format, typer.Argument(metavar="FORMAT", help="distillkit, axolotl or verl.")],
    path: Annotated[Path, typer.Argument(metavar="ROWS", help="A .parquet or .jsonl file, or a folder of them.")],
    output: Annotated[Path, typer.Option(help="Folder of the cache.")],
    model: Annotated[str, typer.Option(help="The teacher's name, for people; it is not loaded.")],
    tokenizer: Annotated[str, typer.Option(help="Name or path of the tokenizer that made the ids.")],
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", min=1, help="Rows of the teacher's head; default: the tokenizer's length."),
    ] = None,
    shift: Annotated[
        int | None,
        typer.Option(min=-1, help="Numbers about token t lie at t - shift; default: the format's, measured."),
    ] = None,
) -> None:
    """Read rows that another project scored; refuses rows whose alignment does not fit."""
    from transformers import AutoTokenizer

    from qtarget.cli.score import print_scored
    from qtarget.scoring.cache.schema import fingerprint_chat_template, fingerprint_tokenizer
    from qtarget.scoring.exchange.foreign import import_rows
    from qtarget.storage.folders import CACHE, check_folder
    from qtarget.storage.models import load_named

    check_folder(output, CACHE, inputs=[path, tokenizer])
    loaded = load_named(AutoTokenizer, "--tokenizer", tokenizer)
    manifest = import_rows(
        name,
        path,
        output,
        model_id=model,
        tokenizer_fingerprint=fingerprint_tokenizer(loaded),
        chat_template_fingerprint=fingerprint_chat_template(loaded),
        vocab_size=vocab_size or len(loaded),
        shift=shift,
    )
    print_scored(manifest, output)


@app.command("export", context_settings=PASS_ON)
def export(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of a finished cache.")],
    name: Annotated[Format, typer.Argument(metavar="FORMAT", help="distillkit, axolotl or verl.")],
    config: Annotated[Path, typer.Option(help="The config that was scored: a cache knows no tokens.")],
    output: Annotated[Path, typer.Option(help="New folder.")],
) -> None:
    """Write a cache in the columns of another project."""
    from qtarget.cli.options.config import load_config
    from qtarget.cli.options.early import check_config

    check_config(config, context.args)
    from qtarget.scoring.cache.reader import ReferenceCache
    from qtarget.scoring.exchange.export import export_rows
    from qtarget.storage.folders import EXPORT, check_folder

    run = load_config(config, context.args)
    check_folder(output, EXPORT, inputs=[directory, config, *run.inputs])
    student = str(run.model.model_name_or_path)
    count = export_rows(ReferenceCache.open(directory), rows_of(config, context.args, student).rows, name, output)
    typer.echo(f"{output}: {counted(count, 'row')} for {name}")
