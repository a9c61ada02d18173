"""Tables that ``qtarget bench`` prints."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table


def speed_table(results: dict[str, Any]) -> Table:
    """Contenders in the order they ran."""
    config = results["config"]
    table = Table(
        title=f"N={config['tokens']} D={config['width']} V={config['vocab']} {config['dtype']}, {config['device']}",
        caption=f"median of {config['rounds']} interleaved rounds; in brackets, lowest..highest round. A live teacher's "
        "floor has four products, all others' three; x 5: against five, the frozen logits made again for the gradient",
        box=box.SIMPLE,
    )
    for column in ("loss", "seconds", "x floor", "x 5"):
        table.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    for name, row in results["rows"].items():
        ratio = row["ratio"]
        text = f"{ratio['median']:.2f} ({ratio['low']:.2f}..{ratio['high']:.2f})"
        five = row.get("ratio_to_five_products")
        table.add_row(name, f"{row['median']:.3g}", text, f"{five['median']:.2f}" if five else "")
    return table


def memory_table(results: dict[str, Any]) -> Table:
    """Peak beyond the inputs, and what of it are gradients."""
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


def sweep_table(results: dict[str, Any]) -> Table:
    """Peak memory of every point; times are in the figure and in the raw results."""
    config = results["config"]
    table = Table(
        title=f"{config['dtype']}, {config['device']}: peak MB beyond inputs and gradients",
        caption="in brackets: computed, not run (naive cross entropy holds four times the logits)",
        box=box.SIMPLE,
    )
    losses = list(dict.fromkeys(point["loss"] for point in results["memory"]))
    for column in ("V", "width", "N", *losses):
        table.add_column(column, justify="right")
    cells: dict[tuple[int, int, int], dict[str, str]] = {}
    for point in results["memory"]:
        row = cells.setdefault((point["vocab"], point["width"], point["tokens"]), {})
        computed = point.get("computed")
        beyond = None if computed else point["beyond_inputs"] - point["gradients"]
        row[point["loss"]] = f"({computed:,.0f})" if computed else f"{beyond:,.0f}"
    for (vocab, width, tokens), row in sorted(cells.items()):
        table.add_row(f"{vocab:,}", str(width), f"{tokens:,}", *(row.get(loss, "") for loss in losses))
    return table


def trainer_table(results: dict[str, Any]) -> Table:
    """Whole steps against ``SFTTrainer``'s."""
    config = results["config"]
    table = Table(
        title=f"{config['batch']} x {config['length']} tokens, {config['layers']} layers, width {config['width']}, "
        f"V={config['vocab']}, {config['dtype']}, cpu",
        caption=f"CPU seconds of a whole training step, median of {config['rounds']}, taken in turns; in brackets, "
        "lowest..highest step",
        box=box.SIMPLE,
    )
    for column in ("trainer", "seconds", "x SFTTrainer", "peak MB"):
        table.add_column(column, justify="left" if column == "trainer" else "right", no_wrap=True)
    for name, row in results["rows"].items():
        ratio = row["ratio"]
        text = f"{ratio['median']:.3f} ({ratio['low']:.3f}..{ratio['high']:.3f})"
        table.add_row(name, f"{row['median']:.3g}", text, f"{row['peak_mb']:,.0f}" if "peak_mb" in row else "")
    return table


def serving_table(results: dict[str, Any]) -> Table:
    """One line a variant."""
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


def cache_table(results: dict[str, Any]) -> Table:
    """Modes in the order of their size."""
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
        kl = row.get("kl")
        table.add_row(name, f"{row['bytes_per_token']:.1f}", size, "-" if kl is None else f"{kl:.2g}", *told)
    return table
