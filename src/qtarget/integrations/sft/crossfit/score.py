"""Train the copies, ask each about its rows, and write an ordinary cache."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from qtarget.core.errors import CacheMismatchError, ConfigError
from qtarget.core.types import TailPolicy
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.crossfit.apart import Judge, JudgePool
from qtarget.integrations.sft.crossfit.copies import Copies
from qtarget.integrations.sft.crossfit.elsewhere import write_contradictions
from qtarget.integrations.sft.crossfit.folds import Folds, folds_of
from qtarget.integrations.sft.crossfit.recipe import CrossfitRecipe
from qtarget.integrations.sft.crossfit.source import CrossfitSource
from qtarget.scoring.cache.plan import PLAN, tool_versions
from qtarget.scoring.cache.progress import TokenMeter
from qtarget.scoring.cache.schema import MANIFEST, Manifest, Provenance
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.contradictions import COPIES, SIDE
from qtarget.scoring.sources.distributed import Processes
from qtarget.scoring.sources.engines import EngineChoice
from qtarget.scoring.sources.local import LocalSource, check_storage
from qtarget.storage.differences import differences
from qtarget.storage.files import digest, write_json
from qtarget.storage.folders import CACHE, owned
from qtarget.storage.locks import locked


def crossfit_score(
    model: str,
    args: QTargetConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: Any = None,
    *,
    directory: str | Path,
    recipe: CrossfitRecipe | None = None,
    top_k: int = 0,
    tail_policy: TailPolicy = "bucket",
    log_probs_dtype: str = "float16",
    sampled: int = 0,
    seed: int = 0,
    progress: bool = True,
    shard_rows: int = 2000,
    engine: EngineChoice | None = None,
) -> Manifest:
    """Train a copy for each fold, score each row with the copy that has not seen it, and write an ordinary cache.

    Training rows are learnt; evaluation rows are judged alone, each by the copy that has not seen its prompt. Run again
    after a kill, copies that are trained and shards that are scored are kept. Each process holds one model at a time.

    Args:
        model: name or path of the base.
        args: the training configuration: data settings decide the tokens, ``seed`` the folds, the rest how copies train.
        directory: the cache's folder.
        recipe: see ``CrossfitRecipe``.
        top_k, tail_policy, log_probs_dtype, sampled, seed, progress, shard_rows: as for ``qtarget.integrations.sft.score``.
        engine: ``local``, which is the default: all in this process; or ``ray``: copies are trained, and judge, side by side.

    Returns:
        The manifest of the finished cache, whose ``crossfit`` has folds, recipe and fingerprints.

    Raises:
        ConfigError: ``model`` is no name, ``prompt_weight`` is set, which makes prompts part of the response, the engine is a
            server, or a machine of the cluster does not share the folder.
        CacheMismatchError: the folder was begun with other rows, another base or another recipe.
        DataError: fewer prompts than folds.
        ScoringServerError: the cluster does not answer, or its processes die.
    """
    processes = processes_of(engine or EngineChoice())
    if not isinstance(model, str):
        raise ConfigError("a cross-fit loads the base anew for each copy; give the model by name or path")
    if args.prompt_weight is not None:
        raise ConfigError(
            "prompt_weight trains prompts too, so rows have no prompt to be told apart by; leave it out to score"
        )
    recipe, directory = recipe or CrossfitRecipe(), Path(directory)
    check_storage(tail_policy, log_probs_dtype)
    folds = folds_of(model, args, train_dataset, eval_dataset, processing_class, recipe)
    gc.collect()  # the trainer that tokenised the rows holds a model, and its callbacks hold it
    copies = Copies(directory / COPIES, model, args, folds, recipe, progress, processes)
    with owned(directory, CACHE):
        (directory / COPIES).mkdir(exist_ok=True)
    with (
        locked(directory / COPIES),  # the folder's own lock is `write_cache`'s
        one_cluster(directory, processes),
    ):
        said = said_before(directory, folds.facts(recipe, args))
        found = said or copies.all_ready(range(recipe.folds))
        provenance = Provenance(
            model_id=model,
            model_fingerprint=digest("".join(found).encode()),
            tokenizer_fingerprint=folds.tokenizer_fingerprint,
            chat_template_fingerprint=folds.chat_template_fingerprint,
            vocab_size=folds.vocab_size,
            dtype=str(folds.dtype).removeprefix("torch."),
            top_k=top_k,
            tail_policy="sampled" if sampled else tail_policy,
            versions=tool_versions(),
            log_probs_dtype=log_probs_dtype,
            sampled=sampled,
            seed=seed,
            engine_version=tool_versions()["transformers"],
            crossfit=folds.facts(recipe, args) | {"copies": found},
        )
        manifest = write_judged(directory, folds, copies, provenance, shard_rows, progress, processes)
        if recipe.prompts and copies.are_there() and not (directory / SIDE).is_file():
            with TokenMeter(progress, "asking under other prompts", "rows") as meter:
                judge = _judge(folds, copies, found, processes)
                write_contradictions(directory, folds.rows, folds.by_checksum, judge, folds.seed, meter, processes)
    shutil.rmtree(directory / COPIES, ignore_errors=True)
    return manifest


def processes_of(engine: EngineChoice) -> Processes | None:
    """Ray's; None for this process alone.

    Raises:
        ConfigError: a server, which has no copies.
    """
    if engine.is_server:
        raise ConfigError(
            f"engine {engine.name!r} serves one model, and a cross-fit trains copies of the base; expected engine local or ray"
        )
    return Processes(engine.workers, engine.ray_address) if engine.name == "ray" else None


@contextmanager
def one_cluster(directory: Path, processes: Processes | None) -> Iterator[None]:
    """Training, judging and asking on one Ray; none is started for a cache that is finished."""
    with processes.connected() if processes and not (directory / MANIFEST).is_file() else nullcontext():
        yield


def write_judged(
    directory: Path,
    folds: Folds,
    copies: Copies,
    provenance: Provenance,
    shard_rows: int,
    progress: bool,
    processes: Processes | None = None,
) -> Manifest:
    """Score each row with the copy of its fold."""
    fingerprints = (provenance.crossfit or {})["copies"]
    with TokenMeter(enabled=progress) as meter:
        judge = _judge(folds, copies, fingerprints, processes, meter.advance)
        if isinstance(judge, Judge):
            assert processes is not None
            source = JudgePool(folds.by_checksum, judge, folds.vocab_size, processes, copies.expect)
        else:
            source = CrossfitSource(folds.by_checksum, judge, folds.vocab_size)
        head = _head(folds)
        return write_cache(directory, folds.rows, source, provenance, shard_rows=shard_rows, meter=meter, **head)


def _head(folds: Folds) -> dict[str, Any]:
    return {"logit_scale": folds.head.scale, "logit_softcap": folds.head.softcap}


def _judge(
    folds: Folds,
    copies: Copies,
    fingerprints: list[str],
    processes: Processes | None,
    on_tokens: Callable[[int], None] | None = None,
) -> Callable[[int], LocalSource]:
    """Gives the source of a fold's copy."""
    if processes is not None:
        return Judge(copies.files, tuple(fingerprints), _head(folds))

    def judge(fold: int) -> LocalSource:
        return LocalSource(copies.load(fold, fingerprints[fold]), on_tokens=on_tokens, **_head(folds))

    return judge


def said_before(directory: Path, facts: dict[str, Any]) -> list[str] | None:
    """The copies' fingerprints if scoring has begun in this folder already; nothing of copies is known before.

    Raises:
        CacheMismatchError: it was begun with something else (names it), or is no cross-fit.
    """
    wanted = json.loads(json.dumps(facts))
    for name in (PLAN, f"{COPIES}/{PLAN}"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            said = dict(plan["crossfit"] or {})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CacheMismatchError(
                f"{path} is no cross-fit's ({error!r}); choose another folder, or delete this one"
            ) from error
        if differing := differences({key: said.get(key) for key in wanted}, wanted):
            raise CacheMismatchError(
                f"{directory} was begun with another cross-fit: {'; '.join(differing)}; choose another folder, or delete this one"
            )
        if name == PLAN:
            return list(said["copies"])
        return None
    write_json(directory / COPIES / PLAN, {"crossfit": wanted})
    return None
