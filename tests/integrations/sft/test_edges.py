"""What a careless change of the training rows would let through: the first token of a row, the wrong end, a bad weight."""

import json
import re

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qtarget import QTargetConfig
from qtarget.core.errors import CacheMismatchError, ConfigError, DataError, NonFiniteLossError, QTargetError
from qtarget.integrations.sft.data.columns import ROW_IDS
from qtarget.integrations.sft.data.weights import ROW, row_weights
from qtarget.integrations.sft.score import score
from qtarget.scoring.cache.reader import ReferenceCache
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer

TEXTS = ["abcdefg", "hijk", "lmnopqrstu", "vw"]


def plain_loss(texts, weights=None):
    """Mean NLL over all tokens but the first of each text, every text alone."""
    model, tokenizer, total, count = make_model(), make_tokenizer(), 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        total += float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count, count


def loss_of(trainer):
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 1
    return float(trainer.compute_loss(trainer.model, batches[0])), batches[0]


@pytest.mark.parametrize(
    "layout", [{}, {"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}],
    ids=["padded", "packed", "flat"],
)  # fmt: skip
@pytest.mark.parametrize("weighted", [False, True])
def test_the_first_token_of_a_row_is_predicted_by_nothing(make_trainer, layout, weighted):
    """Every token is trained on, so in a shared row the last token of one document precedes the first of the next."""
    data = Dataset.from_list([{"text": text} for text in TEXTS])
    if weighted:
        data = data.add_column("weight", [1.0] * 4)
    loss, batch = loss_of(make_trainer("sft", data=data, **layout))
    expected, count = plain_loss(TEXTS)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert int((batch["labels"][:, 1:] != -100).sum()) == count


def test_a_row_whose_only_weight_is_on_its_first_token_is_left_out(make_trainer):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "loss_weights": w} for w in ([1.0, 0, 0], [0, 1.0, 0], [1.0] * 3)
    ]
    trainer = make_trainer("sft", data=Dataset.from_list(rows))
    assert trainer.train_dataset["qtarget_row"] == [1, 2]


@pytest.mark.parametrize("packing", [False, True])
def test_cached_numbers_of_rows_that_start_supervised(make_trainer, cached, packing):
    """asft at its own base: the anchor is 0 only if every number stands at its own token."""
    data = Dataset.from_list([{"text": text} for text in TEXTS])
    folder = cached(data=data)
    trainer = make_trainer(
        "sft_kl", data=data, reference_cache=folder, packing=packing, target_kwargs={"kl_weight": 10.0}
    )
    assert loss_of(trainer)[0] == pytest.approx(plain_loss(TEXTS)[0], rel=1e-4)


@pytest.mark.parametrize(("mode", "kept"), [("keep_start", slice(None, 4)), ("keep_end", slice(-4, None))])
def test_given_weights_are_cut_where_their_tokens_are(make_trainer, mode, kept):
    weights = [[float(10 * row + t + 1) for t in range(6)] for row in range(2)]
    ids = [[3, 4, 5, 6, 7, 8 + row] for row in range(2)]
    rows = [{"input_ids": i, "labels": i, "loss_weights": w} for i, w in zip(ids, weights, strict=True)]
    trainer = make_trainer("sft", data=Dataset.from_list(rows), max_length=4, truncation_mode=mode)
    for row, given in zip(trainer.train_dataset, weights, strict=True):
        assert row["loss_weights"] == given[kept]
        assert row[ROW_IDS] == [row[ROW]] * 4


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_row_weights_that_are_no_weights(make_trainer, rows, bad):
    fine = [0.0, 0.5, *[1.0] * 22]
    assert len(make_trainer("sft", data=rows.add_column("weight", fine)).train_dataset) == 23
    with pytest.raises(DataError, match="row 8: weight"):
        make_trainer("sft", data=rows.add_column("weight", [*fine[:7], bad, *fine[8:]]))


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_token_and_message_weights_that_are_no_weights(make_trainer, bad):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "loss_weights": [1.0, 1.0, w]} for w in (0.0, bad)]
    with pytest.raises(DataError, match=r"row 2: .*loss_weights"):
        make_trainer("sft", data=Dataset.from_list(rows))
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc", "weight": w}]}
        for w in (0.5, bad)
    ]
    with pytest.raises(DataError, match=r"row 2: .*weight of message 1" if bad < 0 else "column .messages. holds"):
        make_trainer("sft", data=Dataset.from_list(chats))


def test_rows_that_were_never_scored_go_by_their_numbers_in_the_data(make_trainer, cached):
    """Rows of weight 0 are left out before, and must not move the numbers."""
    data = make_rows(8)
    folder = cached(data=data.select(range(6)))
    weighted = data.add_column("weight", [0.0] * 4 + [1.0] * 4)
    with pytest.raises(CacheMismatchError, match=re.escape("rows 7, 8;")):
        make_trainer("asft", data=weighted, reference_cache=folder)


def model_with_bias():
    model = make_model()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(80), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("target", "text", "words"),
    [
        ("sft", "abcd", r"the loss is inf at step 0, in rows \[1\] of the data; 1 of their labels have probability 0"),
        ("label_smoothing", "abce", "the target pulls towards a token whose logit is minus infinity"),
    ],
)
def test_an_infinite_loss_says_why(make_trainer, target, text, words):
    """Token 6 is "d": a label in one case, and nobody's label in the other."""
    assert make_tokenizer()("d")["input_ids"] == [6]
    model = model_with_bias()
    trainer = make_trainer(target, model=model, data=Dataset.from_list([{"text": text}]))
    model.lm_head.bias[6] = -torch.inf  # a head that begins so is refused by name
    with pytest.raises(NonFiniteLossError, match=words):
        trainer.train()
    trainer = make_trainer("dft", model=model_with_bias(), data=Dataset.from_list([{"text": text}]), max_steps=1)
    trainer.model.lm_head.bias[6] = -torch.inf
    trainer.train()
    assert all(bool(p.isfinite().all()) for n, p in trainer.model.named_parameters() if n != "lm_head.bias")


def test_the_weights_of_one_row_are_those_of_all_rows(make_trainer):
    """``row_weights``, which pages show, against what training uses: row, message, span and token weights multiply."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bcd", "weight": 0.5, "weight_spans": [[1, 2, 3.0]]},
    ]
    row = {"messages": messages, "weight": 2.0}
    trainer = make_trainer("sft", data=Dataset.from_list([row]))
    trained = trainer.train_dataset[0]
    found = row_weights({**row, ROW: 0, "input_ids": trained["input_ids"]}, trainer.processing_class, None)
    assert found.tolist() == trained["loss_weights"] == [2.0, 2.0, 2.0, 1.0, 3.0, 1.0, 1.0]
    given = {ROW: 0, "input_ids": [5, 6], "weight": None, "loss_weights": [1.0, 0.25]}
    assert row_weights(given, trainer.processing_class, None).tolist() == [1.0, 0.25]
    assert row_weights({**given, "weight": 4}, trainer.processing_class, None).tolist() == [4.0, 1.0]


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_batch_holds_what_its_target_reads(make_trainer, cached, top_k):
    """Of a cache with top-k numbers a target of label log-probs takes those alone; one without serves it too."""
    folder = cached(top_k=top_k)
    trainer = make_trainer("prior_surprise", reference_cache=folder)
    batch = next(iter(trainer.get_train_dataloader()))
    assert {name for name in batch if name.startswith("reference_")} == {
        "reference_label_log_probs",
        "reference_entropy",
    }
    mask = batch["labels"] != -100
    assert (
        bool((batch["reference_label_log_probs"][mask] < 0).all())
        and not batch["reference_label_log_probs"][~mask].any()
    )
    if top_k:
        batch = next(iter(make_trainer("asft", reference_cache=folder).get_train_dataloader()))
        assert batch["reference_topk_ids"].shape == (*mask.shape, 5)


def test_a_label_scale_without_a_label_term_matters_only_to_weights(make_trainer, rows):
    settings = {"weights_scale": "label", "models": {"teacher_model": make_model(1)}}
    assert len(make_trainer("forward_kl", **settings).train_dataset) == 24
    for given in ({"prompt_weight": 0.5}, {"data": rows.add_column("weight", [1.0] * 24)}):
        with pytest.raises(ConfigError, match="multiplies the pull towards the observed token"):
            make_trainer("forward_kl", **settings, **given)


def test_scoring_keeps_label_log_probs_alone_unless_asked(tmp_path):
    score(
        make_model(),
        QTargetConfig(str(tmp_path / "scoring"), **SETTINGS),
        make_rows(3),
        processing_class=make_tokenizer(),
        directory=tmp_path / "cache",
        progress=False,
    )
    manifest = ReferenceCache.open(tmp_path / "cache").manifest
    assert (manifest.top_k, manifest.sampled, manifest.seed, manifest.tail_policy) == (0, 0, 0, "bucket")
    assert (manifest.log_probs_dtype, manifest.columns) == ("float16", ("label_log_probs", "entropy"))


def test_scoring_with_another_tokenizer_than_the_models(tmp_path):
    """Of as many ids, so that nothing but the comparison notices."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    args = QTargetConfig(str(tmp_path / "scoring"), **SETTINGS)
    with pytest.raises(QTargetError, match="tokenizer"):
        score(
            str(tmp_path / "model"), args, make_rows(3), None, swapped(make_tokenizer()), directory=tmp_path / "cache"
        )


def swapped(tokenizer):
    """The same tokenizer with two letters' ids exchanged."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    backend = Tokenizer.from_str(json.dumps(state))
    special = {"pad_token": "~", "eos_token": "^", "unk_token": "?"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special)
