"""``qtarget bench score``: the local engine against its floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qtarget.cli.outputs import check_writable


def score(
    output: Annotated[Path, typer.Option(help="Raw results, JSON.")] = Path("runs/scoring.json"),
    rows: Annotated[int, typer.Option(min=1, help="Rows of log-normal length.")] = 24,
    supervised: Annotated[float, typer.Option(min=0.01, max=1, help="Share of a row's tokens.")] = 0.5,
    top_k: Annotated[int, typer.Option(min=1, help="Log-probs a token, beside a run with none.")] = 32,
    layers: Annotated[int, typer.Option(min=1, help="Of a random Llama of SmolLM2-135M's shape.")] = 30,
    width: Annotated[int, typer.Option(min=9, help="Of the same; a multiple of 18.")] = 576,
    vocab: Annotated[int, typer.Option(min=128, help="Of the same.")] = 49152,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; medians are quoted.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Time scoring in this process against the bare forward passes and head on the same rows."""
    import torch

    from qtarget.benchmarks.scoring import ScoringConfig, run_scoring_speed

    check_writable(output)
    torch.set_num_threads(threads)
    config = ScoringConfig(
        rows=rows,
        supervised=supervised,
        top_ks=(0, top_k),
        layers=layers,
        width=width,
        vocab=vocab,
        rounds=rounds,
    )
    results = run_scoring_speed(config, typer.echo)
    output.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    typer.echo(str(output))


def show(results: dict[str, Any]) -> None:
    """One line a contender."""
    tokens = results["tokens"]
    typer.echo(f"{tokens['all']:,} tokens, {tokens['supervised']:,} supervised; CPU seconds, and times the floor")
    for name, row in results["rows"].items():
        ratio = row["ratio"]
        typer.echo(
            f"{name:>10} {row['median']:8.3f} s {ratio['median']:6.2f} ({ratio['low']:.2f}..{ratio['high']:.2f})"
        )
