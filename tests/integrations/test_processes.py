"""Killed and resumed, and split over two ranks: the same weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RUN = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
"""24 rows in batches of 4: an epoch is 6 steps, so step 3 is in its middle and step 6 exactly at its end."""


def work(output: Path, settings: dict, *options: str, ranks: int = 1) -> int:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [
        sys.executable,
        *launcher,
        "-m",
        "tests.integrations.worker",
        str(output),
        json.dumps(settings),
        *options,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stdout + done.stderr)
    return done.returncode


def curve(output: Path) -> list[dict]:
    """The log without what the clock decides."""
    entries = json.loads((output / "log.json").read_text())
    return [{k: v for k, v in e.items() if not k.endswith(("runtime", "per_second"))} for e in entries if "loss" in e]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert work(output, {"target": "asft", **RUN}) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6], ids=["mid-epoch", "epoch-end"])
def test_killed_and_resumed_is_bit_for_bit_undisturbed(undisturbed, tmp_path, step):
    settings = {"target": "asft", **RUN}
    assert work(tmp_path, settings, "--die-at", str(step)) == -signal.SIGKILL
    assert not (tmp_path / "final.pt").exists()
    half_written = tmp_path / "checkpoint-8"  # as a kill while saving leaves it
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"cut off")
    assert work(tmp_path, settings, "--resume") == 0
    expected, found = torch.load(undisturbed / "final.pt"), torch.load(tmp_path / "final.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert curve(tmp_path) == curve(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["asft", "talr"])
def test_two_ranks_equal_one(tmp_path, target):
    """Ragged rows: a mean of per-rank means would differ."""
    common = {"target": target, "max_steps": 3, "optim": "sgd", "learning_rate": 0.5}
    one, two = tmp_path / "one", tmp_path / "two"
    work(one, {**common, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    work(
        two,
        {**common, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"},
        ranks=2,
    )
    a, b = torch.load(one / "final.pt"), torch.load(two / "final.pt")
    worst = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert worst < 2e-5
    losses = [[e["loss"] for e in curve(run)] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    nll = [[e["nll"] for e in curve(run)] for run in (one, two)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-4)
    recorded = [json.loads(line) for line in (two / "qtarget_log.jsonl").read_text().splitlines()]
    assert [line["nll"] for line in recorded if "loss" in line] == nll[1]  # once, by the main process
