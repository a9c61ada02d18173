"""Distillation from whatever the teacher is: caches of several engines, a live model, other paddings, other tokenizers."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest
import torch

import qtarget
from qtarget.core.errors import CacheMismatchError, ConfigError, IncompatibleError
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.score import score
from qtarget.integrations.shared.teacher import truncate_reference
from qtarget.registry import get_target
from qtarget.scoring.sources.engines import EngineChoice
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer
from tests.scoring.sources.servers import FakeSglang, FakeVllm, serving

TEACHER_TARGETS = [
    "distillation",
    "hybrid_distillation",
    "target_sft",
    "forward_kl",
    "reverse_kl",
    "generalized_jsd",
    "skew_kl",
    "taid",
]
ANCHORED_TARGETS = ["asft", "sft_kl"]
DIVERGENCES = ["forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "taid"]
POLICIES = ["bucket", "spread", "renormalize"]


@pytest.fixture(scope="module")
def engines():
    """Every engine that answers in this process, by name."""
    with ExitStack() as stack:
        choices = {"local": EngineChoice()}
        for name, kind in (("vllm", FakeVllm), ("sglang", FakeSglang)):
            server = kind(make_model(seed=3).eval(), make_tokenizer())
            server.max_logprobs = -1
            choices[name] = EngineChoice(name, stack.enter_context(serving(server)))
        yield choices


@pytest.fixture
def write(tmp_path):
    """Score a model into a folder of its own."""
    written = []

    def cache(engine=None, model=None, top_k=80, **named):
        directory = tmp_path / f"cache-{len(written)}"
        written.append(directory)
        score(
            model or make_model(seed=3),
            QTargetConfig(str(tmp_path / "scoring"), **SETTINGS),
            make_rows(),
            None,
            make_tokenizer(),
            directory=directory,
            top_k=top_k,
            log_probs_dtype="float32",
            model_id="teacher",
            progress=False,
            engine=engine,
            **named,
        )
        return str(directory)

    return cache


@torch.no_grad()
def losses(trainer, targets) -> dict[str, float]:
    """Of the first batch, by target; the batch has been through the real collator."""
    batch = next(iter(trainer.get_train_dataloader()))
    out = {}
    for name in targets:
        trainer.target = get_target(name)
        out[name] = float(trainer.compute_loss(trainer.model, dict(batch)))
    return out


@pytest.mark.parametrize("packing", [False, True])
def test_every_engines_cache_gives_every_target_the_loss_of_a_live_teacher(make_trainer, engines, write, packing):
    """The whole vocabulary is listed, so that nothing but the route differs."""
    teacher = {"teacher_model": make_model(seed=3), "reference_model": make_model(seed=3)}
    live = losses(make_trainer("distillation", models=teacher, packing=packing), TEACHER_TARGETS)
    anchored = losses(make_trainer("asft", models=teacher, packing=packing), ANCHORED_TARGETS)
    for engine in engines.values():
        path = write(engine)
        ours = make_trainer("distillation", teacher=path, packing=packing)
        assert ours.frozen_models == {}
        assert losses(ours, TEACHER_TARGETS) == pytest.approx(live, abs=3e-5), engine.name
        named = {"reference_cache": path, "reference_model_name_or_path": "teacher"}
        found = losses(make_trainer("asft", packing=packing, **named), ANCHORED_TARGETS)
        assert found == pytest.approx(anchored, abs=3e-5), engine.name


@pytest.mark.parametrize("policy", POLICIES)
def test_engines_agree_under_every_tail_policy(make_trainer, engines, write, policy):
    # the reverse divergence to a teacher that gives whole regions nothing is infinite, and refused
    refused = ["reverse_kl"] if policy == "renormalize" else []
    targets = [name for name in TEACHER_TARGETS if name not in refused]
    found = {}
    for name, engine in engines.items():
        trainer = make_trainer("distillation", teacher=write(engine, top_k=8, tail_policy=policy))
        found[name] = losses(trainer, targets)
        for target in refused:
            with pytest.raises(IncompatibleError, match="renormalize"):
                losses(trainer, [target])
    assert found["vllm"] == pytest.approx(found["local"], abs=3e-5)
    assert found["sglang"] == pytest.approx(found["local"], abs=3e-5)
    assert min(abs(value) for value in found["local"].values()) > 1e-3


@pytest.mark.parametrize("packing", [False, True])
def test_a_student_equal_to_its_teacher_has_no_divergence(make_trainer, engines, write, packing):
    """Any shift of the teacher against the labels makes this large; another student shows that the test can fail."""
    for engine in engines.values():
        path = write(engine, top_k=8)
        same = make_trainer("forward_kl", model=make_model(seed=3), teacher=path, packing=packing)
        assert max(abs(v) for v in losses(same, DIVERGENCES).values()) < 1e-6, engine.name
        other = make_trainer("forward_kl", model=make_model(seed=2), teacher=path, packing=packing)
        assert min(losses(other, DIVERGENCES).values()) > 1e-3


def forward_kl_by_hand(teacher, student, k, policy, *, renormalize_both=False) -> float:
    """Mean over tokens, from full float64 logits."""
    p, q = (logits.double().log_softmax(-1) for logits in (teacher, student))
    top, ids = p.topk(k)
    listed = q.gather(-1, ids)
    tails = [(1 - value.exp().sum(-1, keepdim=True)).log() for value in (top, listed)]
    if policy == "bucket":
        p, q = torch.cat([top, tails[0]], -1), torch.cat([listed, tails[1]], -1)
    elif policy == "spread":
        p = (tails[0] - torch.tensor(p.shape[-1] - k).log()).expand_as(p).scatter(-1, ids, top)
    else:
        p, q = top.log_softmax(-1), listed.log_softmax(-1) if renormalize_both else listed
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("policy", POLICIES)
def test_mass_that_a_student_moves_outside_the_top_k_costs(make_trainer, write, policy):
    """Only a token that the teacher never lists becomes likelier; a loss renormalised on both sides would not see it."""
    student, teacher = make_model(seed=3).eval(), make_model(seed=3).eval()
    trainer = make_trainer("forward_kl", model=student, teacher=write(top_k=4, tail_policy=policy))
    batch = next(iter(trainer.get_train_dataloader()))
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    trained = labels != -100
    with torch.no_grad():
        theirs = teacher(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1][trained]
        never = next(i for i in range(80) if i not in theirs.topk(4).indices)
        hidden = student.model(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1][trained]
        found, blind = [], []
        for step in (0.0, 0.5):
            student.lm_head.weight[never] += step * hidden.mean(0).sign()
            ours = hidden @ student.lm_head.weight.T
            found.append(float(trainer.compute_loss(student, dict(batch))))
            assert found[-1] == pytest.approx(forward_kl_by_hand(theirs, ours, 4, policy), abs=1e-5)
            blind.append(forward_kl_by_hand(theirs, ours, 4, "renormalize", renormalize_both=True))
    assert found[1] > found[0] + 1e-3
    assert blind[1] == pytest.approx(blind[0], abs=1e-6)


@pytest.mark.parametrize("target", ["distillation", "hybrid_distillation"])
def test_finite_differences_at_temperature_two(make_trainer, target):
    """Value and gradient carry the same factor T^2, through collator, shift and chunked loss, in float64."""
    kwargs = {"temperature": 2.0} if target == "distillation" else {}
    trainer = make_trainer(target, models={"teacher_model": make_model(seed=3)}, target_kwargs=kwargs)
    trainer.model.double()
    teacher, _ = trainer.frozen_models["teacher"]
    teacher.double()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    generator = torch.Generator().manual_seed(0)
    head = trainer.model.lm_head.weight  # norms inside the model are float32 whatever its dtype
    step = torch.randn(head.shape, generator=generator, dtype=head.dtype)
    slope = float((head.grad * step).sum())
    values = []
    with torch.no_grad():
        for sign in (1, -2):  # there, and back to the other side
            head += sign * 1e-5 * step
            values.append(float(trainer.compute_loss(trainer.model, dict(batch))))
    assert abs(slope) > 1e-2
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


# -- vocabularies ------------------------------------------------------------------------------------------------


def padded(rows: int, seed: int = 3):
    """A model with more vocabulary rows than its tokenizer uses; the first ones are those of the shorter model."""
    model, short = make_model(seed=seed, vocab_size=rows).eval(), make_model(seed=seed).eval()
    with torch.no_grad():
        for name, value in short.state_dict().items():
            model.state_dict()[name][: len(value)] = value
    return model


def test_padding_rows_are_refused_until_the_config_says_so(make_trainer, write):
    for student, teacher in ((None, padded(96)), (padded(96, seed=0), make_model(seed=3))):
        with pytest.raises(
            CacheMismatchError, match=r"differ by padding alone; set vocab_padding: truncate .* first 80"
        ):
            make_trainer("distillation", model=student, models={"teacher_model": teacher})
    with pytest.raises(CacheMismatchError, match="model that is trained has 80 vocabulary rows, the teacher 96"):
        make_trainer("distillation", teacher=write(model=padded(96)))


@pytest.mark.parametrize("longer", ["teacher", "student"])
def test_truncated_vocabularies_give_the_loss_of_truncated_logits(make_trainer, write, longer, caplog):
    student = padded(96, seed=0) if longer == "student" else make_model().eval()
    teacher = padded(96) if longer == "teacher" else make_model(seed=3).eval()
    expected = {}
    live = make_trainer("distillation", model=student, models={"teacher_model": teacher}, vocab_padding="truncate")
    batch = next(iter(live.get_train_dataloader()))
    labels = batch["labels"][:, 1:]
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    for name in TEACHER_TARGETS:
        with torch.no_grad():
            logits, theirs = (model(**ids).logits[:, :-1, :80] for model in (student, teacher))
            frozen = qtarget.Reference.from_logits(theirs, labels)
            expected[name] = float(qtarget.target_loss(logits, labels, get_target(name), teacher=frozen))
    assert losses(live, TEACHER_TARGETS) == pytest.approx(expected, abs=3e-5)
    path = write(model=teacher, top_k=96 if longer == "teacher" else 80)
    with caplog.at_level(logging.WARNING):
        stored = make_trainer("distillation", model=student, teacher=path, vocab_padding="truncate")
    assert losses(stored, TEACHER_TARGETS) == pytest.approx(expected, abs=3e-5)


def test_training_on_truncated_rows_leaves_the_padding_alone(make_trainer):
    student = padded(96, seed=0)
    before = student.lm_head.weight.detach().clone()
    trainer = make_trainer(
        "distillation",
        model=student,
        models={"teacher_model": make_model(seed=3)},
        vocab_padding="truncate",
        optim="sgd",
    )
    trainer.train()
    after = trainer.model.lm_head.weight.detach()
    assert torch.equal(after[80:], before[80:])
    assert not torch.equal(after[:80], before[:80])


def test_truncation_is_the_distribution_given_a_known_token():
    log_probs = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    labels = torch.tensor([0, 3, 9, 2, 7])
    top, ids = log_probs.topk(7)
    tail = (1 - top.exp().sum(-1)).log()
    given = truncate_reference(
        qtarget.Reference(
            label_log_probs=log_probs.gather(-1, labels[:, None])[:, 0],
            topk_ids=ids,
            topk_log_probs=top,
            tail_log_mass=tail,
        ),
        10,
    )
    for t in range(5):
        lost = sum(float(log_probs[t, i].exp()) for i in ids[t] if i >= 10)
        for i, slot, value in zip(ids[t].tolist(), given.topk_ids[t].tolist(), given.topk_log_probs[t].tolist()):
            assert slot == (i if i < 10 else -1)
            assert value == pytest.approx(
                float(log_probs[t, i]) - torch.tensor(1 - lost).log().item() if i < 10 else -torch.inf
            )
        assert float(given.tail_log_mass[t].exp()) == pytest.approx(float(tail[t].exp()) / (1 - lost))
        assert float(given.label_log_probs[t].exp()) == pytest.approx(float(log_probs[t, labels[t]].exp()) / (1 - lost))


def other_tokenizer():
    """Two letters swapped."""
    tokenizer = make_tokenizer()
    import json

    from tokenizers import Tokenizer

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), pad_token="~", eos_token="^", unk_token="?"
    )


def test_another_tokenizer_is_refused_with_the_tokens_that_differ(make_trainer, tmp_path):
    folder = str(tmp_path / "teacher")
    make_model(seed=3).save_pretrained(folder)
    other_tokenizer().save_pretrained(folder)
    words = r"teacher has another tokenizer .*: id 3 is 'a' here and 'b' there; id 4 is 'b' here and 'a' there"
    with pytest.raises(CacheMismatchError, match=words):
        make_trainer("distillation", teacher=folder)
    args = QTargetConfig(str(tmp_path / "scoring"), **SETTINGS)
    with pytest.raises(CacheMismatchError, match=words):
        score(folder, args, make_rows(), None, make_tokenizer(), directory=tmp_path / "cache", top_k=2, progress=False)
    make_tokenizer().save_pretrained(folder)
    live = losses(make_trainer("distillation", teacher=folder), TEACHER_TARGETS)
    given = losses(make_trainer("distillation", models={"teacher_model": make_model(seed=3)}), TEACHER_TARGETS)
    assert live == pytest.approx(given, abs=1e-6)


def test_tokens_beyond_a_shorter_head_are_no_padding(make_trainer):
    with pytest.raises(CacheMismatchError, match="the teacher 70, and the tokenizer uses 77: these are other tokens"):
        make_trainer(
            "distillation", models={"teacher_model": make_model(seed=3, vocab_size=70)}, vocab_padding="truncate"
        )


# -- the key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"teacher": "CACHE", "teacher_cache": "x"}, "is a cache, and teacher_cache: x is set too"),
        (
            {"teacher": "some/model", "teacher_model_name_or_path": "y"},
            "name of a model.*, and teacher_model_name_or_path: y",
        ),
        ({"teacher": "some/model", "teacher_cache": "x"}, "name of a model.*, and teacher_cache: x is set too"),
        ({"teacher": "http://host:1", "teacher_cache": "x"}, "are both set; keep one"),
        ({"teacher": "EMPTY"}, "has neither manifest.json .* nor config.json"),
        ({"vocab_padding": "ignore"}, "refuse, truncate"),
    ],
)
def test_keys_that_contradict_each_other(make_trainer, write, tmp_path, keys, words):
    (tmp_path / "empty").mkdir()
    places = {"CACHE": lambda: write(), "EMPTY": lambda: str(tmp_path / "empty")}
    keys = {name: places[value]() if value in places else value for name, value in keys.items()}
    with pytest.raises(ConfigError, match=words):
        make_trainer("distillation", **{"teacher": None, **keys}, models={"teacher_model": padded(96)})


def test_a_url_is_nothing_to_train_from_directly(make_trainer):
    with pytest.raises(ConfigError, match=r"http://host:1 is asked once, before training; .*sft.score.score"):
        make_trainer("distillation", teacher="http://host:1")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"teacher": "nonsense"}, "teacher_model_name_or_path nonsense cannot be loaded"),
        (
            {"reference_model_name_or_path": "no/such-model"},
            "reference_model_name_or_path no/such-model cannot be loaded",
        ),
    ],
)
def test_a_model_that_the_target_does_not_use_is_looked_for_all_the_same(make_trainer, keys, words):
    with pytest.raises(ConfigError, match=words):
        make_trainer("sft", **keys)


def test_a_damaged_cache_that_the_target_does_not_use_is_refused(make_trainer, write, tmp_path):
    path = write(top_k=0)
    make_trainer("sft", reference_cache=path)
    (tmp_path / "cache-0" / "manifest.json").write_text("{")
    with pytest.raises(CacheMismatchError, match="manifest"):
        make_trainer("sft", reference_cache=path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; expected a folder"):
        make_trainer("sft", reference_cache=str(tmp_path / "file"))
