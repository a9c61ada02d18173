"""Write README.md from docs/README.in: examples, the table of targets and measured numbers are put in, never typed.

python scripts/update_readme.py
"""

from __future__ import annotations

import json
from pathlib import Path

from qtarget.cli.targets import target_rows

ROOT = Path(__file__).parents[1]


def targets_table() -> str:
    """One line for each target."""
    lines = ["| name | loss at a token | needs | paper |", "|---|---|---|---|"]
    for row in target_rows():
        formula = row["formula"].replace("|", "\\|")
        lines.append(f"| `{row['name']}` | `{formula}` | {', '.join(row['needs']) or '-'} | {row['paper']} |")
    return "\n".join(lines)


def demo_table() -> str:
    """The demo's means and ranges over seeds, best first, from its raw results."""
    results = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    lines = [
        "| target | exact completion, % | smallest .. largest seed | base's other skills kept, % |",
        "|---|---|---|---|",
    ]
    ranked = sorted(results["summary"].items(), key=lambda item: -item[1]["accuracy_percent"]["mean"])
    for name, numbers in ranked:
        done, kept = numbers["accuracy_percent"], numbers["kept_percent"]
        lines.append(f"| {name} | {done['mean']:.1f} | {done['low']:.1f} .. {done['high']:.1f} | {kept['mean']:.0f} |")
    untrained = results["untrained"]
    lines.append(f"| (untrained) | {untrained['accuracy_percent']:.1f} | | {untrained['kept_percent']:.0f} |")
    return "\n".join(lines)


def real_table() -> str:
    """Clean held-out NLL of the real-data example, from its raw results."""
    runs = json.loads((ROOT / "benchmarks/results/real_noise.json").read_text())["runs"]
    lines = ["| | " + " | ".join(f"`{r['data']}`" for r in runs) + " |", "|---|" + "---|" * len(runs)]
    for name in runs[0]["clean_nll"]:
        lines.append(f"| {name} | " + " | ".join(f"{r['clean_nll'][name]:.3f}" for r in runs) + " |")
    return "\n".join(lines)


def render() -> str:
    """README.md as it should be."""
    parts = {
        "TABLE": targets_table(),
        "DEMO": demo_table(),
        "REAL": real_table(),
        "EXAMPLE": (ROOT / "examples/train_with_trl.py").read_text().strip(),
        "YAML": (ROOT / "examples/noisy.yaml").read_text().split("\n", 9)[-1].strip(),
    }
    text = (ROOT / "docs/README.in").read_text()
    for name, value in parts.items():
        text = text.replace(f"@@{name}@@", value)
    return text


if __name__ == "__main__":
    (ROOT / "README.md").write_text(render())
