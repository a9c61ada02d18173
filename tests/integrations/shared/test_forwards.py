"""The forward that the trainer leaves on a model: copies, trainers in turn, torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from qtarget.integrations.shared.heads import HeadSpec, add_target_head
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer

IDS = torch.arange(3, 12)[None]


def trl_trainer(model, folder, **settings):
    return SFTTrainer(
        model,
        SFTConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
    )


def target_logits(model) -> torch.Tensor:
    return model(input_ids=IDS, target_loss=lambda hidden, weight, bias, spec: hidden @ weight.T)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}])
def test_a_deep_copy_computes_with_its_own_weights(make_trainer, settings):
    trainer = make_trainer(**settings)
    trainer.train()
    model = trainer.model.eval().requires_grad_(False)
    before = model(IDS).logits.clone()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, before)
    for parameter in twin.parameters():
        parameter.zero_()
    assert float(twin(IDS).logits.abs().max()) == float(target_logits(twin).abs().max()) == 0.0
    assert float(twin(IDS, labels=IDS, fused_lm_head=True).entropy[0, 0]) == pytest.approx(
        torch.tensor(80.0).log().item(), rel=1e-3
    )
    assert torch.equal(model(IDS).logits, before)


def test_a_trained_model_is_saved_loaded_and_pickled(make_trainer, tmp_path):
    trainer = make_trainer(
        gradient_checkpointing=False
    )  # its hook on the embeddings is a closure, which nobody pickles
    trainer.train()
    model = trainer.model.eval()
    model.save_pretrained(tmp_path / "saved")
    torch.save(model, tmp_path / "model.pt")
    for other in (
        LlamaForCausalLM.from_pretrained(tmp_path / "saved"),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert torch.equal(other.eval()(IDS).logits, model(IDS).logits)
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 12)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}])
def test_trainers_in_turn_on_one_model(make_trainer, tmp_path, settings):
    """Each trains as if it were the first: the losses are those of trainers that got the weights in a new model."""
    model, layers = make_model(), []
    for turn, ours in enumerate((True, True, False, True)):
        fresh = make_model()
        fresh.load_state_dict(model.state_dict())
        losses = []
        for each in (fresh, model):
            trainer = (
                make_trainer(model=each, max_steps=1, **settings)
                if ours
                else trl_trainer(each, tmp_path / f"{turn}", max_steps=1, **settings)
            )
            losses.append(trainer.train().training_loss)
        if ours or not settings:  # TRL 1.16 on a model that accelerate has prepared before does not autocast
            assert losses[0] == losses[1], turn
        if ours:
            layers.append(model._target_forwards.plain.__func__)
    assert layers == [LlamaForCausalLM.forward] * 3


def test_adding_the_head_again_takes_its_own_place():
    model = make_model()
    plain = model(IDS).logits.detach()
    for scale in (1.0, 2.0, 3.0):
        add_target_head(model, HeadSpec(scale))
    assert model(IDS, target_loss=lambda *args: args[-1].scale) == 3.0
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("target", ["sft", "dft"])
def test_a_compiled_backbone_is_one_graph(make_trainer, tmp_path, target):
    trainer = make_trainer(target)
    batch = next(iter(trainer.get_train_dataloader()))
    eager = float(trainer.compute_loss(trainer.model, dict(batch)).detach())
    ours, value = graphs_of(trainer, batch)
    theirs, _ = graphs_of(trl_trainer(make_model(), tmp_path / "theirs"), batch)
    assert value == pytest.approx(eager, rel=1e-6)
    assert ours == 1 <= theirs


def graphs_of(trainer, batch) -> tuple[int, float]:
    """Graphs that torch.compile makes of one loss, and the loss."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    kept = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
    inputs = dict(batch) if hasattr(trainer, "target") else kept
    value = float(trainer.compute_loss(torch.compile(trainer.model, backend=backend), inputs).detach())
    return len(graphs), value


@pytest.mark.parametrize("settings", [{}, {"packing": True}])
def test_a_compiled_run_is_the_eager_one(make_trainer, settings):
    eager = make_trainer(**settings).train().training_loss
    compiled = make_trainer(torch_compile=True, torch_compile_backend="eager", **settings).train().training_loss
    model = make_model()
    model.compile(backend="eager")
    itself = make_trainer(model=model, **settings).train().training_loss
    assert compiled == pytest.approx(eager, rel=1e-6)
    assert itself == pytest.approx(eager, rel=1e-6)
