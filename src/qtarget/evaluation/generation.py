"""Completions by a model of this process: batches padded on the left, greedy or sampled, stopped where a turn ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qtarget.core.errors import ConfigError, DataError, counted
from qtarget.data.checks.findings import named
from qtarget.evaluation.questions import Prompt

logger = logging.getLogger(__name__)

SPARE, SLACK, MOST = 1.5, 16, 2048
"""``new_tokens``: so many times the longest reference and so many tokens more, at most so many."""
LISTED = 100
"""Rows that a message lists; of more the first few, and what tells them from the others."""


@dataclass(frozen=True)
class Completion:
    """What a model said.

    Attributes:
        text: without special tokens.
        stopped: whether it came to an end of its own; False where ``max_new_tokens`` cut it off.
    """

    text: str
    stopped: bool


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens.

    Attributes:
        temperature: 0 takes the most likely token; above, tokens are drawn from the whole distribution.
        samples: completions a prompt.
        seed: of the draws.
    """

    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


GREEDY = Decoding()


def prompt_ids(tokenizer: Any, prompt: Prompt, arguments: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a prompt, as training tokenises it; messages end where the assistant's turn begins.

    Args:
        prompt: text, or messages.
        arguments: for the chat template.

    Raises:
        ConfigError: messages, and no chat template, or one that refuses them.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        # a tokenizer that ends every text with end-of-text would have the answer begin after it
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(
            tokenizer.eos_token) else ids  # fmt: skip
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            f"{tokenizer.name_or_path} has no chat template, and the rows are messages; train with chat_template_path, or "
            "save a tokenizer that has one"
        )
    try:
        return list(
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True,
                                          **(arguments or {}))["input_ids"]
        )  # fmt: skip
    except Exception as error:  # jinja's errors, and whatever a template raises
        raise ConfigError(f"the chat template of {tokenizer.name_or_path} refuses a prompt: {error}") from error


def rows_at_once(model: Any, tokenizer: Any, wanted: int) -> int:
    """``wanted``, or 1 and a warning where padding on the left would change what the model writes."""
    from qtarget.integrations.shared.probes import left_padding_leak  # transformers, only where a model is

    leak = left_padding_leak(model, tokenizer) if wanted > 1 else None
    if leak is None:
        return wanted
    logger.warning(
        "%s: padding on the left moves its logits by %.2g of their size; prompts are answered one at a time instead of %d",
        type(model).__name__,
        leak,
        wanted,
    )
    return 1


def new_tokens(tokenizer: Any, references: Sequence[str]) -> int:
    """How long a completion may become: 1.5 times the longest reference and 16 tokens, at most 2,048."""
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references)
    return min(MOST, math.ceil(SPARE * longest) + SLACK)


def refuse_full(
    lengths: Sequence[int],
    context: int | None,
    file: str,
    numbers: Sequence[int] | None = None,
    model: str = "the model",
) -> None:
    """Raise where a prompt leaves the model no room for an answer.

    Args:
        lengths: of the prompts, tokens.
        context: positions of the model; None: no limit.
        numbers: of the rows in their file, from 0; None: their places.
        model: its name.

    Raises:
        DataError: names all such rows; of very many the length from which on they are too long.
    """
    full = [i for i, length in enumerate(lengths) if context is not None and length >= context]
    rows = full if numbers is None else [numbers[i] for i in full]
    if full:
        few = len(rows) <= LISTED
        which, what = (
            (_all_named(rows), "these rows")
            if few
            else (named(rows), f"rows whose prompt has {context} tokens or more")
        )
        raise DataError(
            f"{file}: {len(full)} of {counted(len(lengths), 'row')} have a prompt that fills the {context} positions of {model} "
            f"(the longest has {max(lengths)} tokens), so nothing can be said after it: {which}; leave out {what}, or judge by "
            "likelihood alone (`evaluate --no-generate`, `compare --metric nll`)"
        )


def _all_named(rows: Sequence[int]) -> str:
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(str(row + 1) for row in rows)}"


def room(lengths: Sequence[int], wanted: int, context: int | None) -> int:
    """New tokens that a batch has room for.

    Args:
        lengths: of its prompts, tokens; see ``refuse_full``.
        wanted: as many as we would like.
        context: positions of the model; None: no limit.
    """
    return wanted if context is None else min(wanted, context - max(lengths))


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[int],
    decoding: Decoding = GREEDY,
    stream: int = 0,
) -> list[list[Completion]]:
    """Completions of one batch of prompts.

    The model's own generation settings (penalties, top-p) do not count: two models are compared by the same rule.

    Args:
        prompts: token ids.
        stops: tokens that end a completion.
        stream: of the random numbers, beside the seed: the same batch of the same data gets the same draws.

    Returns:
        For each prompt, ``decoding.samples`` completions.
    """
    longest, pad = max(map(len, prompts)), pad_id(tokenizer, stops)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    chosen = settings(decoding, max_new_tokens, stops, pad)
    with torch.random.fork_rng(_devices(model)), answering(model, chosen), quiet("transformers.generation"):
        torch.manual_seed(decoding.seed * 1_000_003 + stream)
        generated = model.generate(input_ids=ids, attention_mask=mask)
    said = [completion_of(row, tokenizer, stops) for row in generated[:, longest:].tolist()]
    return [said[i : i + decoding.samples] for i in range(0, len(said), decoding.samples)]


def completion_of(ids: Sequence[int], tokenizer: Any, stops: Sequence[int]) -> Completion:
    """New token ids as text, up to the first that ends a completion."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return Completion(tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None)


def settings(decoding: Decoding, max_new_tokens: int, stops: Sequence[int], pad: int) -> Any:
    """transformers' settings."""
    from transformers import GenerationConfig

    drawn = decoding.temperature > 0
    sampling = {"temperature": decoding.temperature, "top_k": 0, "top_p": 1.0} if drawn else {}
    return GenerationConfig(
        do_sample=drawn,
        num_return_sequences=decoding.samples,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
        use_cache=True,
        **sampling,
    )


def pad_id(tokenizer: Any, stops: Sequence[int]) -> int:
    """Any token will do: it is masked before a prompt, and stands after a stop."""
    found = getattr(tokenizer, "pad_token_id", None)
    return int(found) if found is not None else int(stops[0]) if stops else 0


def _devices(model: Any) -> list[Any]:
    return [model.device] if model.device.type == "cuda" else []


@contextmanager
def answering(model: Any, chosen: Any) -> Iterator[None]:
    """The model without dropout and with these settings alone, and as it was afterwards.

    ``generate`` fills what its ``generation_config`` leaves open from the model's own (transformers 5.23,
    ``_prepare_generation_config``): a minimal length, suppressed tokens, penalties. It asks the head for the last position
    alone, a slice for which torch 2.13 on a CPU copies the head once for every prompt of the batch.
    """
    was_training, own = model.training, model.generation_config
    head = model.get_output_embeddings()
    hook = head and head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    model.eval()
    model.generation_config = chosen
    try:
        yield
    finally:
        if hook:
            hook.remove()
        model.train(was_training)
        model.generation_config = own


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Without the warnings of one logger, about what is done here on purpose."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
