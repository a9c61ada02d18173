"""``qtarget lens``: what a loss teaches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtarget.cli.options.outputs import OverwriteOption


def lens(
    losses: Annotated[
        list[str],
        typer.Argument(
            metavar="LOSS...",
            help="Built-in names (`all`: every one), or package.module:function; constants: 'p_power(alpha=0.3)'.",
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="The page; default: LOSS-lens.html.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="The page's numbers.")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="A panel a loss, for slides.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw what losses teach: the update against p, the induced target, the (a, b, q) form, and faults of masks and scales.

    `package.module:function` is imported, so its code runs.
    """
    from qtarget.cli.options.outputs import Mark, check_outputs, named_after, say_written, write_numbers, write_page
    from qtarget.registry import available_targets
    from qtarget.report.lens.document import lens as look_through
    from qtarget.report.lens.losses import load_loss
    from qtarget.report.lens.page import lens_figure, lens_page, save_figure

    mark = Mark.of("lens", losses)
    output = output or Path(named_after(losses, "lens.html"))
    check_outputs({"--output": output, "--json": as_json, "--png": png}, mark=mark, replaces=overwrite)
    losses = [name for text in losses for name in (available_targets() if text == "all" else [text])]
    document = look_through([load_loss(text) for text in losses])
    for loss in document["losses"]:
        typer.echo(f"{loss['name']}\n" + "".join(f"  - {sentence}\n" for sentence in loss["verdict"]))
    write_page(output, lens_page(document), mark)
    if as_json:
        write_numbers(as_json, document, mark)
    if png:
        save_figure(lens_figure(document), png, str(mark))
    say_written([output, as_json, png])
