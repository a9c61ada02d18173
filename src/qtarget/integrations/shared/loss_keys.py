"""Keys of TRL's and transformers' that choose another loss."""

from __future__ import annotations

from typing import Any

from qtarget.core.errors import ConfigError


def check_loss_keys(config: Any) -> None:
    """Refuse ``loss_type`` and ``label_smoothing_factor``: the loss is chosen by ``target``.

    Raises:
        ConfigError: one of them is set.
    """
    if config.loss_type != "nll" or config.label_smoothing_factor:
        raise ConfigError(
            "the loss is chosen by `target` (dft, label_smoothing, ...); leave loss_type and label_smoothing_factor unset"
        )
