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


TASKS = {"noise.json": "tasks of this project", "noise_scan.json": "SCAN", "noise_math.json": "word problems"}


def noise_to_sft(name: str) -> dict[str, Any]:
    """Points of exact completion over plain sft, paired by seed: mean and interval at each place of a noise map."""
    raw = json.loads((RESULTS / name).read_text())
    points = []
    for cell, summary in zip(raw["cells"], raw["summary"]["cells"], strict=True):
        noise = f"{100 * cell['rate']:g} % {cell['kind'].replace('_', ' ')}" if cell["rate"] else "clean rows"
        points.append({"where": f"base that knows {cell['base']}, {noise}", "points": {
            method: [row["to_sft_points"][end] for end in ("mean", "low", "high")]
            for method, row in summary["methods"].items() if method in available_targets() and method != "sft"
        }})  # fmt: skip
    return {"file": f"benchmarks/results/{name}", "what": f"exact completion, {TASKS[name]}",
            "seeds": raw["config"]["seeds"], "places": points}  # fmt: skip


def distill_to_sft() -> dict[str, Any]:
    """The same over cross entropy on a teacher's text, by share of the text."""
    raw = json.loads((RESULTS / "distill.json").read_text())
    names = [name for name in raw["methods"] if name in available_targets() and name != "sft"]
    points = [
        {"where": f"{100 * fraction:g} % of the teacher's text", "points": {
            name: [raw["methods"][name]["to_sft_points"][i][end] for end in ("mean", "low", "high")] for name in names
        }}
        for i, fraction in enumerate(raw["fractions"])
    ]  # fmt: skip
    return {"file": "benchmarks/results/distill.json", "what": "exact completion, learning from a teacher's text",
            "seeds": raw["config"]["seeds"], "places": points}  # fmt: skip


def flawed_prior() -> dict[str, Any]:
    """Share of a planted flaw that each target corrects, with and without guard."""
    raw = json.loads((RESULTS / "prior.json").read_text())
    flaws = []
    for condition in raw["summary"]["conditions"]:
        if condition["flaw"] == "none":
            continue
        corrected = {name: row["corrected_percent"]["mean"] for name, row in condition["methods"].items()}
        where = f"{condition['flaw']}, {100 * condition['dose']:g} % of the rows that correct it"
        flaws.append({"where": where, "corrected_percent": corrected})
    return {"file": "benchmarks/results/prior.json", "seeds": raw["config"]["seeds"], "flaws": flaws}


def collect() -> dict[str, Any]:
    """All of the file."""
    return {
        "real_noise": real_noise(),
        "noise_map": noise_map(),
        "to_sft": [*map(noise_to_sft, TASKS), distill_to_sft()],
        "flawed_prior": flawed_prior(),
    }


if __name__ == "__main__":
    EVIDENCE.write_text(json.dumps(collect(), indent=1) + "\n")
    print(EVIDENCE.relative_to(ROOT))
