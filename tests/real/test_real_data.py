"""Real rows, a real tiny model and a real vocabulary. Needs the data folder beside the checkout; skipped without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT, SHARED

DATA = Path(os.environ.get("QTARGET_REAL_DATA", SHARED))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "models").is_dir(), reason=f"real data not found at {DATA}; set QTARGET_REAL_DATA"),
]


def run(*command: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.nightly
def test_real_noise_example_end_to_end(tmp_path):
    """Score, train five targets, resume one, evaluate: a small budget already teaches the format of the answers."""
    run(
        "scripts/measure_real_noise.py", "--data", str(DATA), "--output", str(tmp_path), "--rows", "64", "--steps", "16"
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["data"] for r in results["runs"]] == ["dolly_3k", "gsm8k_model_solutions"]
    for part in results["runs"]:
        nll = part["clean_nll"]
        assert set(nll) == {"untrained", "teacher", "sft", "prior_surprise", "dft", "asft", "target_sft"}
        assert nll["sft"] < nll["untrained"] - 0.2
        assert nll["teacher"] < nll["untrained"] - 0.2
        assert part["base_cache_bytes_a_token"] < 400
    assert results["runs"][1]["marked_wrong"] > 16  # 62 % of all


@pytest.mark.nightly
def test_real_vocabulary_with_lora_and_packing_within_2_gb(tmp_path):
    """4 x 512 tokens of 151,936 float32 logits alone are 1.2 GB; with their gradient naive code needs more than 3 GB."""
    out = run("-m", "tests.real.large_vocabulary", str(DATA / "models/tokenizer-qwen2"), str(tmp_path))
    result = json.loads(out.strip().splitlines()[-1])
    assert result["tokens"] > 1000
    assert result["peak_bytes"] < 2e9
    assert result["losses"][-1] < result["losses"][0]
