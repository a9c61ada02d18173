"""How much of a user's data is taken, in one table; each limit can be raised.

They are far beyond what a run needs: what exceeds them is a mistake or an attack, such as a small file that unpacks to
terabytes, and would otherwise end in a machine without memory.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qtarget.core.errors import ConfigError, DataError

GIGABYTE = 10**9
SPARED = 2**28
"""Bytes to which any file may unpack, however small it is."""


@dataclass(frozen=True)
class Limits:
    """What is refused beyond it.

    Attributes:
        rows: of one data set, all its files together.
        gigabytes: of one file, unpacked.
        expansion: times its own size that a packed file (``.gz``, ``.zst``, Parquet, Arrow) may take unpacked, beyond 256 MiB.
        template_seconds: CPU time in which a chat template must render one row.

    Example:
        >>> Limits.of({"rows": 50_000_000}).rows
        50000000
    """

    rows: int = 10_000_000
    gigabytes: float = 64.0
    expansion: float = 200.0
    template_seconds: float = 5.0

    @classmethod
    def of(cls, given: Mapping[str, Any] | str | None) -> Limits:
        """The defaults with some of them changed.

        Raises:
            ConfigError: no such limit, or a value that is no positive number.
        """
        if not isinstance(given, Mapping | None):
            raise ConfigError(f"limits is {given!r}; expected names and numbers: {{rows: 20000000}}")
        known = {field.name: field.default for field in fields(cls)}
        for name, value in (given or {}).items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"limits has no {name!r}{hint} There are {', '.join(known)}.")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"limits: {name} is {value!r}; expected a positive number")
        return replace(cls(), **(given or {}))

    def unpacked(self, size: int) -> int:
        """Bytes that a packed file of ``size`` bytes may hold."""
        return int(min(self.gigabytes * GIGABYTE, max(SPARED, self.expansion * size)))

    def check_rows(self, path: Path, count: int) -> None:
        """Refuse more rows than there may be.

        Raises:
            DataError: names the option.
        """
        if count > self.rows:
            raise DataError(f"{path}: more than {self.rows:,} rows; {raised('rows', self.rows * 10)}")

    def check_bytes(self, path: Path, unpacked: int, size: int) -> None:
        """Refuse a file that takes more unpacked than it may.

        Args:
            unpacked: bytes counted so far.
            size: of the file as it lies.

        Raises:
            DataError: names the option.
        """
        if unpacked > self.gigabytes * GIGABYTE:
            whole = "holds" if unpacked == size else "unpacks to"
            raise DataError(
                f"{path} {whole} more than {self.gigabytes:g} GB; split it, or "
                f"{raised('gigabytes', math.ceil(unpacked / GIGABYTE) * 2)}"
            )
        if unpacked > max(size, self.unpacked(size)):
            raise DataError(
                f"{path} has {size:,} bytes and unpacks to more than {self.unpacked(size):,}, which no usual file does; "
                f"if it should, {raised('expansion', math.ceil(unpacked / max(size, 1)) * 10)}"
            )


def raised(name: str, value: float) -> str:
    """The next step: how a limit is raised."""
    return f"raise the limit: `limits: {{{name}: {value:.12g}}}` in a config, --limits '{{{name}: {value:.12g}}}' elsewhere"
