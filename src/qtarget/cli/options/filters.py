"""Whether a filter can tell rows of a config apart: the one place where `compare` asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.cli.options.recipe import ConfigRecipe


def why_not_filtered(recipe: ConfigRecipe, rule: str) -> str | None:
    """Why a filtered contender would train on what the plain one trains on; None where the filter tells rows apart.

    Raises:
        ConfigError: there is no such filter.
    """
    raise ConfigError(f"--filters {rule}: this version has no filters; leave it out")
