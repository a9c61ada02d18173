"""Where results go."""

from __future__ import annotations

from pathlib import Path

from qtarget.errors import ConfigError


def check_writable(output: Path) -> None:
    """Raise before minutes are spent on results that could not be written.

    Raises:
        ConfigError: the path is a folder, or its folder cannot be made or written to.
    """
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file, for instance {output / 'speed.json'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error}; choose another path") from error
