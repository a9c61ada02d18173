"""``qtarget targets``: the table of targets."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from qtarget.registry import available_targets, get_target, hyperparameters, target_class
from qtarget.types import Needs


def target_rows() -> list[dict[str, Any]]:
    """One row a target: ``name``, ``formula``, ``needs``, ``scope``, ``hyperparameters``, ``paper``."""
    rows = []
    for name in available_targets():
        target = get_target(name)
        rows.append(
            {
                "name": name,
                "formula": target.formula,
                "needs": frozen_needs(target.needs),
                "scope": target.scope,
                "hyperparameters": hyperparameters(target_class(name)),
                "paper": target.paper,
            }
        )
    return rows


def frozen_needs(needs: Needs) -> list[str]:
    """What a user must provide beyond the trained model itself.

    Example:
        >>> frozen_needs(Needs(reference=frozenset({"label_log_probs"})))
        ['reference.label_log_probs']
    """
    return [f"{role}.{field}" for role in ("reference", "teacher") for field in sorted(getattr(needs, role))]


def targets(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the targets: formula, what they need, scope, hyper-parameters with defaults, paper."""
    rows = target_rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="needs: numbers of a frozen model, from `qtarget score` or a model run live")
    for column in ("name", "formula", "needs", "scope", "hyper-parameters", "paper"):
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for row in rows:
        defaults = ", ".join(f"{key}={value}" for key, value in row["hyperparameters"].items())
        cells = (row["name"], row["formula"], "\n".join(row["needs"]), row["scope"], defaults, row["paper"])
        table.add_row(*(Text(cell) for cell in cells))  # Text: formulas hold brackets, which are markup otherwise
    Console().print(table)
