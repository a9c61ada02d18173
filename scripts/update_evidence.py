"""Write ``src/qtarget/report/audit/evidence.json``: what of ``benchmarks/results`` a suggested target may be based on.

    python scripts/update_evidence.py

A test compares the file with the results, so neither can change alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtarget.registry import available_targets

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = ROOT / "src" / "qtarget" / "report" / "audit" / "evidence.json"


def real_noise() -> dict[str, Any]:
    """Held-out clean NLL of the real rows, one seed."""
    raw = json.loads((RESULTS / "real_noise.json").read_text())
    nll = {run["data"]: {name: round(value, 3) for name, value in run["clean_nll"].items()} for run in raw["runs"]}
    return {"file": "benchmarks/results/real_noise.json", "seeds": 1, "clean_nll": nll}


def noise_map() -> dict[str, Any]:
    """Exact completion by base, noise and target: mean and interval; practices that are no targets are left out."""
    raw = json.loads((RESULTS / "noise.json").read_text())
    points = []
    for cell, summary in zip(raw["cells"], raw["summary"]["cells"], strict=True):
        accuracy = {
            name: [row["accuracy_percent"][end] for end in ("mean", "low", "high")]
            for name, row in summary["methods"].items()
            if name in available_targets()
        }
        points.append({
            "base": cell["base"], "kind": cell["kind"], "rate": cell["rate"],
            "favourite_share": cell["base_knows"]["favourite_share"], "accuracy_percent": accuracy,
        })  # fmt: skip
    return {"file": "benchmarks/results/noise.json", "seeds": raw["config"]["seeds"], "points": points}


def collect() -> dict[str, Any]:
    """All of the file."""
    return {
        "real_noise": real_noise(),
        "noise_map": noise_map(),
    }


if __name__ == "__main__":
    EVIDENCE.write_text(json.dumps(collect(), indent=1) + "\n")
    print(EVIDENCE.relative_to(ROOT))
