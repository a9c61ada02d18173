"""``qtarget targets``: the table of targets, one of them explained, or the beginning of a new one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from qtarget.core.types import Needs, Target

NARROW_WIDTH, PIPED_WIDTH = 130, 200  # characters
NEW = "new"
ARXIV = "https://arxiv.org/abs/"


def target_rows() -> list[dict[str, Any]]:
    """One row a target, then one a trust region.

    Keys: ``name``, ``kind``, ``formula``, ``needs``, ``scope``, ``hyperparameters``, ``paper``.
    """
    from qtarget.registry import available_targets, available_trust_regions, get_target

    return [row_of(name, get_target(name)) for name in [*available_targets(), *available_trust_regions()]]


def row_of(name: str, target: Target) -> dict[str, Any]:
    """A target as the table and JSON have it."""
    from qtarget.registry import hyperparameters, target_class

    return {
        "name": name,
        "kind": "trust region" if target.needs.advantages else "target",
        "formula": target.formula,
        "needs": frozen_needs(target.needs),
        "scope": target.scope,
        "hyperparameters": {k: v for part in name.split("+") for k, v in hyperparameters(target_class(part)).items()},
        "paper": target.paper,
    }


def frozen_needs(needs: Needs) -> list[str]:
    """What a user must provide beyond the trained model itself.

    Example:
        >>> from qtarget import Needs
        >>> frozen_needs(Needs(reference=frozenset({"label_log_probs"})))
        ['reference.label_log_probs']
    """
    own = ["advantages"] if needs.advantages else []
    return own + [f"{role}.{field}" for role in ("reference", "teacher") for field in sorted(getattr(needs, role))]


def targets(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME | new NAME]", help="Explain one, or write the file and test of a new one here."),
    ] = None,
    new_name: Annotated[str | None, typer.Argument(hidden=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """List the targets, explain one (formula, needs, keys, measurements, paper), or begin one: `qtarget targets new NAME`."""
    if name == NEW:
        begin(new_name)
    elif new_name is not None:
        raise ConfigError(f"{name} {new_name}: expected one NAME to explain, or `qtarget targets new NAME`")
    elif name is not None:
        found = explanation(name)
        if as_json:
            typer.echo(json.dumps(found, indent=2, default=str))
        else:
            typer.echo("\n".join(explanation_lines(found)))
    elif as_json:
        typer.echo(json.dumps(target_rows(), indent=2))
    else:
        print_table(target_rows())


def begin(name: str | None) -> None:
    """Write a new target and its test into the current folder.

    Raises:
        ConfigError: no name, one that will not do, or a file that is there.
    """
    from qtarget.cli.new_target import write_target

    if name is None:
        raise ConfigError("which name: qtarget targets new NAME, such as my_target")
    target, files = write_target(name, Path.cwd())
    typer.echo(f"written: {', '.join(path.name for path in files)}")
    typer.echo(f"test it: pytest {files[1].name}\nlook at it: qtarget lens {target} sft")
    typer.echo(f"train with it: target: {target}")


def explanation(name: str) -> dict[str, Any]:
    """All that is known of a target: what the table says, its docstring, and the committed measurements.

    Raises:
        UnknownTargetError, ContractError: as ``qtarget.get_target``.
    """
    from qtarget.cli.docstrings import described
    from qtarget.registry import check_names, get_target, target_class
    from qtarget.report.audit.measured import measured

    check_names(name)  # before torch is loaded
    target = get_target(name)
    cls = target_class(name) if "+" not in name else type(target)
    parts = [described(target_class(part).__doc__) for part in name.split("+")]
    own = described(cls.__doc__)
    summary = (sys.modules[cls.__module__].__doc__ or "").strip().partition("\n")[0]
    return row_of(name, target) | {
        "summary": summary,
        "form": own.form,
        "arguments": {key: text for part in parts for key, text in part.arguments.items()},
        "reference": own.reference,
        "deviations": own.deviations,
        "measured": measured(name),
    }


def explanation_lines(found: dict[str, Any]) -> list[str]:
    """An explanation for a terminal."""
    keys = [
        f"{key}: {value}  {found['arguments'].get(key, '')}".rstrip() for key, value in found["hyperparameters"].items()
    ]
    arxiv = f"  {ARXIV}{found['paper']}" if found["paper"][:4].isdigit() else ""
    facts = {
        "formula": [found["formula"], found["form"]],
        "scope": [f"{found['scope']}: {SCOPES[found['scope']]}"],
        "needs": [how_to_get(need) for need in found["needs"]] or ["the trained model alone"],
        "keys": keys or ["none"],
        "paper": [f"{found['paper']}{arxiv}"],
    }
    if found["deviations"] not in ("", "none."):
        facts["paper"].append(f"{found['reference']}. Deviations: {found['deviations']}")
    lines = [f"{found['name']}: {found['summary']}", ""]
    for name, texts in facts.items():
        lines += [f"{word:<9}{text}".replace("``", "") for word, text in zip([name, *[""] * len(texts)], texts)]
    return [*lines, "", *measured_lines(found)]


SCOPES = {
    "token": "each token by itself",
    "sequence": "a token's weight depends on its sequence",
    "batch": "a token's weight depends on the whole optimizer batch",
}


def measured_lines(found: dict[str, Any]) -> list[str]:
    """When it wins and loses, by this project's own measurements."""
    from qtarget.report.audit.measured import sentences

    if found["name"] == "sft":
        return ["measured: sft is what the others are compared with; `qtarget targets NAME` says where they beat it"]
    said = sentences(found["measured"])
    if not said:
        return ["measured: never compared here; train sft beside it and compare both on rows of yours"]
    end = "Points of accuracy with 95 % intervals; small models and synthetic rows: compare on rows of yours."
    return ["measured:", *(f"  {line}" for line in said), f"  {end}"]


def how_to_get(need: str) -> str:
    """A need, and where it comes from."""
    if need == "advantages":
        return "advantages  made of the rewards of samples: `qtarget rl`, trust_region"
    role, _, field = need.partition(".")
    option = " --role teacher" if role == "teacher" else ""
    source = {
        "agreement": "counted from the rows, beside a cache",
        "reliability": "counted from the rows, beside a cache",
        "conflict": "counted from the rows, beside a cache",
        "log_probs": f"a live model: {role}_model_name_or_path",
        "distribution": f"`qtarget score CONFIG.yaml{option} --top_k 32`, or a live model",
    }
    return f"{need}  {source.get(field, f'`qtarget score CONFIG.yaml{option}`, or a live model')}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """The table, as wide as the terminal."""
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
        "reliability are counted from the rows, beside a cache; crossfit, perplexity_ratio and noise come from "
        "`qtarget score --crossfit`",
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
