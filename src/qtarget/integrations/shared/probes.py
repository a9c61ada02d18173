"""Whether rows that share a batch stay apart: run a few tokens, and compare what must not differ.

Exchanging what a token must not see leaves its hidden states alone to the last bit, whatever the weights' scale and
dtype, because shapes and operations stay the same. That makes a leak visible in a model fresh from its initialisation,
where it is small, and in half precision, where rounding would hide it from any comparison of unequal computations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from qtarget.core.errors import QTargetError, UnsupportedModelError
from qtarget.core.shapes import Tensor
from qtarget.loss.zero3 import gathered_while_running, whole_shape
from qtarget.scoring.sources.local import evaluating

LENGTHS = (13, 11, 9)
"""Tokens of the probe's documents: what comes before, the one that is looked at, what comes after."""

ROUNDINGS = 10.0
"""A leak exceeds what an exchange *behind* a document does to it, which is rounding, by this factor."""

Run = Callable[[dict[str, Any]], Tensor]
"""Hidden states ``[batch, time, width]`` of a model's inputs."""

Collate = Callable[[list[list[int]]], dict[str, Any]]
"""A model's inputs for documents that share a row, made by the collator that training uses."""


@contextmanager
def probing(model: torch.nn.Module) -> Iterator[None]:
    """No gradient, no dropout, nothing compiled; modes of all modules and all random states are as before afterwards."""
    devices = range(torch.cuda.device_count())
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        yield


def is_exact(model: PreTrainedModel) -> bool:
    """Whether the model computes in full float32."""
    device = model.device.type
    tensor_float = device == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return model.dtype == torch.float32 and not torch.is_autocast_enabled(device) and not tensor_float


def random_tokens(model: PreTrainedModel, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Token ids of so many documents, the same for the same seed; none that the configuration gives a meaning to."""
    special = {
        value for name, value in vars(model.config).items() if name.endswith("token_id") and isinstance(value, int)
    }
    head: Any = model.get_output_embeddings()
    rows = whole_shape(head.weight)[0]
    ordinary = torch.tensor([i for i in range(min(rows, 4096)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    return [ordinary[torch.randint(len(ordinary), (n,), generator=generator)].tolist() for n in lengths]


def relative(actual: Tensor, expected: Tensor) -> float:
    """Size of the difference over the size of what was expected, in float32."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def refuse_leaks(model: PreTrainedModel, collate: Collate, run: Run, key: str, *, trained: bool) -> None:
    """Make sure that documents in one row do not see one another.

    Args:
        model: decides tokens, tolerance and the words of the error.
        collate: puts documents into one row, with the very keys that training's collator makes.
        run: the way that training takes through the model.
        key: the setting that brought documents into one row.
        trained: the model runs in training mode, where some architectures take other kernels.

    Raises:
        UnsupportedModelError: a document changes with the one before it, is not what it is alone, or the model cannot
            run packed rows at all.
    """
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    who = f"{type(model).__name__} with attn_implementation {attention!r}"
    way_out = f"set {key}: false, or give the model an attn_implementation that keeps packed documents apart"
    head: Any = model.get_output_embeddings()
    try:
        with probing(model), gathered_while_running(model, head):
            moved, alone = _leaks(model, collate, run, trained)
    except QTargetError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedModelError(f"{who} cannot run packed rows: {error}; {way_out}") from error
    if moved is not None:
        raise UnsupportedModelError(
            f"{who} leaks between packed documents: exchanging one document moves the hidden states of the next by "
            f"{moved:.2g} of their size, expected 0; {way_out}"
        )
    if alone is not None:
        raise UnsupportedModelError(
            f"{who} computes a document differently behind another one than alone: its hidden states differ by "
            f"{alone:.2g} of their size, expected rounding; {way_out}"
        )


def _leaks(model: PreTrainedModel, collate: Collate, run: Run, trained: bool) -> tuple[float | None, float | None]:
    """How far a document moves with the one before it, and against itself alone; None where that is rounding."""
    before, document, after = random_tokens(model, LENGTHS, 0)
    other, _, behind = random_tokens(model, LENGTHS, 1)
    mine = slice(len(before), len(before) + len(document))

    def states(documents: list[list[int]]) -> Tensor:
        torch.manual_seed(0)  # dropout of equal shapes drops the same
        inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in collate(documents).items()}
        return run(inputs)[0]

    model.train(trained)
    packed = states([before, document, after])[mine]
    exchanged = states([other, document, after])[mine]
    rounding = states([before, document, behind])[mine]
    exact = is_exact(model)
    limit = max(ROUNDINGS * relative(rounding, packed), 1e-5 if exact else 5e-4)
    moved = relative(exchanged, packed)
    model.eval()
    apart = relative(states([before, document, after])[mine], states([document])[: len(document)])
    far = max(ROUNDINGS * relative(rounding, packed), 1e-3 if exact else 1e-1)
    return moved if moved > limit else None, apart if apart > far else None


def refuse_sight_of_later_tokens(model: PreTrainedModel, run: Run) -> None:
    """Make sure that a token's hidden states depend on nothing behind it, be it tokens or padding on the right.

    Raises:
        UnsupportedModelError: they do.
    """
    (row,) = random_tokens(model, (12,), 2)
    kept = 8
    ids = torch.tensor([row, [*row[:kept], *[row[0]] * (len(row) - kept)]], device=model.device)
    mask = torch.ones_like(ids)
    mask[1, kept:] = 0
    hidden = run({"input_ids": ids, "attention_mask": mask})
    seen = relative(hidden[1, :kept], hidden[0, :kept])
    if seen > (1e-4 if is_exact(model) else 3e-2):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a causal language model as it is configured: taking later tokens away moves the "
            f"hidden states of earlier ones by {seen:.2g} of their size, expected 0; give a decoder-only model, or set what "
            "makes this one causal (is_decoder: true in its config.json, where it has such a key)"
        )


def left_padding_leak(model: Any, tokenizer: Any) -> float | None:
    """How far padding on the left moves the logits of generation, relative to their size; None where that is rounding.

    Two tokens are generated, greedily: the second one comes from the cache.
    """
    (row,) = random_tokens(model, (9,), 3)
    (other,) = random_tokens(model, (4,), 4)

    def logits(padding: list[int]) -> tuple[Tensor, ...]:
        ids = torch.tensor([padding + row], device=model.device)
        mask = torch.tensor([[0] * len(padding) + [1] * len(row)], device=model.device)
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=2,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id,
        ).logits

    with probing(model):
        alone, padded, exchanged = logits([]), logits([tokenizer.pad_token_id] * len(other)), logits(other)
    exact = is_exact(model)
    moved, apart = _moved(exchanged, padded), _moved(padded, alone)
    leaks = moved > (1e-5 if exact else 5e-4) or apart > (1e-3 if exact else 1e-1)
    return max(moved, apart) if leaks else None


def _moved(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Of the logits of each step, as long as the steps before chose the same token."""
    worst = 0.0
    for mine, theirs in zip(actual, expected, strict=False):
        worst = max(worst, relative(mine, theirs))
        if mine.argmax() != theirs.argmax():
            break
    return worst
