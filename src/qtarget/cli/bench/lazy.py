"""``qtarget bench`` before it is asked for: its options quote numbers of the benchmarks, which load torch."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


class Benchmarks(TyperGroup):
    """The commands of ``qtarget.cli.bench.app``, imported when one of them or their list is asked for."""

    def _loaded(self) -> Any:
        from qtarget.cli.bench.app import app

        return typer.main.get_command(app)

    def list_commands(self, ctx: Any) -> list[str]:
        return self._loaded().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._loaded().get_command(ctx, cmd_name)
