"""Draw the pictures of both demos from their raw results: the README's, and that of docs/rl.md.

python scripts/draw_picture.py
"""

from __future__ import annotations

import json
from pathlib import Path

from qtarget.benchmarks.demo import bench, rl
from qtarget.benchmarks.figure import save_figure

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    for picture, results, name in ((bench.picture, "demo", "picture"), (rl.picture, "demo_rl", "rl_demo")):
        found = json.loads((ROOT / f"benchmarks/results/{results}.json").read_text())
        save_figure(picture(found), ROOT / f"docs/{name}.png")
