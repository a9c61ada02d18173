"""Exact token-weighted training statistics between two log lines, over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from qtarget.core.shapes import Tensor
from qtarget.integrations.shared.step import TargetOutput


class TokenSums:
    """Sums over supervised tokens since the last log line.

    Reported: ``nll`` (nats a token, the plain one, whatever the objective), ``label_weight`` (mean ``a``),
    ``effective_sample_size`` (``(sum a)^2 / (n sum a^2)``: 1 when all tokens weigh alike), ``residual_share``
    (``sum |b| / sum (|a| + |b|)``), ``entropy`` (nats), ``mean_token_accuracy``; ``aux_loss`` of a mixture of experts, the
    mean over batches as in TRL.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, output: TargetOutput, mask: Tensor, counted: Tensor | None = None) -> None:
        """Add one micro-batch.

        Args:
            mask: true at supervised (shifted) positions, ``[batch, time]``.
            counted: false where a row only fills up the last batch; the same shape, or ``[batch, 1]``.
        """
        assert output.label_weights is not None and output.residual_weights is not None
        assert output.label_log_probs is not None and output.entropy is not None and output.correct is not None
        a, b = output.label_weights, output.residual_weights
        parts = (
            mask,
            -output.label_log_probs,
            a,
            a * a,
            a.abs(),
            b.abs(),
            output.entropy,
            output.correct,
        )
        kept: Any = 1 if counted is None else counted
        aux = output.aux_loss
        batches = [mask.new_zeros(2, dtype=torch.double)] if aux is None else [torch.stack([aux, aux * 0 + 1])]
        # stays on the device: reading it at every step would wait for the device
        sums = torch.cat(
            [
                torch.stack([(part.detach().double() * kept).sum() for part in parts]),
                *(b.detach().double() for b in batches),
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums

    def clear(self) -> None:
        """Forget what was added since the last log line."""
        self._sums = None

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """The statistics over all ranks, and start again; empty when nothing was added."""
        if self._sums is None:
            return {}
        total = accelerator.reduce(self._sums, reduction="sum")
        self._sums = None
        n, nll, a, a2, abs_a, abs_b, entropy, correct, aux, batches = (float(v) for v in total)  # pyright: ignore[reportGeneralTypeIssues]
        balance = {"aux_loss": aux / batches} if batches else {}
        if not n:
            return balance
        return balance | {
            "nll": nll / n,
            "label_weight": a / n,
            "effective_sample_size": a * a / (n * a2) if a2 else 0.0,
            "residual_share": abs_b / (abs_a + abs_b) if abs_a + abs_b else 0.0,
            "entropy": entropy / n,
            "mean_token_accuracy": correct / n,
        }


def counted_tokens(accelerator: Accelerator, rows: int, example_ids: Tensor | None) -> Tensor | None:
    """Which (shifted) tokens of an evaluation batch are data, and not there to fill the last batch; None if all are.

    Accelerate repeats the first examples until every rank has a whole batch, and knows how many of all ranks' examples
    are real. A stream has no length, so nothing is known there and all are counted.

    Args:
        rows: of the batch.
        example_ids: the example of each token, ``[batch, time]``, where several stand in one row of the batch.
    """
    state: Any = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    ids = torch.arange(rows, device=accelerator.device)[:, None] if example_ids is None else example_ids[:, 1:]
    return ids < state.remainder - accelerator.process_index * (int(ids.max()) + 1)


class SeenTokens(TrainerCallback, ExportableState):
    """Tokens trained on (not padding), over all ranks; a resumed run goes on counting.

    Args:
        total: to start from.
    """

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self._pending: Tensor | None = None

    def add(self, inputs: dict[str, Any]) -> None:
        """Count one training batch of this rank: its attention mask, or its length where nothing is padded."""
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].new_tensor(
            inputs["input_ids"].numel()
        )  # fmt: skip
        self._pending = tokens if self._pending is None else self._pending + tokens

    def settle(self, accelerator: Accelerator, copies: int = 1) -> int:
        """The total over all ranks; every rank must call it.

        Args:
            copies: ranks that were given the same batch (tensor parallelism).
        """
        if self._pending is not None:
            self.total += int(accelerator.reduce(self._pending, reduction="sum")) // copies  # pyright: ignore[reportArgumentType]
            self._pending = None
        return self.total

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"total": self.total}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the checkpoint that is resumed."""
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.total = kept["args"]["total"]
