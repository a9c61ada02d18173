"""The typer application: verbs, put together."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from qtarget.cli import (
    audit_data,
    cache,
    card,
    compare,
    convert,
    demo,
    evaluate,
    filter,
    init,
    inspect,
    lens,
    merge,
    noise,
    report,
    rl,
    score,
    serve,
    targets,
    train,
)
from qtarget.cli.bench.lazy import Benchmarks
from qtarget.command import remember_options


def dashed(token: str) -> str:
    """Options are spelled with dashes, keys of a config with underscores; of an option both spellings will do."""
    return token.replace("_", "-")


app = typer.Typer(
    add_completion=False,
    context_settings={"token_normalize_func": dashed},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Choose, per token, what distribution a language model is pulled towards.",
)
# Keys of a config are not listed one by one: `--learning_rate 1e-4` goes through to the config as it is.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command("init", context_settings=PASS_ON)(init.init)
app.command("targets")(targets.targets)
app.command("train", context_settings=PASS_ON)(train.train)
app.command("rl", context_settings=PASS_ON)(rl.rl)
app.command("score", context_settings=PASS_ON)(score.score)
app.command("audit-data", context_settings=PASS_ON)(audit_data.audit_data)
app.command("convert")(convert.convert)
app.command("serve")(serve.serve)
app.command("inspect", context_settings=PASS_ON)(inspect.inspect)
app.command("filter", context_settings=PASS_ON)(filter.filter_rows)
app.command("noise")(noise.noise)
app.command("lens")(lens.lens)
app.command("report")(report.report)
app.command("evaluate")(evaluate.evaluate)
app.command("compare", context_settings=PASS_ON)(compare.compare)
app.command("merge")(merge.merge)
app.command("card")(card.card)
app.command("demo")(demo.demo)
app.add_typer(
    typer.Typer(cls=Benchmarks, no_args_is_help=True), name="bench", help="Measurements that anyone can repeat."
)
app.add_typer(cache.app, name="cache")


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; give it before the verb.")] = False,
) -> None:
    """Choose, per token, what distribution a language model is pulled towards."""
    verb = getattr(context.command, "commands", {}).get(context.invoked_subcommand)
    names = [name for one in getattr(verb, "params", ()) for name in (*one.opts, *one.secondary_opts)]
    remember_options(name for name in names if name.startswith("--"))
    # targets, losses and metrics of the user's lie there; last, so that no file of theirs hides an installed package
    here = os.getcwd()
    sys.path.append(here)
    context.call_on_close(lambda: sys.path.remove(here) if here in sys.path else None)
