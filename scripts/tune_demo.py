"""The rate of `crossfit_consensus` in `qtarget demo`: tuned as `qtarget bench noise` tunes, at the demo's two points.

python scripts/tune_demo.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from qtarget.benchmarks.demo.bench import BASELINE, REGIMES, DemoConfig
from qtarget.benchmarks.noise.bench import NoiseConfig, run_noise
from qtarget.benchmarks.noise.runs import Cell
from qtarget.storage.files import write_text

RESULTS = Path(__file__).parents[1] / "benchmarks/results/demo_tuning.json"

if __name__ == "__main__":
    demo = DemoConfig()
    cells = tuple(Cell(base, demo.kind, demo.rate) for base in REGIMES)
    names = (BASELINE, "crossfit_consensus")
    config = NoiseConfig(cells=cells, names=names, screen=(), seeds=1, steps=demo.steps, workers=demo.workers)
    with tempfile.TemporaryDirectory() as folder:
        run_noise(
            config, made := Path(folder) / RESULTS.name, resume=False, progress=lambda *said: print(*said, flush=True)
        )
        write_text(RESULTS, made.read_text(encoding="utf-8"))
