"""How losses are found and called: libraries' own ones, layouts, names of parameters, and errors that say what to do."""

from __future__ import annotations

import functools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from qtarget.core.errors import HyperparameterError, LossUnderLensError, UnknownNameError, UnknownTargetError
from qtarget.report.lens.document import look
from qtarget.report.lens.losses import callable_under_lens, load_loss, parse_arguments

CROSS_ENTROPY = "torch.nn.functional:cross_entropy"


def weights_of(text: str) -> tuple[str | None, str | None, str | None]:
    form = look(load_loss(text))["form"]
    return form["a"]["name"], form["b"]["name"], form["q"]


@pytest.mark.parametrize(("reduction", "kind"), [("mean", "mean over trained tokens"), ("sum", "sum"), ("none", "sum")])
@pytest.mark.parametrize(
    ("smoothing", "row"), [(0.0, ("1", "0", None)), (0.2, ("0.8", "0.2", "uniform"))], ids=["plain", "smoothed"]
)
def test_cross_entropy_of_torch(reduction, kind, smoothing, row) -> None:
    document = look(load_loss(f"{CROSS_ENTROPY}(reduction='{reduction}', label_smoothing={smoothing})"))
    form = document["form"]
    assert (form["a"]["name"], form["b"]["name"], form["q"]) == row
    assert document["scale"]["kind"] == kind
    assert document["called_with"]["layout"] == "tokens"
    assert {check["name"] for check in document["checks"] if check["status"] in ("fault", "warn")} == (
        {"all masked", "micro-batches"} if reduction == "mean" else set()
    )


def test_losses_of_transformers() -> None:
    """``ForCausalLMLoss`` shifts inside, in float32, and wants the vocabulary; ``LabelSmoother`` takes model outputs."""
    causal = look(load_loss("transformers.loss.loss_utils:ForCausalLMLoss"))
    assert causal["called_with"] == {"layout": "batch", "shift": 1, "takes": ["labels", "num_items"]}
    assert causal["form"]["a"]["name"] == "1"
    checks = {check["name"]: check["status"] for check in causal["checks"]}
    assert checks["micro-batches"] == "pass"  # it divides by the count that it is given
    assert checks["all masked"] == "fault"  # and without one, 0 / 0
    smoother = look(load_loss("transformers.trainer_pt_utils:LabelSmoother"))
    assert [check["name"] for check in smoother["checks"] if check["status"] in ("fault", "warn")] == ["all masked"]
    assert weights_of("transformers.trainer_pt_utils:LabelSmoother(epsilon=0.3)") == ("0.7", "0.3", "uniform")


@pytest.mark.parametrize(
    ("arguments", "row"),
    [("beta=0.0", ("0", "1", "the frozen model")), ("beta=0.5", (None, None, None))],
)
def test_the_distillation_loss_of_trl(arguments, row) -> None:
    """Generalised JSD: at 0 forward KL, so the teacher with weight one; in between of no such form."""
    pytest.importorskip("trl")
    document = look(load_loss(f"trl.experimental.gkd:GKDTrainer.generalized_jsd_loss({arguments})"))
    form = document["form"]
    assert form["fits"] is (row[0] is not None)
    if row[0]:
        assert (form["a"]["name"], form["b"]["name"], form["q"]) == row
    assert document["frozen"] == "p_T"
    assert not [check for check in document["checks"] if check["status"] in ("fault", "warn")]


@pytest.mark.parametrize(("loss_type", "row"), [("nll", ("1", "0", None)), ("dft", ("p_y", "0", None))])
def test_the_trainer_losses_of_trl(loss_type, row) -> None:
    """TRL computes nll and dft inside ``compute_loss`` from a model's log-probs: a model that hands out ours."""
    trl = pytest.importorskip("trl")
    trainer = object.__new__(trl.SFTTrainer)
    loss = callable_under_lens(functools.partial(trl_loss, trainer, loss_type), f"trl {loss_type}")
    document = look(loss)
    form = document["form"]
    assert (form["a"]["name"], form["b"]["name"], form["q"]) == row
    assert document["scale"]["kind"] == "mean over trained tokens"
    checks = {check["name"]: check["status"] for check in document["checks"]}
    assert checks["all masked"] == checks["micro-batches"] == checks["masked tokens"] == "pass"
    assert not {"fault", "warn"} & set(checks.values())


def trl_loss(trainer, loss_type, logits, labels, num_items_in_batch=None):
    """``SFTTrainer.compute_loss`` around a model whose log-probs of the labels are those of ``logits``."""
    mask = labels != -100
    safe = labels.clamp(min=0)
    log_probs = torch.where(mask, logits.log_softmax(-1).gather(-1, safe[..., None])[..., 0], 0.0)
    outputs = SimpleNamespace(
        log_probs=log_probs,
        label_mask=mask,
        entropy=torch.zeros_like(log_probs),
        is_top1=torch.zeros_like(mask),
    )
    state = {
        "model": SimpleNamespace(training=False),
        "aux_loss_enabled": False,
        "accelerator": SimpleNamespace(
            parallelism_config=None, gather_for_metrics=lambda value: value, num_processes=1
        ),
        "compute_loss_func": None,
        "label_smoother": None,
        "args": SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }
    trainer.__dict__.update(state)
    inputs = {"labels": labels, "attention_mask": torch.ones_like(labels)}
    return trainer.compute_loss(lambda **_: outputs, inputs, num_items_in_batch=num_items_in_batch)


def test_classes_partials_modules_and_combinations() -> None:
    assert weights_of("torch.nn:CrossEntropyLoss(reduction='sum')") == ("1", "0", None)
    assert weights_of("prior_surprise+label_smoothing(smoothing=0.2)")[1:] == ("0.2", "uniform")
    assert weights_of("p_power(alpha=0.25)") == ("p_y^0.25", "0", None)
    smoothed = functools.partial(F.cross_entropy, label_smoothing=0.5)
    assert look(callable_under_lens(smoothed, "partial"))["form"]["b"]["name"] == "0.5"
    assert weights_of("qtarget.targets.dft:DFT") == ("p_y", "0", None)


def test_arguments_are_literals() -> None:
    assert parse_arguments("a.b:c(x=1, y='z', w=[0.5])") == ("a.b:c", {"x": 1, "y": "z", "w": [0.5]})
    for text in ("f(1)", "f(x=open('a'))", "f(x=", "f(**a)"):
        with pytest.raises(UnknownTargetError, match="name\\(key=value"):
            parse_arguments(text)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("dfft", UnknownTargetError, "did you mean dft"),
        ("no_such_module:loss", UnknownNameError, "loss 'no_such_module:loss' cannot be imported"),
        ("torch.nn.functional:no_such", UnknownNameError, "no_such"),
        ("math:pi", LossUnderLensError, "is a float; expected a callable"),
        ("p_power(beta=1)", HyperparameterError, "'beta' is unknown"),
        ("torch.nn:CrossEntropyLoss(smoothing=1)", LossUnderLensError, "could not be made"),
        ("torch.nn.functional:gaussian_nll_loss", LossUnderLensError, "has nothing for: var"),
    ],
)
def test_what_cannot_be_loaded_says_why(text, kind, words) -> None:
    with pytest.raises(kind) as raised:
        load_loss(text)
    assert words in str(raised.value)


def wrong_shape(logits, labels):
    return (logits - labels).sum()


def no_gradient(logits, labels):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten()).detach()


def a_float(logits, labels):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten()).item()


def a_dict(logits, labels):
    return {"loss": F.cross_entropy(logits.flatten(0, -2), labels.flatten())}


def in_place_on_its_graph(logits, labels):
    probs = logits.exp()
    loss = probs.sum()
    probs.mul_(2.0)
    return loss + (probs.exp_().log() * probs.sin()).sum() + probs.mul_(0.5).sum()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (wrong_shape, "called with logits (10, 128) torch.float64, labels (10,) torch.int64, raised RuntimeError"),
        (no_gradient, "does not depend on the logits"),
        (a_float, "returned float; expected a floating-point tensor"),
        (a_dict, "returned dict"),
        (in_place_on_its_graph, "must not change its own inputs in place"),
    ],
)
def test_what_cannot_be_called_says_with_what(function, words) -> None:
    with pytest.raises(LossUnderLensError) as raised:
        callable_under_lens(function, function.__name__)
    assert words in str(raised.value)


def test_a_gradient_that_is_not_finite_says_where() -> None:
    """The square root of a negative number wherever the label is unlikely."""

    def rooted(logits, labels):
        p_y = logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return -(p_y - 0.1).sqrt().sum()

    with pytest.raises(LossUnderLensError, match=r"not finite at \d+ of 160 tokens, the first with p_y = 0\.00"):
        look(callable_under_lens(rooted, "rooted"))


def test_only_the_two_inputs_are_needed_by_place() -> None:
    assert look(callable_under_lens(lambda x, y: F.cross_entropy(x, y), "lambda"))["form"]["a"]["name"] == "1"
    assert look(callable_under_lens(lambda *both: F.cross_entropy(*both), "star"))["form"]["a"]["name"] == "1"


def test_a_distillation_loss_without_labels() -> None:
    def forward_kl(logits, teacher_logits):
        return F.kl_div(logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="sum")

    document = look(callable_under_lens(forward_kl, "kl"))
    assert (document["form"]["a"]["name"], document["form"]["q"]) == ("0", "the frozen model")
    assert {check["name"] for check in document["checks"] if check["status"] == "skip"} >= {
        "masked tokens",
        "all masked",
    }
