"""``qtarget lens``: what a loss teaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def lens(
    losses: Annotated[
        list[str],
        typer.Argument(
            metavar="LOSS...",
            help="Built-in names (`all`: every one), or package.module:function; constants: 'p_power(alpha=0.3)'.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("lens.html"),
    as_json: Annotated[Path | None, typer.Option("--json", help="The page's numbers.")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="A panel a loss, for slides.")] = None,
) -> None:
    """Draw what losses teach: the update against p, the induced target, the (a, b, q) form, and faults of masks and scales.

    `package.module:function` is imported, so its code runs.
    """
    from qtarget.cli.options.outputs import check_outputs
    from qtarget.registry import available_targets
    from qtarget.report.lens.document import lens as look_through
    from qtarget.report.lens.losses import load_loss
    from qtarget.report.lens.page import lens_figure, lens_page, save_figure
    from qtarget.storage.files import write_text

    check_outputs({"--output": output, "--json": as_json, "--png": png})
    losses = [name for text in losses for name in (available_targets() if text == "all" else [text])]
    document = look_through([load_loss(text) for text in losses])
    for loss in document["losses"]:
        typer.echo(f"{loss['name']}\n" + "".join(f"  - {sentence}\n" for sentence in loss["verdict"]))
    write_text(output, lens_page(document))
    written = [output]
    if as_json:
        write_text(as_json, json.dumps(document, indent=1, allow_nan=False) + "\n")
        written.append(as_json)
    if png:
        save_figure(lens_figure(document), png)
        written.append(png)
    typer.echo("written: " + ", ".join(map(str, written)))
