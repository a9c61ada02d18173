"""Exact token-weighted training statistics between two log lines, over all ranks."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from qtarget.core.shapes import Tensor
from qtarget.integrations.shared.step import TargetOutput


class TokenSums:
    """Sums over supervised tokens since the last log line.

    Reported: ``nll`` (nats a token, the plain one, whatever the objective), ``label_weight`` (mean ``a``),
    ``effective_sample_size`` (``(sum a)^2 / (n sum a^2)``: 1 when all tokens weigh alike), ``residual_share``
    (``sum |b| / sum (|a| + |b|)``), ``entropy`` (nats), ``mean_token_accuracy``.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, output: TargetOutput, mask: Tensor) -> None:
        """Add one micro-batch; ``mask`` is true at supervised (shifted) positions."""
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
        # stays on the device: reading it at every step would wait for the device
        sums = torch.stack([part.detach().double().sum() for part in parts])
        self._sums = sums if self._sums is None else self._sums + sums

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """The statistics over all ranks, and start again; empty when nothing was added."""
        if self._sums is None:
            return {}
        total = accelerator.reduce(self._sums, reduction="sum")
        self._sums = None
        n, nll, a, a2, abs_a, abs_b, entropy, correct = (float(v) for v in total)  # pyright: ignore[reportGeneralTypeIssues]
        if not n:
            return {}
        return {
            "nll": nll / n,
            "label_weight": a / n,
            "effective_sample_size": a * a / (n * a2) if a2 else 0.0,
            "residual_share": abs_b / (abs_a + abs_b) if abs_a + abs_b else 0.0,
            "entropy": entropy / n,
            "mean_token_accuracy": correct / n,
        }
