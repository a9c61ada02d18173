"""``qtarget noise``: marked noise in a user's own demonstrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qtarget.cli.options.datasets import LimitsOption
from qtarget.cli.options.typed import finite
from qtarget.core.errors import ConfigError, counted


def noise(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Clean rows: .jsonl, .json, .csv or .parquet.")],
    destination: Annotated[Path, typer.Argument(metavar="OUTPUT.jsonl", help="Noisy rows with `noise_spans`.")],
    kind: Annotated[
        str,
        typer.Option(
            help="random_tokens, wrong_answer, boilerplate, contradictory_duplicate, other_response or truncation."
        ),
    ],
    rate: Annotated[
        float, typer.Option(callback=finite, min=0, max=1, help="Share of response tokens (random_tokens) or of rows.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same noise.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name; random_tokens then replaces its tokens, else words.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUTPUT.")] = False,
    null_content: Annotated[
        str, typer.Option(help="Rows with a message that says nothing: refuse, or drop and count them.")
    ] = "refuse",
    limits: LimitsOption = None,
) -> None:
    """Inject noise of one kind; every touched character is marked in `noise_spans`."""
    from qtarget.cli.options.datasets import row_options
    from qtarget.cli.options.outputs import check_outputs
    from qtarget.data.files import COMPRESSED, expand, is_json_lines
    from qtarget.data.loading import announce, read_files
    from qtarget.data.noise import inject_noise
    from qtarget.storage.files import writing

    if destination.exists() and not overwrite:
        raise ConfigError(f"{destination} exists; choose another OUTPUT or pass --overwrite")
    check_outputs({"OUTPUT": destination}, [*expand(source), tokenizer], replaces=overwrite)
    if not is_json_lines(destination) or destination.name.lower().endswith(COMPRESSED):
        raise ConfigError(
            f"OUTPUT is {destination}; expected a name that ends in .jsonl or .ndjson, one row a line, not compressed"
        )
    found = read_files(source, row_options(null_content=null_content, limits=limits))
    announce(found, str(source))
    noisy = inject_noise(
        found.rows, kind=kind, rate=rate, seed=seed, tokenizer=_tokenizer(tokenizer), places=found.places
    )
    with writing(destination, text=True) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in noisy)
    touched = sum(bool(row["noise_spans"]) for row in noisy)
    spans = sum(len(row["noise_spans"]) for row in noisy)
    typer.echo(
        f"{destination}: {counted(len(noisy), 'row')}, {touched} with noise, {counted(spans, 'marked span')} "
        f"({kind}, rate {rate}, seed {seed})"
    )


def _tokenizer(name: str | None):
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokenizer {name} cannot be loaded ({error}); expected a folder or a hub name") from error
