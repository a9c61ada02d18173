"""What follows from rows, model and machine: the settings that matter, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qtarget.starting.machine import Machine

LENGTH_STEP = 64
ROWS_A_STEP = 16
STEPS_AN_EPOCH = 20
USED = 0.7
"""Share of the free memory that the estimate may fill: it knows neither fragments nor the libraries' own."""
FULL_BYTES = 16
"""A trained parameter: weight, gradient and two moments of Adam, in float32."""
FROZEN_BYTES = 4
VALUES_A_LAYER = 20
"""Numbers as wide as the model that a layer keeps of a token for its gradient (Korthikanti et al. 2022: 34 bytes in half
precision, without attention's scores)."""
LOGITS_AT_ONCE = 3 * 2**27
"""Bytes of the loss's chunk of logits and what is made of it."""
RATES = ((10_000_000, 1e-3), (100_000_000, 3e-4), (1_000_000_000, 5e-5), (10_000_000_000, 2e-5))
"""Learning rates of all weights, by parameters up to; beyond the last 1e-5."""
ADAPTER_RATE = 2e-4
WASTE = 0.3
"""Share of padding from which packing is worth it."""


@dataclass(frozen=True)
class Size:
    """A model's numbers.

    Attributes:
        parameters, layers, width, vocabulary: of its architecture.
        positions: tokens that it can place, or None.
    """

    parameters: int
    layers: int
    width: int
    vocabulary: int
    positions: int | None


@dataclass(frozen=True)
class Fit:
    """How training fits into memory.

    Attributes:
        batch: rows at once.
        accumulation: batches a step.
        adapter: whether only an adapter is trained (LoRA).
        checkpointing: whether activations are computed twice, to save memory.
        needed: bytes by the estimate.
        fits: whether that is less than what may be used.
    """

    batch: int
    accumulation: int
    adapter: bool
    checkpointing: bool
    needed: int
    fits: bool


def row_length(lengths: Sequence[int], positions: int | None) -> int:
    """``max_length``: the longest row, rounded up, within what the model can place.

    Example:
        >>> row_length([10, 70], None), row_length([10, 5000], 2048)
        (128, 2048)
    """
    longest = -(-max(lengths, default=1) // LENGTH_STEP) * LENGTH_STEP
    return min(longest, positions) if positions else longest


def rows_a_step(rows: int) -> int:
    """A power of two up to 16 that leaves an epoch about 20 steps.

    Example:
        >>> [rows_a_step(n) for n in (5, 100, 5000)]
        [1, 4, 16]
    """
    wanted = max(1, min(ROWS_A_STEP, rows // STEPS_AN_EPOCH))
    return 1 << (wanted.bit_length() - 1)


def memory(size: Size, tokens: int, *, adapter: bool, checkpointing: bool, bf16: bool) -> int:
    """Bytes that a step takes: weights with their gradients and moments, activations, and the loss's chunk of logits.

    Args:
        tokens: of a batch, padding included.
    """
    weights = size.parameters * (FROZEN_BYTES if adapter else FULL_BYTES)
    number = 2 if bf16 else 4
    # computed twice, a layer keeps its input, and one layer at a time all of the rest
    kept = size.layers + VALUES_A_LAYER if checkpointing else size.layers * VALUES_A_LAYER
    return weights + tokens * size.width * kept * number + LOGITS_AT_ONCE


def fit(size: Size, length: int, rows: int, machine: Machine, adapter: bool | None = None) -> Fit:
    """The largest batch that fits: all weights before an adapter, activations kept before computed twice.

    Args:
        length: tokens of the longest row.
        rows: of the training data.
        adapter: what the user asked for (``use_peft``), if anything.
    """
    kinds = (False, True) if adapter is None else (adapter,)
    room, step = int(USED * machine.free), rows_a_step(rows)
    for kind in kinds:
        for batch in [step >> i for i in range(step.bit_length())]:
            for checkpointing in (False, True):
                needed = memory(size, batch * length, adapter=kind, checkpointing=checkpointing, bf16=machine.bf16)
                if needed <= room:
                    return Fit(batch, step // batch, kind, checkpointing, needed, True)
    needed = memory(size, length, adapter=kinds[-1], checkpointing=True, bf16=machine.bf16)
    return Fit(1, step, kinds[-1], True, needed, False)


def learning_rate(parameters: int, adapter: bool) -> float:
    """A usual rate for a model of this size; `qtarget compare` tries others.

    Example:
        >>> learning_rate(1_800_000, False), learning_rate(7_000_000_000, False), learning_rate(7_000_000_000, True)
        (0.001, 2e-05, 0.0002)
    """
    if adapter:
        return ADAPTER_RATE
    return next((rate for most, rate in RATES if parameters <= most), 1e-5)


def epochs(rows: int) -> int:
    """Fewer over more rows.

    Example:
        >>> epochs(600), epochs(50_000), epochs(500_000)
        (3, 2, 1)
    """
    return 3 if rows <= 20_000 else 2 if rows <= 100_000 else 1


def packing_pays(lengths: Sequence[int], length: int, batch: int) -> bool:
    """Whether batches would be padding to a good part, and packed rows are enough for a training.

    Args:
        lengths: of the training rows.
        length: ``max_length``.
        batch: rows a step, without packing.
    """
    cut = [min(n, length) for n in lengths]
    starts = range(0, len(cut) - batch + 1, batch)
    padded = sum(batch * max(cut[i : i + batch]) for i in starts)
    waste = 1 - sum(sum(cut[i : i + batch]) for i in starts) / padded if padded else 0.0
    return waste > WASTE and sum(cut) // length >= STEPS_AN_EPOCH * ROWS_A_STEP
