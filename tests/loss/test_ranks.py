"""A head split over two processes: the loss and the gradients of one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qtarget
from qtarget.core.errors import IncompatibleError, ShapeError
from tests import ROOT
from tests.loss import ranks


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, *launcher, "-m", "tests.loss.ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("softcap", ranks.SOFTCAPS)
@pytest.mark.parametrize("name", ranks.CASES)
def test_two_shards_equal_one_head(two: list[dict], name: str, softcap: float | None) -> None:
    whole = ranks.run(name, slice(0, ranks.VOCAB), None, softcap)
    for rank, rows in enumerate((slice(0, ranks.ROWS_OF_FIRST), slice(ranks.ROWS_OF_FIRST, ranks.VOCAB))):
        for field, ours in two[rank][name, softcap].items():
            expected = whole[field][rows] if field in ("weight", "bias") else whole[field]
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10, msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.slow
def test_errors_reach_every_rank(two: list[dict]) -> None:
    for rank in (0, 1):
        assert f"top_k=42 exceeds the vocabulary of {ranks.VOCAB}" in two[rank]["top_k"]
        assert "hold [41, 0] rows" in two[rank]["no rows"]


@pytest.mark.slow
def test_fsdp2_equals_one_process(two: list[dict]) -> None:
    """Both ranks see the same rows, so FSDP's mean over ranks is the gradient itself."""
    whole = ranks.sharded_model(shard=False)
    assert float(whole["lm_head.weight"].norm()) > 1e-3
    for rank in (0, 1):
        for field, expected in whole.items():
            torch.testing.assert_close(two[rank]["fsdp2"][field], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_example_in_the_docs_runs(tmp_path: Path) -> None:
    """Two processes print the loss that one process computes from the whole head."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/loss.md").read_text(), flags=re.DOTALL)
    script = tmp_path / "split_head.py"
    script.write_text(code)
    apart = ["--redirects=1", "--log-dir", str(tmp_path / "logs")]  # in one pipe two lines may run into each other
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *apart, str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(8, 16), torch.randn(100, 16), torch.randint(100, (8,))
    expected = float(qtarget.linear_target_loss(hidden, head, labels, "dft", backend="dense"))
    printed = [float(log.read_text()) for log in (tmp_path / "logs").glob("**/stdout.log")]
    assert printed == pytest.approx([expected, expected], rel=1e-5)


def test_what_a_split_head_cannot_do_is_refused(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hidden, weight, _bias, labels, _ = ranks.problem()
        group = torch.distributed.group.WORLD
        one = qtarget.linear_target_loss(hidden, weight, labels, "sft", vocab_group=group)
        torch.testing.assert_close(one, qtarget.linear_target_loss(hidden, weight, labels, "sft"))
        with pytest.raises(IncompatibleError, match=r"split over vocab_group.*whole log-softmax"):
            qtarget.linear_target_loss(hidden, weight, labels, "gem", vocab_group=group)
        with pytest.raises(IncompatibleError, match="dense"):
            qtarget.linear_target_loss(hidden, weight, labels, "sft", vocab_group=group, backend="dense")
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        spread = torch.distributed.tensor.distribute_tensor(weight, mesh)
        with pytest.raises(ShapeError, match="full_tensor"):
            qtarget.linear_target_loss(hidden, spread, labels, "sft")
    finally:
        torch.distributed.destroy_process_group()
