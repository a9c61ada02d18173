"""``qtarget score``: run the frozen base once over the rows of a config."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtarget.core.errors import CacheMismatchError, ConfigError

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig
    from qtarget.cli.options.frozen import Rows
    from qtarget.scoring.cache.schema import Manifest
    from qtarget.scoring.sources.engines import EngineChoice

Policy = Literal["bucket", "spread", "renormalize"]
Role = Literal["reference", "teacher"]
Engine = Literal["local", "ray", "mosec", "vllm", "sglang"]


def score(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The config that `qtarget train` will get.")],
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="Log-probs a token; default: the config's {role}_top_k, or 0 with --output."),
    ] = None,
    tail_policy: Annotated[Policy, typer.Option(help="What stands for the rest.")] = "bucket",
    sampled: Annotated[
        int, typer.Option(min=0, help="Draws a token instead of the top k, for linear targets alone; 50 is usual.")
    ] = 0,
    seed: Annotated[int, typer.Option("--sampling-seed", min=0, help="Of the draws.")] = 0,
    log_probs_dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="Of the stored top-k log-probs.")
    ] = "float16",
    known: Annotated[Path | None, typer.Option(help="A finished cache whose rows are left out.")] = None,
    role: Annotated[Role, typer.Option(help="Which frozen model: the base, or the config's teacher.")] = "reference",
    output: Annotated[Path | None, typer.Option(help="Folder; default: where `qtarget train` looks.")] = None,
    engine: Annotated[Engine, typer.Option(help="Who runs the model.")] = "local",
    url: Annotated[str | None, typer.Option(help="Of a mosec, vLLM or SGLang server: http://host:8000.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray: processes, each with one model.")] = 1,
    ray_address: Annotated[str | None, typer.Option(help="Of a running cluster; default: this machine.")] = None,
    trust_server: Annotated[
        bool,
        typer.Option("--trust-server", help="Compare the server's tokenizer alone; the model fits nowhere here."),
    ] = False,
    vocab_size: Annotated[
        int | None, typer.Option(help="Rows of a trusted server's head; default: the model's here.")
    ] = None,
    crossfit: Annotated[
        int | None,
        typer.Option(
            min=2, help="Folds: each row is judged by a copy that was trained on the other folds, into `witness`."
        ),
    ] = None,
    crossfit_steps: Annotated[
        int | None, typer.Option(min=1, help="Of each copy; default: twice over its rows, more where they are few.")
    ] = None,
    crossfit_rate: Annotated[float, typer.Option(help="Learning rate of the copies.")] = 1e-3,
    crossfit_rank: Annotated[
        int, typer.Option(min=0, help="Of the copies' LoRA, on all linear layers; 0 trains all weights.")
    ] = 16,
    one_prompt: Annotated[
        bool,
        typer.Option(
            "--no-crossfit-prompts", help="Do not ask answers under other rows' prompts, which `qtarget filter` reads."
        ),
    ] = False,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows a shard: what a kill can cost, at most.")] = 2000,
    sign: Annotated[Path | None, typer.Option(help="Key file: sign the finished cache with it.")] = None,
) -> None:
    """Write the reference cache of CONFIG.yaml; any key can be overridden by `--key value`."""
    from qtarget.cli.options.config import load_config
    from qtarget.cli.options.datasets import load_datasets
    from qtarget.cli.options.early import check_config
    from qtarget.command import remember

    remember(config, context.args)
    refuse_crossfit_alone(context, crossfit)
    if crossfit is not None:
        refuse_with_crossfit(role, engine, known)
    check_config(config, context.args)
    from qtarget.scoring.sources.engines import EngineChoice
    from qtarget.storage.folders import CACHE, check_folder

    chosen = EngineChoice(
        engine, url, ray_address=ray_address, workers=workers, trust_server=trust_server, vocab_size=vocab_size
    )
    from qtarget.scoring.cache.signature import read_key
    from qtarget.scoring.cache.signature import sign as sign_cache

    key = None if sign is None else read_key(sign)  # before hours of scoring
    run = load_config(config, context.args)
    recipe = None if crossfit is None else (crossfit, crossfit_steps, crossfit_rate, crossfit_rank, not one_prompt)
    # `teacher` may name a cache too
    own = getattr(run.training, f"{role}_cache") if recipe is None else run.training.witness
    named = output or own
    rows = load_datasets(run, overlap=False) if named is None else None  # they decide the place, and are read once
    if named is not None:
        directory, top_k = Path(named), top_k or 0
    elif recipe is None:
        directory, top_k = place_and_width(run, rows, top_k, sampled, role)
    else:
        directory, top_k = crossfit_place(run, rows, recipe), top_k or 0
    check_folder(directory, CACHE, inputs=[config, known, *(path for path in run.inputs if path != own)])
    begin = time.perf_counter()
    storage: Any = {
        "sampled": sampled, "seed": seed, "log_probs_dtype": log_probs_dtype, "shard_rows": shard_rows,
    }  # fmt: skip
    if recipe is None:
        manifest = run_scoring(run, directory, top_k, tail_policy, role, chosen, rows, known=known, **storage)
    else:
        from qtarget.cli.crossfit import run_crossfit

        storage |= {"top_k": top_k, "tail_policy": tail_policy, "engine": chosen}
        manifest = run_crossfit(run, directory, recipe, how_to_go_on, rows, **storage)
    if key is not None:
        sign_cache(directory, key)
    print_scored(manifest, directory, time.perf_counter() - begin)
    if crossfit is not None:
        print_knowledge(run, directory)


def refuse_crossfit_alone(context: typer.Context, crossfit: int | None) -> None:
    """Options of a cross-fit go with ``--crossfit``, and keys of a training do not.

    Raises:
        ConfigError: one is given without the other, or such a key.
    """
    from qtarget.cli.crossfit import refuse_training_keys
    from qtarget.cli.options.settings import is_said

    if crossfit is not None:
        refuse_training_keys(context.args, "score --crossfit")
        return
    options = {
        "crossfit_steps": "--crossfit-steps", "crossfit_rate": "--crossfit-rate", "crossfit_rank": "--crossfit-rank",
        "one_prompt": "--no-crossfit-prompts",
    }  # fmt: skip
    given = [option for name, option in options.items() if is_said(context, name)]
    if given:
        raise ConfigError(
            f"{', '.join(given)} without --crossfit; add --crossfit 2, or leave {'them' if given[1:] else 'it'} out"
        )


def refuse_with_crossfit(role: Role, engine: Engine, known: Path | None) -> None:
    """A cross-fit is of the base and of all rows, and trains: no server does.

    Raises:
        ConfigError: another role, a server, or rows that are left out.
    """
    if role != "reference" or known is not None:
        raise ConfigError("--crossfit trains copies of the base on all rows; leave --role and --known out")
    if engine not in ("local", "ray"):
        raise ConfigError(
            f"--engine {engine} with --crossfit: a server has one model, and copies of the base are trained; expected --engine "
            "local or --engine ray"
        )


def print_knowledge(config: RunConfig, directory: Path) -> None:
    """Whether the copies know the rows, beside the base where its numbers are at hand."""
    from qtarget.cli.options.frozen import found_reference, is_finished
    from qtarget.filtering.copies import judge_copies, next_step
    from qtarget.scoring.cache.reader import ReferenceCache

    place = found_reference(config)
    base = ReferenceCache.open(place, verify=False) if place is not None and is_finished(Path(place)) else None
    copies = ReferenceCache.open(directory, verify=False)
    if base is not None and base.manifest.base_fingerprint != copies.manifest.base_fingerprint:
        base = None
    try:
        found = judge_copies(copies, base)
    except CacheMismatchError as error:  # the base's cache is of other rows; what was scored is whole all the same
        typer.echo(str(error))
        return
    typer.echo(found.sentence if found.known else f"{found.sentence}; {next_step(found, copies)}")


def place_and_width(
    config: RunConfig, rows: Rows | None, top_k: int | None, sampled: int, role: Role
) -> tuple[Path, int]:
    """Where training looks, and how many log-probs a token: as many as the user said, else as it needs."""
    from qtarget.cli.options.frozen import cache_place

    width = getattr(config.training, f"{role}_top_k") if top_k is None and not sampled else top_k or 0
    place = cache_place(config, role, width, rows)
    if width != getattr(config.training, f"{role}_top_k"):
        typer.echo(f"to train from it, set {role}: {place}, or {role}_top_k: {width}")
    return place, width


def crossfit_place(config: RunConfig, rows: Rows | None, recipe: tuple[int, int | None, float, int, bool]) -> Path:
    """Where training looks, which knows the default recipe alone."""
    from qtarget.cli.options.frozen import shown, witness_place
    from qtarget.integrations.sft.crossfit import CrossfitRecipe

    plan = CrossfitRecipe(*recipe)
    place = witness_place(config, plan, rows)
    if plan != CrossfitRecipe():
        typer.echo(f"another recipe than training's own: to train with it, set witness: {shown(place)}")
    return place


def run_scoring(
    config: RunConfig,
    directory: Path,
    top_k: int,
    tail_policy: Policy,
    role: Role = "reference",
    engine: EngineChoice | None = None,
    rows: tuple[Any, Any] | None = None,
    **storage: Any,
) -> Manifest:
    """Score training and validation rows, tokenised exactly as training does.

    Args:
        rows: the config's, training and validation; read where they are not given.
        storage: ``sampled``, ``seed``, ``log_probs_dtype``, ``shard_rows``, ``known`` and ``announce`` of
            ``qtarget.integrations.sft.score.score``.

    Raises:
        ConfigError: a teacher is to be scored and the config names none, or one that is nowhere.
        ScoringServerError: a server fails, or is not what it should be.
    """
    from transformers import AutoTokenizer

    from qtarget.cli.options.datasets import load_datasets
    from qtarget.cli.options.interrupts import on_interrupt
    from qtarget.cli.options.models import set_model_arguments
    from qtarget.integrations.sft.score import score as score_config
    from qtarget.storage.models import check_whole

    train_rows, validation_rows = load_datasets(config, overlap=False) if rows is None else rows
    set_model_arguments(config)
    student = str(config.model.model_name_or_path)
    named = getattr(config.training, f"{role}_model_name_or_path")
    if engine is not None and engine.trust_server:
        named = None  # it is loaded nowhere; the rows need only a tokenizer and a model to hold it
    elif named is None and role == "teacher":
        raise ConfigError("which teacher: set teacher: MODEL in the config")
    trust = config.training.trust_remote_code
    if named is not None:
        allowed = config.training.allow_new_weights
        check_whole(f"{role}_model_name_or_path", named, allow_new_weights=allowed, trust_remote_code=trust)
    name = str(named or student)
    with on_interrupt(lambda: how_to_go_on(directory)):
        return score_config(
            name,
            config.training,
            train_rows,
            validation_rows,
            AutoTokenizer.from_pretrained(student, revision=config.model.model_revision, trust_remote_code=trust),
            directory=directory,
            top_k=top_k,
            tail_policy=tail_policy,
            model_id=name,
            engine=engine,
            **storage,
        )


def how_to_go_on(directory: Path) -> str:
    """What of a scoring that is ended early is safe, in words."""
    import json

    from qtarget.scoring.cache.plan import PLAN

    finished, plan = len(list(directory.glob("shard-*.parquet"))), directory / PLAN
    planned = f" of {len(json.loads(plan.read_text(encoding='utf-8'))['shards'])}" if plan.is_file() else ""
    return f"{finished}{planned} shards are finished in {directory}; run the same command again, and it goes on there"


def print_scored(manifest: Manifest, directory: Path, seconds: float | None = None) -> None:
    """Size of a finished cache, and how long it took."""
    from qtarget.scoring.cache.schema import size_on_disk

    size = size_on_disk(directory)
    per_token = f"{size / manifest.tokens:.1f} bytes a token" if manifest.tokens else "no tokens"
    kept = f"{manifest.sampled} draws" if manifest.sampled else f"top_k {manifest.top_k}"
    took = "" if seconds is None else f", {seconds:.1f} s"
    typer.echo(
        f"{directory}: {manifest.rows:,} different rows, {manifest.tokens:,} supervised tokens, {kept}, {per_token}{took}"
    )
