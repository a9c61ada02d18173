"""Two processes are one: weights and logged numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests import ROOT


def work(output, settings: dict, ranks: int) -> tuple[dict[str, torch.Tensor], list[dict]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.integrations.rl.worker", str(output), json.dumps(settings)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    log = [line for line in json.loads((output / "log.json").read_text()) if "ratio/mean" in line]
    return torch.load(output / "final.pt"), log


@pytest.mark.nightly
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_two_processes_are_one(loss_type, tmp_path):
    settings = {
        "loss_type": loss_type,
        "max_steps": 3,
        "per_device_train_batch_size": 16,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    one, log = work(tmp_path / "one", settings, 1)
    two, other = work(tmp_path / "two", settings | {"per_device_train_batch_size": 8}, 2)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-6)
    assert len(log) == len(other) == 3
    keys = [k for k in log[0] if k.startswith(("ratio", "divergence", "region", "rollout", "entropy", "reward"))]
    assert len(keys) > 15
    for mine, theirs in zip(log, other, strict=True):
        for key in keys:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-6), key
