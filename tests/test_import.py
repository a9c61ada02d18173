"""The core as an outsider meets it: a bare import, the public names, and errors without any type checker around."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import qtarget

SOURCE = Path(qtarget.__file__).parents[1]
HEAVY = (
    "triton",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "pyarrow",
    "pandas",
    "matplotlib",
    "safetensors",
    "typer",
    "rich",
    "httpx2",
    "msgspec",
    "aiohttp",
    "mosec",
    "ray",
)


def fresh(code: str) -> str:
    """Standard output of ``code`` in an interpreter that has seen nothing yet."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_use_load_nothing_heavy() -> None:
    """Not only the import: building every target and a first loss, too."""
    code = f"""
import json, sys, torch
heavy = {HEAVY!r}
before = [name for name in heavy if name in sys.modules]
import qtarget
for name in qtarget.available_targets():
    qtarget.get_target(name)
qtarget.linear_target_loss(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, -100]), "dft")
print(json.dumps([before, [name for name in heavy if name in sys.modules]]))
"""
    before, after = json.loads(fresh(code))
    assert after == before == []


def test_the_core_needs_no_jaxtyping() -> None:
    """With jaxtyping and beartype hidden, the annotations fall back to plain tensors and the loss is the same."""
    code = """
import sys
sys.modules["jaxtyping"] = sys.modules["beartype"] = None
import torch, qtarget
print(float(qtarget.target_loss(torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0]), "dft")))
"""
    assert abs(float(fresh(code)) - 0.34657359027997264) < 1e-12


def test_bad_arguments_raise_house_errors() -> None:
    """These calls break their annotations, so under the tests' type checker they never reach qtarget's own checks."""
    code = """
import json, torch, qtarget
hidden, head, labels = torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, 2])
calls = {
    "backend": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", backend="fast"),
    "reduction": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", reduction="average"),
    "none": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", reduction="none"),
    "divided sum": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", reduction="sum", num_items=2),
    "no items": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", num_items=0),
    "width": lambda: qtarget.linear_target_loss(hidden[:, 1:], head, labels, "sft"),
    "rows": lambda: qtarget.linear_target_loss(hidden, head, labels[1:], "sft"),
    "dense rows": lambda: qtarget.linear_target_loss(hidden, head, labels[1:], "sft", backend="dense"),
    "weights_scale": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", weights_scale="labels"),
    "loss_weights": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", loss_weights=torch.ones(3)),
    "teacher twice": lambda: qtarget.target_loss(
        head, labels, "forward_kl", teacher_logits=head, teacher=qtarget.FrozenHead(hidden, head)
    ),
    "teacher rows": lambda: qtarget.target_loss(head[:2], labels, "forward_kl", teacher_logits=head),
    "number": lambda: qtarget.get_target("p_power", alpha="1"),
    "policy": lambda: qtarget.Reference(tail_policy="drop"),
    "logits and hidden": lambda: qtarget.token_statistics(head, labels, hidden=hidden, lm_head_weight=head),
    "no labels": lambda: qtarget.token_statistics(head),
    "negative k": lambda: qtarget.token_statistics(head[:2], labels, top_k=-1),
    "no chunk": lambda: qtarget.token_statistics(head[:2], labels, chunk_size=0),
    "half a chunk": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", chunk_size=1.5),
    "float labels": lambda: qtarget.linear_target_loss(hidden, head, labels.float(), "sft"),
    "raw reference": lambda: qtarget.linear_target_loss(hidden, head, labels, "asft", reference=head),
    "bias": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", bias=torch.zeros(3)),
    "no cap": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", logit_softcap=0.0),
    "no scale": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", logit_scale=0.0),
    "explained width": lambda: qtarget.explain_backend(hidden[:, 1:], head, "sft"),
    "frozen cap": lambda: qtarget.linear_target_loss(
        hidden, head, labels, "forward_kl", teacher=qtarget.FrozenHead(hidden, head, logit_softcap=-1.0)
    ),
    "items by rank": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", num_items=torch.tensor([1, 1])),
    "half dtype": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", logits_dtype=torch.float16),
    "group": lambda: qtarget.linear_target_loss(hidden, head, labels, "sft", vocab_group="tp"),
    "other mask": lambda: qtarget.linear_target_loss(
        hidden, head, labels, "asft", reference=qtarget.token_statistics(head[:2], torch.tensor([1, -100]), top_k=2)
    ),
}
out = {}
for name, call in calls.items():
    try:
        call()
        out[name] = ["nothing", ""]
    except Exception as error:
        out[name] = [type(error).__name__, str(error)]
print(json.dumps(out))
"""
    seen = json.loads(fresh(code))
    expected = {
        "backend": ("HyperparameterError", "expected one of auto, chunked, compiled, triton, dense"),
        "reduction": ("HyperparameterError", "'average' is unknown; expected mean, sum, none"),
        "none": ("HyperparameterError", "backend='dense'"),
        "divided sum": ("HyperparameterError", "leave it out"),
        "no items": ("HyperparameterError", "num_items=0"),
        "width": ("ShapeError", "width 2"),
        "rows": ("ShapeError", "(1,)"),
        "dense rows": ("ShapeError", "(1,)"),
        "loss_weights": ("ShapeError", "loss_weights has shape (3,)"),
        "weights_scale": ("HyperparameterError", "'labels' is unknown; expected all, label"),
        "teacher twice": ("ShapeError", "not both"),
        "teacher rows": ("ShapeError", "teacher_logits"),
        "number": ("HyperparameterError", "alpha='1'"),
        "policy": ("IncompatibleError", "bucket, spread, renormalize"),
        "logits and hidden": ("ShapeError", "either logits, or hidden"),
        "no labels": ("ShapeError", "labels"),
        "negative k": ("HyperparameterError", "top_k=-1"),
        "no chunk": ("HyperparameterError", "chunk_size=0"),
        "half a chunk": ("HyperparameterError", "chunk_size=1.5"),
        "float labels": ("ShapeError", "torch.long"),
        "raw reference": ("IncompatibleError", "qtarget.token_statistics"),
        "bias": ("ShapeError", "bias has shape (3,)"),
        "no cap": ("HyperparameterError", "None for no cap"),
        "no scale": ("HyperparameterError", "logit_scale=0.0"),
        "explained width": ("ShapeError", "width 2"),
        "frozen cap": ("HyperparameterError", "logit_softcap=-1.0"),
        "items by rank": ("HyperparameterError", "the sum over ranks"),
        "half dtype": ("HyperparameterError", "expected torch.float32"),
        "group": ("HyperparameterError", "torch.distributed.ProcessGroup"),
        "other mask": ("ShapeError", "lists no token at 1 of 2"),
    }
    for name, (kind, part) in expected.items():
        assert seen[name][0] == kind, (name, seen[name])
        assert part in seen[name][1], (name, seen[name])


def test_public_names_are_locked() -> None:
    """Changing this list is a decision: adding is cheap, removing breaks someone."""
    assert sorted(qtarget.__all__) == [
        "BackendChoice",
        "Combined",
        "FrozenHead",
        "Guarded",
        "InducedTarget",
        "LabelWeight",
        "Needs",
        "Outcomes",
        "QTargetError",
        "Reference",
        "Regularised",
        "Target",
        "Taught",
        "Terms",
        "TokenReport",
        "TokenView",
        "available_targets",
        "available_trust_regions",
        "check_target",
        "explain_backend",
        "get_target",
        "induced_target",
        "label_weights",
        "linear_target_loss",
        "target_loss",
        "token_statistics",
    ]
    assert all(hasattr(qtarget, name) for name in qtarget.__all__)


def test_the_trainer_is_imported_when_it_is_asked_for() -> None:
    code = """
import sys, qtarget
assert {"QTargetConfig", "QTargetTrainer"} <= set(dir(qtarget)) and "trl" not in sys.modules
from qtarget import QTargetConfig, QTargetTrainer
from trl import SFTConfig, SFTTrainer
print(issubclass(QTargetTrainer, SFTTrainer), issubclass(QTargetConfig, SFTConfig))
"""
    assert fresh(code).split() == ["True", "True"]


def test_without_the_extra_the_trainer_says_what_to_install() -> None:
    code = """
import sys
sys.modules["trl"] = None
import qtarget
try:
    from qtarget import QTargetTrainer
except ImportError as error:
    print(error)
try:
    qtarget.QTrainer
except AttributeError as error:
    print(error)
"""
    assert fresh(code).splitlines() == [
        "qtarget.QTargetTrainer needs trl: pip install 'qtarget[train]'",
        "module 'qtarget' has no attribute 'QTrainer'",
    ]


def test_every_error_has_the_root_and_a_built_in() -> None:
    from qtarget.core import errors

    kinds = [v for v in vars(errors).values() if isinstance(v, type) and v is not errors.QTargetError]
    assert len(kinds) >= 10
    for kind in kinds:
        assert issubclass(kind, errors.QTargetError)
        assert any(base.__module__ == "builtins" and base is not Exception for base in kind.__mro__[1:-3]), kind
