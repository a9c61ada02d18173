"""``qtarget targets``: the table of targets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from qtarget.core.types import Needs

NARROW_WIDTH, PIPED_WIDTH = 130, 200  # characters


def target_rows() -> list[dict[str, Any]]:
    """One row a target: ``name``, ``formula``, ``needs``, ``scope``, ``hyperparameters``, ``paper``."""
    from qtarget.registry import available_targets, get_target, hyperparameters, target_class

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
        >>> from qtarget import Needs
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

    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(targets_table(rows, narrow=console.width < NARROW_WIDTH))


def targets_table(rows: list[dict[str, Any]], narrow: bool) -> Table:
    """One line a target; on a narrow terminal two columns, the second with a line a fact."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        caption="needs: numbers of a frozen model, from `qtarget score` or a model run live; agreement, conflict and "
        "reliability are counted from the rows, beside a cache",
        show_lines=narrow,
    )
    facts = ("formula", "needs", "scope", "hyper-parameters", "paper")
    for column in ("name", "facts") if narrow else ("name", *facts):
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for row in rows:
        defaults = ", ".join(f"{key}={value}" for key, value in row["hyperparameters"].items())
        cells = [row["formula"], ", ".join(row["needs"]), row["scope"], defaults, row["paper"]]
        if narrow:
            cells = ["\n".join([cells[0], *(f"{fact}: {cell}" for fact, cell in zip(facts[1:], cells[1:]) if cell)])]
        table.add_row(*(Text(cell) for cell in (row["name"], *cells)))  # Text: brackets in formulas are not markup
    return table
