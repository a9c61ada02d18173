"""The example of docs/inspect.md on real marked rows. Needs the data folder beside the checkout; skipped without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtarget.data.embedded import base_model_path
from tests import ROOT, SHARED

DATA = Path(os.environ.get("QTARGET_REAL_DATA", SHARED))


@pytest.mark.nightly
@pytest.mark.skipif(not (DATA / "models").is_dir(), reason=f"real data not found at {DATA}; set QTARGET_REAL_DATA")
def test_example_on_marked_rows_end_to_end(tmp_path):
    """A few rows of each: pages, JSON and areas are there, with the marks of the data."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "scripts/measure_marked_rows.py", "--data", str(DATA), "--output", str(tmp_path)]
    done = subprocess.run(
        [*command, "--limit", "40", "--steps", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "auc.json").read_text())["data"]
    assert set(results) == {"gsm8k_model_solutions", "halueval_general"}
    for name, found in results.items():
        rows = [json.loads(line) for line in (tmp_path / name / f"{name}.jsonl").read_text().splitlines()]
        assert (tmp_path / f"{name}.html").stat().st_size < 2e6
        assert [view["model"] for view in found["views"]] == ["tinystories-656k", "after-clean-rows"]
        for view in found["views"]:
            assert view["marked_rows"] == sum(row["is_noise"] for row in rows)
        document = json.loads((tmp_path / name / "page.json").read_text())
        for view, described in zip(found["views"], document["views"], strict=True):
            pairs = list(zip(described["row_nll"], document["row_marked"], strict=True))
            wins = [(a > b) + (a == b) / 2 for a, bad in pairs if bad for b, other in pairs if not other]
            assert view["by_row"]["mean surprise, -log p"][0] == pytest.approx(sum(wins) / len(wins))


@pytest.mark.nightly
@pytest.mark.skipif(not (DATA / "models").is_dir(), reason=f"real data not found at {DATA}; set QTARGET_REAL_DATA")
def test_a_named_base_is_scored_crossfitted_audited_and_inspected(tmp_path):
    """`--base` with the embedded model in the place of SmolLM2: the areas are those of the numbers on the pages."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "scripts/measure_marked_rows.py", "--data", str(DATA), "--output", str(tmp_path)]
    done = subprocess.run(
        [*command, "--limit", "16", "--base", str(base_model_path())],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "auc.json").read_text())["data"]
    assert set(results) == {"gsm8k_model_solutions", "halueval_general", "dolly_other_responses"}
    for name, found in results.items():
        rows = [json.loads(line) for line in (tmp_path / name / f"{name}.jsonl").read_text().splitlines()]
        assert found["rows"] == 16 and found["marked_rows"] == sum(row["is_noise"] for row in rows)
        assert (tmp_path / f"{name}.html").is_file() and json.loads((tmp_path / name / "audit.json").read_text())[
            "findings"
        ]
        document = json.loads((tmp_path / name / "page.json").read_text())
        view, bad = document["views"][0], [row["is_noise"] for row in rows]
        copies = view["row_crossfit"]
        assert (copies is not None) == (found["crossfit_steps"] == 2) == (name == "gsm8k_model_solutions")
        for score, values in (("mean surprise", view["row_nll"]), ("trained tokens", document["row_trained"])):
            pairs = [
                (a, b) for a, x in zip(values, bad, strict=True) if x for b, y in zip(values, bad, strict=True) if not y
            ]
            area, low, high = found["by_row"][score]
            assert area == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs), abs=1e-4)
            assert low <= area <= high
