"""A config that contenders vary: it travels to worker processes, which build what `qtarget train` would run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.cli.options.settings import Setting

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig
    from qtarget.scoring.cache.reader import ReferenceCache

OWN = ("target", "target_kwargs", "guard", "filter")
"""Keys that each contender gives itself."""


@dataclass(frozen=True)
class ConfigRecipe:
    """See ``qtarget.comparison.worker.Recipe``.

    Attributes:
        path: of the config.
        given: its keys, typed, with paths resolved.
        forgetting: a file of rows, or None.
    """

    path: Path
    given: Mapping[str, Any]
    forgetting: str | None = None

    def config(self, overrides: Mapping[str, Any]) -> RunConfig:
        """The config with some keys of its own.

        Raises:
            ConfigError: see ``build_config``.
        """
        from qtarget.cli.options.config import build_config

        keys = {key: value for key, value in self.given.items() if key not in OWN} | dict(overrides)
        absent = {key for key in OWN if keys.get(key) is None}
        return build_config({k: Setting(v, str(self.path)) for k, v in keys.items() if k not in absent}, self.path)

    def _plain(self) -> RunConfig:
        return self.config({"target": "sft"})

    def rows(self) -> tuple[Any, Any]:
        """Training and validation rows."""
        from qtarget.cli.options.datasets import load_datasets

        return load_datasets(self._plain(), overlap=False)

    def forgetting_rows(self) -> Any:
        """Rows of what the base could do before, or None."""
        from qtarget.cli.options.datasets import load_elsewhere

        return None if self.forgetting is None else load_elsewhere(self.forgetting, self._plain())

    def settings(self) -> dict[str, Any]:
        """The keys, resolved."""
        from qtarget.cli.options.config import resolved_settings

        return resolved_settings(self._plain())

    def trainer(self, overrides: Mapping[str, Any], train_rows: Any, validation_rows: Any) -> Any:
        """What `qtarget train` would run."""
        from qtarget.cli.train import build_trainer

        return build_trainer(self.config(overrides), train_rows, validation_rows)


def why_not_filtered(recipe: ConfigRecipe, rule: Any, rows: Any) -> str | None:
    """Why a filtered contender would train on what the plain one trains on; None where the filter tells rows apart.

    Args:
        rule: as the config's ``filter``.
        rows: to be trained on.

    Raises:
        ConfigError: there is no such filter.
    """
    from qtarget.cli.filter import decide_config

    found = decide_config(recipe.config({"target": "sft", "filter": rule}), rule, data=rows).decision
    if found.dropped or found.weights.min() < 1:
        return None
    return (
        found.summary + "; the same command with `--filters none,crossfit --resume` asks them" * found.copies_may_tell
    )


def led_astray(witness: ReferenceCache, reference: str) -> tuple[str, str | None]:
    """What to say of copies that do not know the rows; or why a contender must not be led by them, None where it may be.

    Args:
        reference: the base's cache.
    """
    from qtarget.filtering.copies import judge_copies, next_step
    from qtarget.scoring.cache.reader import ReferenceCache

    found = judge_copies(witness, ReferenceCache.open(reference, verify=False))
    if found.known:
        return "", None
    line = f"witness: {found.sentence}; {next_step(found, witness)}"
    return ("", line) if found.behind else (line, None)
