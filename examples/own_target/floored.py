"""A target of one's own: dft's weight with a floor, so that a label that the model excludes still teaches."""

from dataclasses import dataclass

import qtarget


@dataclass(frozen=True)
class Floored(qtarget.LabelWeight):
    """``w = f + (1 - f) p_y``: between sft (f = 1) and dft (f = 0).

    Args:
        floor: ``f`` in [0, 1].

    Reference: ours.
    """

    floor: float = 0.2

    name = "floored"
    formula = "-(f + (1 - f) p_y) log p_y"
    paper = "ours"

    def __post_init__(self):
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}; expected a number in [0, 1]")

    def label_weights(self, x: qtarget.TokenView):
        return self.floor + (1 - self.floor) * x.label_probs
