"""``qtarget bench score``, ``serve``, ``cache`` and ``reading``: what scoring once and training from it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qtarget.benchmarks.scoring.serving import ServingConfig, run_serving
from qtarget.cli.bench.tables import cache_table, serving_table
from qtarget.cli.options.outputs import check_writable, saver
from qtarget.cli.options.typed import finite

SERVING = ServingConfig()


def score(
    output: Annotated[Path, typer.Option(help="Raw results, JSON.")] = Path("runs/scoring.json"),
    rows: Annotated[int, typer.Option(min=1, help="Rows of log-normal length.")] = 24,
    supervised: Annotated[float, typer.Option(callback=finite, min=0.01, max=1, help="Share of a row's tokens.")] = 0.5,
    top_k: Annotated[int, typer.Option(min=1, help="Log-probs a token, beside a run with none.")] = 32,
    layers: Annotated[int, typer.Option(min=1, help="Of a random Llama of SmolLM2-135M's shape.")] = 30,
    width: Annotated[int, typer.Option(min=9, help="Of the same; a multiple of 18.")] = 576,
    vocab: Annotated[int, typer.Option(min=128, help="Of the same.")] = 49152,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; medians are quoted.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Time scoring in this process against the bare forward passes and head on the same rows."""
    from qtarget.benchmarks.scoring.local import ScoringConfig, run_scoring_speed

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
    saver(output)(results)
    show_scoring(results)
    typer.echo(str(output))


def show_scoring(results: dict[str, Any]) -> None:
    """One line a contender."""
    tokens = results["tokens"]
    typer.echo(f"{tokens['all']:,} tokens, {tokens['supervised']:,} supervised; CPU seconds, and times the floor")
    for name, row in results["rows"].items():
        ratio = row["ratio"]
        typer.echo(
            f"{name:>10} {row['median']:8.3f} s {ratio['median']:6.2f} ({ratio['low']:.2f}..{ratio['high']:.2f})"
        )


def serve(
    output: Annotated[Path, typer.Option(help="Raw results, JSON.")] = Path("runs/serving.json"),
    clients: Annotated[int, typer.Option(min=1, help="That ask at the same time.")] = SERVING.clients,
    requests: Annotated[int, typer.Option(min=1, help="A round, of all clients together.")] = SERVING.requests,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; medians are quoted.")] = SERVING.rounds,
    shortest: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = SERVING.shortest,
    typical: Annotated[int, typer.Option(min=2, help="Median of the log-normal lengths.")] = SERVING.typical,
    longest: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = SERVING.longest,
    top_k: Annotated[int, typer.Option(min=0, help="Log-probs a position.")] = SERVING.top_k,
    width: Annotated[int, typer.Option(min=4, help="Of the random Llama.")] = SERVING.width,
    layers: Annotated[int, typer.Option(min=1, help="Of the random Llama.")] = SERVING.layers,
    vocab: Annotated[int, typer.Option(min=512, help="Of the random Llama.")] = SERVING.vocab,
    workers: Annotated[int, typer.Option(min=1, help="That score, one thread each.")] = SERVING.workers,
) -> None:
    """Load `qtarget serve` on this machine: length-sorted sub-batches against naive padding and against batch size 1."""
    from rich.console import Console

    check_writable(output)
    config = ServingConfig(
        clients=clients,
        requests=requests,
        rounds=rounds,
        shortest=shortest,
        typical=typical,
        longest=longest,
        top_k=top_k,
        width=width,
        layers=layers,
        vocab=vocab,
        workers=workers,
    )
    results = run_serving(config, typer.echo)
    saver(output)(results)
    Console().print(serving_table(results))
    typer.echo(str(output))


def cache(
    output: Annotated[Path, typer.Option(help="Raw results, JSON.")] = Path("runs/cache.json"),
    model: Annotated[
        str | None, typer.Option(help="Name or path of a trained model; default: the embedded base.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that it writes and scores.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 128,
    vocab: Annotated[
        int, typer.Option(min=256, help="Vocabulary of the synthetic teacher that tells bytes.")
    ] = 151_936,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the synthetic teacher.")] = 4096,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Bytes a token, KL and gradient error of every way to cache a teacher."""
    from rich.console import Console

    from qtarget.benchmarks.scoring.cache import CacheConfig, run_cache
    from qtarget.data.embedded import base_model_path

    check_writable(output)
    torch.set_num_threads(threads)
    config = CacheConfig(model or str(base_model_path()), rows=rows, length=length, vocab=vocab, tokens=tokens)
    results = run_cache(config, typer.echo)
    saver(output)(results)
    Console().print(cache_table(results))
    typer.echo(str(output))


def reading(
    output: Annotated[Path, typer.Option(help="Raw results, JSON.")] = Path("runs/reading.json"),
    rows: Annotated[int, typer.Option(min=500, help="Cached rows.")] = 2000,
    length: Annotated[int, typer.Option(min=8, help="Tokens a row.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Of the model; 30 makes 135M parameters.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; medians are compared.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """What reading a cache adds to a training step, and the memory that it takes."""
    from qtarget.benchmarks.scoring.reading import ReadingConfig, run_reading

    check_writable(output)
    torch.set_num_threads(threads)
    results = run_reading(ReadingConfig(rows=rows, length=length, layers=layers, rounds=rounds), typer.echo)
    saver(output)(results)
    typer.echo(str(output))
