"""A teacher: what ``teacher`` names, and whether its tokens are ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from qtarget.command import command_for
from qtarget.core.errors import ConfigError
from qtarget.core.shapes import Tensor
from qtarget.core.types import Reference
from qtarget.integrations.shared.frozen import FrozenSettings
from qtarget.loss.zero3 import whole_shape
from qtarget.scoring.cache.schema import MANIFEST
from qtarget.scoring.vocabulary import require_same_tokens, shared_vocab

logger = logging.get_logger(__name__)

LIVE, AUTO = "live", "auto"
"""Values of ``reference`` that name no place: the model itself at each step, or a cache where `qtarget train` makes one."""


def is_url(value: str | None) -> bool:
    """Whether a frozen model is named by its server's address.

    Example:
        >>> is_url("http://127.0.0.1:8000"), is_url("self"), is_url(None)
        (True, False, False)
    """
    return value is not None and value.startswith(("http://", "https://"))


def place_frozen(args: FrozenSettings, role: str) -> str | None:
    """Read ``teacher`` or ``reference`` for what it is, and set the key that says so; a URL is returned.

    Raises:
        ConfigError: the longer key is set too, or a folder is neither cache nor model.
    """
    value = getattr(args, role)
    if value is None or (role == "reference" and value in (LIVE, AUTO)):
        return None
    cache, model = getattr(args, f"{role}_cache"), getattr(args, f"{role}_model_name_or_path")
    if is_url(value):
        if cache is not None:
            raise ConfigError(f"{role}: {value} and {role}_cache: {cache} are both set; keep one of them")
        return value
    folder = Path(value)
    if (folder / MANIFEST).is_file():
        key, kind = f"{role}_cache", "a cache"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{role}: {value} has neither {MANIFEST} (a finished cache) nor config.json (a model); finish the cache with "
            f"`{command_for('score', '--role', role)}`, or name a model"
        )
    else:
        named = "a model" if folder.is_dir() else "no folder here, so the hub name of a model"
        key, kind = f"{role}_model_name_or_path", f"{named}, run live at each step"
    if (other := cache if key.endswith("cache") else model) is not None:
        raise ConfigError(f"{role}: {value} is {kind}, and {key}: {other} is set too; keep one of them")
    if not key.endswith("cache") and cache is not None:
        raise ConfigError(f"{role}: {value} is {kind}, and {role}_cache: {cache} is set too; keep one of them")
    setattr(args, key, value)
    # a warning, because transformers' logger shows no information unless it is asked to
    logger.warning(f"{role}: {value} is {kind}")
    return None


def compare_tokenizers(ours: Any, name: str, **options: Any) -> None:
    """Make sure that the tokenizer of the model ``name`` has our tokens.

    Raises:
        CacheMismatchError: names the first tokens that differ.
    """
    try:
        theirs = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        logger.warning(f"{name} comes without a tokenizer, so its tokens were not compared with ours ({error})")
        return
    require_same_tokens(getattr(ours, "tokenizer", ours), theirs, name)


def vocab_with_teacher(args: FrozenSettings, student: int, teacher: int, tokenizer: Any) -> int | None:
    """``shared_vocab``, said in the log; a live teacher that is loaded by name must have our tokens as well.

    Args:
        student, teacher: vocabulary rows of their heads.
        tokenizer: of the model that is trained.

    Raises:
        CacheMismatchError: the tokens differ, or the sizes and ``vocab_padding`` refuses.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if args.teacher_cache is None and args.teacher_model_name_or_path is not None:
        compare_tokenizers(tokenizer, args.teacher_model_name_or_path)
    shared = shared_vocab(student, teacher, tokenizer, args.vocab_padding)  # pyright: ignore[reportArgumentType]
    if shared is not None:
        logger.warning(
            f"vocab_padding: the model has {student} vocabulary rows, the teacher {teacher}; both are compared on the first "
            f"{shared}, the others belong to no token"
        )
    return shared


def head_rows(model: Any) -> int:
    """Vocabulary rows of a model's head."""
    return whole_shape(model.get_output_embeddings().weight)[0]


def truncate_reference(reference: Reference, rows: int) -> Reference:
    """The same distribution given that the token is one of the first ``rows``: listed ids beyond them leave their slots.

    What a longer teacher gave to ids of padding that its top-k does not list stays in the tail.
    """
    ids, log_probs = reference.topk_ids, reference.topk_log_probs
    if ids is None or log_probs is None or not (beyond := ids >= rows).any():
        return reference
    lost = log_probs.masked_fill(~beyond, -torch.inf).exp().sum(-1)
    # log1p, because what is lost may be far below the last digit of 1
    kept = torch.log1p(-lost)  # of the mass, in nats

    def given(value: Tensor | None) -> Tensor | None:
        return None if value is None else value - kept

    return replace(
        reference,
        label_log_probs=given(reference.label_log_probs),
        topk_ids=ids.masked_fill(beyond, -1),
        topk_log_probs=(log_probs - kept[..., None]).masked_fill(beyond, -torch.inf),
        tail_log_mass=given(reference.tail_log_mass),
    )
