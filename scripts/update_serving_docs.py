"""Put the load test's raw results into docs/serving.md: ``python scripts/update_serving_docs.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/serving.md"
RESULTS = ROOT / "benchmarks/results/serving.json"
BEGIN, END = "<!-- numbers: scripts/update_serving_docs.py -->", "<!-- end of numbers -->"


def table() -> str:
    """The lines between the markers."""
    results = json.loads(RESULTS.read_text())
    config, lengths, machine = results["config"], results["lengths"], results["machine"]
    lines = ["| server | requests/s | p50 ms | p99 ms | sorted is faster by |", "|---|---|---|---|---|"]
    for name, row in results["summary"].items():
        factor = row["sorted_is_faster_by"]
        by = "" if name == "sorted" else f"{factor['median']:.2f} x ({factor['low']:.2f} to {factor['high']:.2f})"
        lines.append(
            f"| {name} | {row['requests_per_second']:.1f} | {row['p50_ms']:.0f} | {row['p99_ms']:.0f} | {by} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{config['clients']} clients, one row a request, {config['requests']} requests a round, median of "
            f"{config['rounds']} interleaved rounds; log-normal lengths from {config['shortest']} to {config['longest']} tokens "
            f"(median {lengths['p50']:.0f}, mean {lengths['mean']:.0f}), top_k {config['top_k']}. A random Llama of width "
            f"{config['width']} and {config['layers']} layers, {config['workers']} worker; {machine['processor']}, load average "
            f"{machine['load_before_and_after'][0][0]:.1f} before and {machine['load_before_and_after'][1][0]:.1f} after.",
        ]
    )


def render() -> str:
    """The page with the current numbers."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{table()}\n{END}", PAGE.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(render())
