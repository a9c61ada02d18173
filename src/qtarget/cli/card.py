"""``qtarget card``: a run's model card, with what evaluations found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qtarget.core.errors import counted


def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output_dir of a run, or a merged model of it.")],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="JSON of `evaluate` or `compare`; default: those of this run in its folder and beside it.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model on the hub, user/name.")] = None,
) -> None:
    """Write README.md anew: what was trained how, on what, how well it did. An edited card is kept beside it."""
    from qtarget.report.card.document import card_document
    from qtarget.report.card.tables import find_evaluations
    from qtarget.report.card.text import CARD, card_text, read_tags, write_card
    from qtarget.storage.folders import MODEL, kind_of

    files = evaluation if evaluation is not None else find_evaluations(run)
    document = card_document(run, files)
    model = (name or "").split("/")[-1] or run.resolve().name
    text = card_text(document, model, tags=read_tags(run / CARD), hub_name=name, merged=kind_of(run) == MODEL)
    typer.echo(f"{write_card(run, text)}: {_of(files, len(document['evaluations']))}")


def _of(files: Sequence[Path], tables: int) -> str:
    """What the card's tables come from.

    Example:
        >>> _of([Path("evaluation.json")], 1)
        '1 table of evaluation.json'
        >>> _of([], 0)
        'no evaluation of this run is in its folder or beside it, so no table; `qtarget evaluate` makes one'
    """
    if files:
        return f"{counted(tables, 'table')} of {', '.join(map(str, files))}"
    return "no evaluation of this run is in its folder or beside it, so no table; `qtarget evaluate` makes one"
