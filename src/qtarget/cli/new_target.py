"""``qtarget targets new NAME``: a target of one's own, and its test."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import sys
from pathlib import Path

from qtarget.core.errors import ConfigError

TARGET = '''"""A target of my own: sft's weight where the model is unsure, scaled down to a floor."""

from dataclasses import dataclass

import qtarget


@dataclass(frozen=True)
class {cls}(qtarget.LabelWeight):
    """``w = f + (1 - f) p_y``: between sft (f = 1) and dft (f = 0).

    Args:
        floor: ``f`` in [0, 1], the weight of a label that the model excludes.

    Reference: ours.
    """

    floor: float = 0.5

    name = "{name}"
    formula = "-(f + (1 - f) p_y) log p_y"
    paper = "ours"

    def __post_init__(self):
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={{self.floor}}; expected a number in [0, 1]")

    # What the weight needs beyond log p_y of the live model, for instance the frozen base's log p_y:
    # @property
    # def needs(self):
    #     return qtarget.Needs(reference=frozenset({{"label_log_probs"}}))

    def label_weights(self, x: qtarget.TokenView):
        """One weight a token, at least 0 and detached; ``x`` says what is known of the tokens."""
        return self.floor + (1 - self.floor) * x.label_probs
'''

TEST = '''"""The contract, a number worked out by hand, and what the target teaches. Run: pytest test_{name}.py"""

import math

import pytest
import qtarget
import torch

from {name} import {cls}


def test_it_keeps_the_contract():
    qtarget.check_target({cls}())


def test_the_loss_is_the_formula():
    # four tokens, equally likely: p_y = 1/4, w = 1/2 + 1/2 x 1/4 = 0.625
    loss = qtarget.target_loss(torch.zeros(1, 4), torch.tensor([2]), {cls}(floor=0.5))
    assert float(loss) == pytest.approx(0.625 * math.log(4))


def test_what_it_teaches():
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    seen = qtarget.induced_target(lambda z, y: qtarget.target_loss(z, y, {cls}(floor=0.5)), logits, labels)
    p_y = seen.probs[torch.arange(5), labels]
    assert torch.allclose(seen.label_weight, 0.5 + 0.5 * p_y)  # a
    assert seen.in_simplex.all()


def test_the_floor_is_checked():
    with pytest.raises(ValueError, match="floor"):
        {cls}(floor=2)
'''


def write_target(name: str, folder: Path) -> tuple[str, list[Path]]:
    """Write ``NAME.py`` and ``test_NAME.py``; what is there stays.

    Returns:
        The target's name in configs, and the files.

    Raises:
        ConfigError: no name of a module, a name that is taken, or a file that is there.
    """
    refuse_name(name, folder)
    cls = "".join(part.capitalize() for part in name.split("_"))
    texts = {folder / f"{name}.py": TARGET, folder / f"test_{name}.py": TEST}
    for path in texts:
        if os.path.lexists(path):
            raise ConfigError(
                f"{path.name} is there already and is left as it is; choose another name, or move it away"
            )
    for path, text in texts.items():
        with path.open("x", encoding="utf-8") as file:
            file.write(text.format(name=name, cls=cls))
    return f"{name}:{cls}", list(texts)


def refuse_name(name: str, folder: Path) -> None:
    """Refuse what cannot be imported, or would be hidden by something else.

    Raises:
        ConfigError: see the message.
    """
    from qtarget.registry import available_targets

    if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} is no name for a target; expected small letters, digits and _, beginning with a letter, such as my_target"
        )
    if name in available_targets() or name == "new":
        raise ConfigError(f"{name} is a built-in name; choose another, such as my_{name}")
    # installed packages are searched before the current folder
    found = importlib.util.find_spec(name)
    if found is not None and (name in sys.stdlib_module_names or Path(found.origin or "").parent != folder.resolve()):
        raise ConfigError(
            f"a module {name} is installed and would be imported instead; choose another name, such as my_{name}"
        )
