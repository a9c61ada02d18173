"""Killed and resumed, and split over two ranks (DDP, FSDP2, ZeRO-3): the same weights."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtarget import QTargetConfig
from qtarget.integrations.sft.score import score
from tests import ROOT
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
ZERO3 = {
    "deepspeed": {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # else weights as small as these stay whole
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (`pip install qtarget[zero]`)"
)
RUN = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
"""24 rows in batches of 4: an epoch is 6 steps, so step 3 is in its middle and step 6 exactly at its end."""


def work(output: Path, settings: dict, *options: str, ranks: int = 1) -> int:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [
        sys.executable,
        *launcher,
        "-m",
        "tests.integrations.sft.worker",
        str(output),
        json.dumps(settings),
        *options,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "DS_ACCELERATOR": "cpu",
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
@pytest.mark.parametrize(
    "step", [pytest.param(3, id="mid-epoch"), pytest.param(6, id="epoch-end", marks=pytest.mark.nightly)]
)
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


COMMON = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "gradient_accumulation_steps": 2}
"""Plain SGD, so that weights differ as gradients do."""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A run in one process, made once for each choice of settings."""
    made: dict[str, Path] = {}

    def run(settings: dict, *options: str) -> Path:
        key = json.dumps([settings, options])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("one")
            work(made[key], {**COMMON, **settings, "per_device_train_batch_size": 4}, *options)
        return made[key]

    return run


def two_processes(output: Path, settings: dict, *options: str) -> Path:
    """The same optimizer batches, each rank with half of the rows."""
    halves = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    work(output, {**COMMON, **settings, **halves}, *options, ranks=2)
    return output


def assert_equal_runs(one: Path, two: Path) -> None:
    """Weights, loss, plain NLL and the norm of the gradient."""
    a, b = torch.load(one / "final.pt"), torch.load(two / "final.pt")
    assert a.keys() == b.keys()
    start = make_model().state_dict()
    assert max(float((a[name] - start[name]).abs().max()) for name in a) > 2e-3
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-5
    for field in ("loss", "nll", "grad_norm"):
        first, second = ([entry[field] for entry in curve(run)] for run in (one, two))
        assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param("talr", marks=pytest.mark.nightly), "asft"])
def test_two_ranks_equal_one(one_process, tmp_path, target):
    """Ragged rows: a mean of per-rank means would differ."""
    two = two_processes(tmp_path, {"target": target})
    assert_equal_runs(one_process({"target": target}), two)
    recorded = [json.loads(line) for line in (two / "qtarget_log.jsonl").read_text().splitlines()]
    nll = [entry["nll"] for entry in curve(two)]
    assert [line["nll"] for line in recorded if "loss" in line] == nll  # once, by the main process


PADDING_FREE = {"padding_free": True, "max_length": None}


def evaluations(output: Path) -> list[dict]:
    """Our own numbers of each evaluation; TRL's ``eval_loss`` is a mean over batches, which depends on their size."""
    names = ("nll", "entropy", "mean_token_accuracy", "label_weight", "effective_sample_size", "num_tokens")
    entries = json.loads((output / "log.json").read_text())
    return [{name: entry[f"eval_{name}"] for name in names} for entry in entries if "eval_loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        pytest.param(2, {}, id="2-padded", marks=pytest.mark.nightly),
        pytest.param(9, PADDING_FREE, id="9-padding-free", marks=pytest.mark.nightly),
        pytest.param(9, {}, id="9-padded", marks=pytest.mark.nightly),
        pytest.param(2, PADDING_FREE, id="2-padding-free", marks=pytest.mark.nightly),
    ],
)
def test_two_ranks_evaluate_every_row_once(one_process, tmp_path, rows, settings):
    """9 rows in four batches of 2 and one row: 3 rows are repeated to fill the last round; of 2 rows, all but 2."""
    chosen = {"target": "dft", **settings, "per_device_eval_batch_size": 2}
    one = evaluations(one_process(chosen, "--evaluate", str(rows)))
    two = evaluations(two_processes(tmp_path, chosen, "--evaluate", str(rows)))
    assert len(one) == len(two) == 1
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [pytest.param([], id="own-head", marks=pytest.mark.nightly), pytest.param(["--tied"], id="tied-head")]
)
@pytest.mark.parametrize("sharding", [FSDP2, pytest.param(ZERO3, marks=needs_deepspeed)], ids=["fsdp2", "zero3"])
def test_a_sharded_head_equals_a_whole_one(one_process, tmp_path, sharding, options):
    one = one_process({"target": "asft"}, *options)
    assert_equal_runs(one, two_processes(tmp_path, {"target": "asft", **sharding}, *options))


@pytest.mark.slow
@needs_deepspeed
def test_a_model_split_while_it_loads(one_process, tmp_path):
    """Head probe, cache check and the pass for batch weights see whole weights though none is on any rank."""
    make_model().save_pretrained(tmp_path / "model")
    settings = QTargetConfig(str(tmp_path / "score"), **SETTINGS)
    cache = tmp_path / "cache"
    score(make_model(), settings, make_rows(), None, make_tokenizer(), directory=cache, top_k=8, progress=False)
    chosen = {"target": "talr+sft_kl", "reference_cache": str(cache)}
    options = ("--model", str(tmp_path / "model"))
    assert_equal_runs(one_process(chosen, *options), two_processes(tmp_path / "two", {**chosen, **ZERO3}, *options))
