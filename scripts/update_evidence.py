"""Write ``src/qtarget/report/evidence.json``: what of ``benchmarks/results`` a suggested target may be based on.

    python scripts/update_evidence.py

A test compares the file with the results, so neither can change alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from qtarget.registry import available_targets

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = ROOT / "src" / "qtarget" / "report" / "evidence.json"


def demo(name: str) -> dict[str, Any]:
    """Exact completion and kept skills of a demo run, percent, by target: mean, smallest and largest seed."""
    raw = json.loads((RESULTS / name).read_text())
    accuracy, kept = {}, {}
    for target, runs in raw["runs"].items():
        values = [run["accuracy_percent"] for run in runs]
        accuracy[target] = [round(mean(values), 1), min(values), max(values)]
        kept[target] = round(mean(run["kept_percent"] for run in runs), 1)
    return {
        "file": f"benchmarks/results/{name}",
        "rows": raw["config"]["train_rows"],
        "noise": f"{raw['config']['kind']} {raw['config']['rate']}",
        "seeds": raw["config"]["seeds"],
        "untrained": raw["untrained"]["accuracy_percent"],
        "accuracy_percent": accuracy,
        "kept_percent": kept,
    }


def real_noise() -> dict[str, Any]:
    """Held-out clean NLL of the real rows, one seed."""
    raw = json.loads((RESULTS / "real_noise.json").read_text())
    nll = {run["data"]: {name: round(value, 3) for name, value in run["clean_nll"].items()} for run in raw["runs"]}
    return {"file": "benchmarks/results/real_noise.json", "seeds": 1, "clean_nll": nll}


def audit_noise() -> dict[str, Any]:
    """What the base knows of each marked data set, and how well its surprise finds the marks."""
    raw = json.loads((RESULTS / "audit_noise.json").read_text())
    settings = {**raw["injected"], **raw["real"]}
    kept = {
        name: {
            "favourite_share": round(run["favourite_share"], 3),
            "row_auc": round(run["row_auc"]["mean_surprise"], 3),
            "token_auc": round(run["token_auc"]["surprise"], 3),
        }
        for name, run in settings.items()
    }
    return {"file": "benchmarks/results/audit_noise.json", "settings": kept}


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
        "demo": demo("demo.json"),
        "demo_dropped": demo("demo_dropped_targets.json"),
        "real_noise": real_noise(),
        "audit_noise": audit_noise(),
        "noise_map": noise_map(),
    }


if __name__ == "__main__":
    EVIDENCE.write_text(json.dumps(collect(), indent=1) + "\n")
    print(EVIDENCE.relative_to(ROOT))
