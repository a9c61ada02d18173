"""Score the frozen model over exactly the rows, tokens and masks that training will see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError
from qtarget.integrations.trl_sft import QTargetConfig, QTargetTrainer, changed
from qtarget.scoring.local import score_rows
from qtarget.scoring.schema import Manifest, fingerprint_chat_template, fingerprint_tokenizer
from qtarget.types import TailPolicy


def score(
    model: Any,
    args: QTargetConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: Any = None,
    *,
    directory: str | Path,
    top_k: int = 0,
    tail_policy: TailPolicy = "bucket",
    log_probs_dtype: str = "float32",
    model_id: str | None = None,
    progress: bool = True,
) -> Manifest:
    """Write a reference cache for the training (and evaluation) rows.

    Args:
        model: the frozen model: a name, path or model.
        args: the training configuration; its data settings decide the tokens.
        top_k: how many log-probs a token to keep; 0 keeps the label's alone, which weights need; anchors and teachers
            need a distribution.
        tail_policy: see ``qtarget.Reference``.
        log_probs_dtype: of the stored top-k log-probs; ``float16`` takes two thirds of the space.

    Returns:
        The manifest of the finished cache.

    Raises:
        ConfigError: packing that cuts rows apart.
    """
    if args.packing and args.packing_strategy != "bfd":
        raise ConfigError(
            f"packing_strategy {args.packing_strategy!r} cuts rows apart, and a cache holds whole rows; use 'bfd'"
        )
    plain = changed(
        args, target="sft", target_kwargs=None, packing=False, eval_packing=False, padding_free=False, report_to=[]
    )
    trainer = QTargetTrainer(model, plain, train_dataset, eval_dataset, processing_class)
    evals: Any = trainer.eval_dataset
    sets: list[Any] = [
        trainer.train_dataset,
        *(evals.values() if isinstance(evals, dict) else [evals] if evals is not None else []),
    ]
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for part in sets for row in part]
    base = trainer._base_model()
    tokenizer = trainer.processing_class
    return score_rows(
        base,
        rows,
        directory,
        model_id=model_id or str(getattr(base.config, "_name_or_path", "") or type(base).__name__),
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        chat_template_fingerprint=fingerprint_chat_template(trainer.chat_template or tokenizer),
        top_k=top_k,
        tail_policy=tail_policy,
        log_probs_dtype=log_probs_dtype,
        logit_scale=trainer.head_spec.scale,
        logit_softcap=trainer.head_spec.softcap,
        progress=progress,
    )
