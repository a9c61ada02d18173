"""``qtarget bench``: measurements that anyone can repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from qtarget.benchmarks.serving import ServingConfig, run_serving
from qtarget.benchmarks.speed import SpeedConfig, run_memory, run_speed
from qtarget.cli import bench_score
from qtarget.cli.outputs import check_writable
from qtarget.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

DEFAULTS = SpeedConfig()
SERVING = ServingConfig()

app = typer.Typer(no_args_is_help=True, help="Measurements that anyone can repeat.")


app.command("score")(bench_score.score)


@app.callback()
def options() -> None:
    """Measurements that anyone can repeat."""


@app.command("speed")
def speed(
    output: Annotated[Path, typer.Option(help="Raw results, JSON.")] = Path("runs/speed.json"),
    tokens: Annotated[int, typer.Option(min=1, help="Supervised tokens.")] = DEFAULTS.tokens,
    width: Annotated[int, typer.Option(min=1, help="Width of the hidden states.")] = DEFAULTS.width,
    vocab: Annotated[int, typer.Option(min=128, help="Size of the vocabulary.")] = DEFAULTS.vocab,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = DEFAULTS.dtype,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = DEFAULTS.device,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; medians are quoted.")] = DEFAULTS.rounds,
    top_k: Annotated[int, typer.Option(min=1, help="k of the cached teacher.")] = DEFAULTS.top_k,
    suite: Annotated[str, typer.Option(help="short, or all targets.")] = DEFAULTS.suite,
    peers: Annotated[bool, typer.Option(help="Also time other libraries' losses (slow on a CPU).")] = DEFAULTS.peers,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory instead of time.")] = False,
) -> None:
    """Time the loss of every target against the bare matrix products, naive cross entropy and other libraries."""
    from rich.console import Console

    for name, value, known in (("dtype", dtype, ("float32", "bfloat16")), ("device", device, ("cpu", "cuda")),
                               ("suite", suite, ("short", "all"))):  # fmt: skip
        if value not in known:
            raise ConfigError(f"--{name} {value!r} is unknown; expected {' or '.join(known)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is visible here; run with --device cpu, or on a GPU machine")
    if top_k > vocab:
        raise ConfigError(f"--top-k {top_k} exceeds --vocab {vocab}; choose a smaller k")
    check_writable(output)
    torch.set_num_threads(threads)
    config = SpeedConfig(tokens, width, vocab, dtype, device, rounds, top_k, suite, peers)
    results = (
        run_memory(config, tuple(sorted({min(512, tokens), tokens})), typer.echo)
        if memory
        else run_speed(config, typer.echo)
    )
    output.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(memory_table(results) if memory else speed_table(results))
    typer.echo(str(output))


@app.command("cache")
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

    from qtarget.benchmarks.cache import CacheConfig, run_cache
    from qtarget.data.embedded import base_model_path

    check_writable(output)
    torch.set_num_threads(threads)
    config = CacheConfig(model or str(base_model_path()), rows=rows, length=length, vocab=vocab, tokens=tokens)
    results = run_cache(config, typer.echo)
    output.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(cache_table(results))
    typer.echo(str(output))


@app.command("reading")
def reading(
    output: Annotated[Path, typer.Option(help="Raw results, JSON.")] = Path("runs/reading.json"),
    rows: Annotated[int, typer.Option(min=500, help="Cached rows.")] = 2000,
    length: Annotated[int, typer.Option(min=8, help="Tokens a row.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Of the model; 30 makes 135M parameters.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; medians are compared.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """What reading a cache adds to a training step, and the memory that it takes."""
    from qtarget.benchmarks.reading import ReadingConfig, run_reading

    check_writable(output)
    torch.set_num_threads(threads)
    results = run_reading(ReadingConfig(rows=rows, length=length, layers=layers, rounds=rounds), typer.echo)
    output.write_text(json.dumps(results, indent=1) + "\n")
    typer.echo(str(output))


@app.command("serve")
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
    output.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(serving_table(results))
    typer.echo(str(output))


def serving_table(results: dict[str, Any]) -> Table:
    """One line a variant."""
    from rich import box
    from rich.table import Table

    config = results["config"]
    table = Table(
        title=f"{config['clients']} clients, rows of {config['shortest']} to {config['longest']} tokens",
        caption=f"median of {config['rounds']} interleaved rounds of {config['requests']} requests; in brackets, lowest..highest",
        box=box.SIMPLE,
    )
    for column in ("server", "requests/s", "p50 ms", "p99 ms", "sorted is faster by"):
        table.add_column(column, justify="left" if column == "server" else "right", no_wrap=True)
    for name, row in results["summary"].items():
        r = row["sorted_is_faster_by"]
        factor = "" if name == "sorted" else f"{r['median']:.2f} x ({r['low']:.2f}..{r['high']:.2f})"
        table.add_row(name, f"{row['requests_per_second']:.1f}", f"{row['p50_ms']:.0f}", f"{row['p99_ms']:.0f}", factor)
    return table


def speed_table(results: dict[str, Any]) -> Table:
    """Contenders in the order they ran."""
    from rich import box
    from rich.table import Table

    config = results["config"]
    table = Table(
        title=f"N={config['tokens']} D={config['width']} V={config['vocab']} {config['dtype']}, {config['device']}",
        caption=f"median of {config['rounds']} interleaved rounds; in brackets, lowest..highest round. A live teacher's "
        "floor has four products, all others' three",
        box=box.SIMPLE,
    )
    for column in ("loss", "seconds", "x floor"):
        table.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    for name, row in results["rows"].items():
        ratio = row["ratio"]
        text = f"{ratio['median']:.2f} ({ratio['low']:.2f}..{ratio['high']:.2f})"
        table.add_row(name, f"{row['median']:.3g}", text)
    return table


def memory_table(results: dict[str, Any]) -> Table:
    """Peak beyond the inputs, and what of it are gradients."""
    from rich import box
    from rich.table import Table

    config = results["config"]
    table = Table(
        title=f"D={config['width']} V={config['vocab']} {config['dtype']}, {config['device']}: peak MB",
        caption="gradients: of hidden states, and of the head in the dtype it is accumulated in (float32)",
        box=box.SIMPLE,
    )
    for column in ("loss", "tokens", "beyond inputs", "gradients", "beyond both"):
        table.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    for name, by_tokens in results["rows"].items():
        for tokens, row in by_tokens.items():
            total, gradients = row["beyond_inputs"], row["gradients"]
            table.add_row(name, tokens, f"{total:.0f}", f"{gradients:.0f}", f"{total - gradients:.0f}")
    return table


def cache_table(results: dict[str, Any]) -> Table:
    """Modes in the order of their size."""
    from rich import box
    from rich.table import Table

    config, real, large = results["config"], results["real"], results["large_vocabulary"]["bytes_per_token"]
    table = Table(
        title=f"{config['model']}: {real['tokens']:,} tokens, {real['vocab']:,} ids; large V: {config['vocab']:,}",
        caption="gradient error: |g - g_full| / |g_full| of single tokens, and of sums over 512 tokens",
        box=box.SIMPLE,
    )
    columns = ("cache", "bytes", "at large V", "KL", "distillation", "target_sft")
    for column in columns:
        table.add_column(column, justify="left" if column == "cache" else "right", no_wrap=True)
    for name, row in real["modes"].items():
        errors = row.get("gradient_error", {})
        told = [f"{errors[t]['token']:.1g} / {errors[t]['batch']:.1g}" if t in errors else "-" for t in columns[-2:]]
        size = f"{large[name]:.1f}" if name in large else "-"
        table.add_row(
            name, f"{row['bytes_per_token']:.1f}", size, f"{row['kl']:.2g}" if row.get("kl") is not None else "-", *told
        )
    return table
