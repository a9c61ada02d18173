"""Draw the README's picture from the demo's raw results.

python scripts/draw_picture.py
"""

from __future__ import annotations

import json
from pathlib import Path

from qtarget.benchmarks.demo.bench import picture
from qtarget.benchmarks.figure import save_figure

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    save_figure(picture(json.loads((ROOT / "benchmarks/results/demo.json").read_text())), ROOT / "docs/picture.png")
