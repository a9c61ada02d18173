"""The key ``algorithm``: what a config is for, where one verb stands for several."""

from __future__ import annotations

from collections.abc import Mapping

from qtarget.cli.options.settings import Setting
from qtarget.core.errors import ConfigError

SFT, RL = "sft", "rl"


def check_algorithm(settings: Mapping[str, Setting], default: str = SFT) -> str:
    """The algorithm of a config.

    Raises:
        ConfigError: another word, or one that the verb does not go with.

    Example:
        >>> check_algorithm({"algorithm": Setting("rl", "run.yaml")})
        'rl'
    """
    if (setting := settings.get("algorithm")) is None:
        return default
    if setting.value not in (SFT, RL):
        raise ConfigError(
            f"algorithm: {setting.value} ({setting.origin}); expected {SFT} (demonstrations) or {RL} (samples of the model's own)"
        )
    if default == RL and setting.value != RL:
        raise ConfigError(
            f"algorithm: {setting.value} ({setting.origin}) is `qtarget train`'s; leave it out, or set {RL}"
        )
    return str(setting.value)
