"""Draw the README's picture: what six targets teach about one wrong token, beside what that did to a model.

    python scripts/draw_picture.py --results benchmarks/results/demo.json --output docs/picture.png

Left: the induced target Q of each loss, from autograd, at a token where the demonstration says something that the base
finds unlikely. Right: exact-match completion after fine-tuning, from the demo's own results file.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import qtarget

BASE = torch.tensor([[0.80, 0.10, 0.04, 0.03, 0.03]], dtype=torch.float64)
OBSERVED = 3
TARGETS = {
    "sft": {},
    "prior_surprise": {},
    "label_smoothing": {"smoothing": 0.1},
    "sft_kl": {},
    "dft": {},
    "target_sft": {},
}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def induced(name: str, kwargs: dict[str, float]) -> torch.Tensor:
    """``Q`` of a target at the one token, ``[vocab]``; the live model has drifted a little from the base."""
    logits = BASE.log() + torch.tensor([[-0.3, 0.1, 0.0, 0.6, 0.0]], dtype=torch.float64)
    labels = torch.tensor([OBSERVED])
    frozen = qtarget.Reference.from_logits(BASE.log(), labels)
    loss = partial(qtarget.target_loss, target=qtarget.get_target(name, **kwargs), reference=frozen, teacher=frozen)
    return qtarget.induced_target(loss, logits, labels).target[0]


def draw_targets(axes) -> None:
    """One row of bars for each target: how likely the target makes each token."""
    names = [*TARGETS]
    for row, name in enumerate(names):
        q = induced(name, TARGETS[name]).clamp(min=0)
        colors = [ORANGE if v == OBSERVED else BLUE for v in range(len(q))]
        axes.bar(range(len(q)), 0.8 * q, bottom=len(names) - 1 - row, width=0.7, color=colors)
        axes.text(-0.62, len(names) - 1 - row + 0.08, name, ha="right", fontsize=9)
    axes.set_xticks(range(5), ["base's\nchoice", "2nd", "3rd", "observed\n(noise)", "5th"], fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.55, 4.5)
    axes.set_ylim(-0.05, len(names))
    axes.set_title(
        "What each target teaches at one wrong token\n(height: probability under the induced target Q)", fontsize=10
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw_results(axes, results: dict) -> None:
    """Exact-match completion of each method: mean over seeds and the range."""
    runs = {name: [r["accuracy_percent"] for r in seeds] for name, seeds in results["runs"].items()}
    order = sorted(runs, key=lambda name: sum(runs[name]) / len(runs[name]))
    for row, name in enumerate(order):
        values = runs[name]
        mean = sum(values) / len(values)
        axes.plot([min(values), max(values)], [row, row], color=GREY, linewidth=2, zorder=1)
        axes.scatter([mean], [row], color=ORANGE if name == "sft" else BLUE, zorder=2)
        axes.text(max(values) + 1.5, row, f"{mean:.0f} %", va="center", fontsize=8)
    untrained = results["untrained"]["accuracy_percent"]
    axes.axvline(untrained, color="black", linestyle=":", linewidth=1)
    axes.text(untrained + 0.8, len(order) - 0.45, "untrained", fontsize=8)
    axes.set_yticks(range(len(order)), order, fontsize=9)
    axes.set_ylim(-0.6, len(order) - 0.1)
    axes.set_xlim(0, 100)
    axes.set_xlabel("exact completion on clean held-out prompts, % (line: range over seeds)", fontsize=8)
    config = results["config"]
    axes.set_title(textwrap.fill(results["finding"], 60), fontsize=10)
    setting = (
        f"{config['train_rows']} rows, {100 * config['rate']:.0f} % of their tokens random, {config['seeds']} seeds"
    )
    axes.text(0.98, 0.03, setting, transform=axes.transAxes, ha="right", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/demo.json"))
    parser.add_argument("--output", type=Path, default=Path("docs/picture.png"))
    options = parser.parse_args()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, 4.6), gridspec_kw={"width_ratios": [1, 1.15], "wspace": 0.42}
    )
    draw_targets(left)
    draw_results(right, json.loads(options.results.read_text()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
