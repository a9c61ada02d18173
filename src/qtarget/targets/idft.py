"""DFT with an exponent that follows the model's confidence."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import LabelWeight, Needs, TokenView


@dataclass(frozen=True)
class IDFT(LabelWeight):
    """``w = p_y^g``, ``g = clip(exp(-(log p_y + H) / beta), 0.1, 2)``; ``a = w``, ``b = 0``.

    Args:
        beta: temperature of the exponent, above 0; 1 is the paper's.

    Example:
        >>> import torch, qtarget
        >>> qtarget.target_loss(torch.zeros(1, 4), torch.tensor([0]), qtarget.get_target("idft"))  # g = 1: dft
        tensor(0.3466)

    Reference: arXiv 2602.12222. Deviations: none.
    """

    beta: float = 1.0

    name = "idft"
    formula = "-sg(p_y^g) log p_y, g = clip(exp(-(log p_y + H)/beta), 0.1, 2)"
    paper = "2602.12222"

    def __post_init__(self) -> None:
        in_range(self, "beta", 0, open_low=True)

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True)

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        assert x.entropy is not None
        log_probs = x.label_log_probs.detach()
        exponent = (-(log_probs + x.entropy.detach()) / self.beta).exp().clamp(0.1, 2.0)  # bounds: the paper's
        return (exponent * log_probs).exp()
