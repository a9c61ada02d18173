"""``qtarget bench``: its commands, put together."""

from __future__ import annotations

import typer

from qtarget.cli.bench import proof, real, scoring, speed
from qtarget.cli.options.outputs import one_writer

app = typer.Typer(no_args_is_help=True, help="Measurements that anyone can repeat.")
for command in (
    *(speed.speed, speed.sweep, speed.figure, speed.trainer),
    *(scoring.score, scoring.serve, scoring.cache, scoring.reading),
    *(proof.noise, proof.distill, proof.prior, proof.staleness, real.rl),
):
    app.command(command.__name__)(one_writer(command))
app.command("base")(real.base)


@app.callback()
def options() -> None:
    """Measurements that anyone can repeat."""
