"""Weights in training: weight 0 is a mask under every target, spans find their tokens, and what is odd is named by row."""

import json
import logging

import pytest
import torch
from datasets import Dataset

import qtarget
from qtarget import QTargetConfig, QTargetTrainer
from qtarget.core.errors import ConfigError, DataError
from tests import SHARED
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer

needs_shared = pytest.mark.skipif(not (SHARED / "hard_rows").is_dir(), reason=f"no {SHARED}/hard_rows")
ROWS = 16


def tokenised(masked=False):
    """Rows of tokens; every third of the trained ones, and one whole row, weighs 0, or is masked."""
    tokenizer, out = make_tokenizer(), []
    for number, row in enumerate(make_rows(ROWS)):
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        ids, labels = prompt + answer, [-100] * len(prompt) + answer
        weights = [float((t + number) % 3 != 0 and number != 5) for t in range(len(ids))]
        if masked:
            labels = [label if weight else -100 for label, weight in zip(labels, weights, strict=True)]
        out.append({"input_ids": ids, "labels": labels} | ({} if masked else {"loss_weights": weights}))
    return Dataset.from_list([row for row in out if any(label != -100 for label in row["labels"])])


def trained(tmp_path, target, data, **settings):
    models = settings.pop("models", {})
    args = QTargetConfig(str(tmp_path / "out"), target=target, **{**SETTINGS, "max_steps": 2, **settings})
    args.optim, args.learning_rate = "sgd", 0.5
    args.train_sampling_strategy = "sequential"
    trainer = QTargetTrainer(make_model(), args, None, data, data, make_tokenizer(), **models)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return (
        {k: v.detach().clone() for k, v in trainer.model.state_dict().items()},
        losses,
        trainer.evaluate()["eval_loss"],
    )


def equal(one, two):
    assert one[1] == pytest.approx(two[1], rel=1e-5)
    assert one[2] == pytest.approx(two[2], rel=1e-5)
    start = make_model().state_dict()
    assert max(float((one[0][n] - start[n]).abs().max()) for n in start) > 1e-3
    for name in start:
        torch.testing.assert_close(one[0][name], two[0][name], rtol=1e-4, atol=2e-6)


def models_for(name):
    needs = qtarget.get_target(name).needs
    other = {role: make_model(1) for role in ("reference", "teacher") if getattr(needs, role)}
    return {f"{role}_model": model for role, model in other.items()}


LIVE = [name for name in qtarget.available_targets() if "consensus" not in name]
KINDS = ("asft", "dft", "distillation", "iw_sft", "prior_surprise", "sft", "talr")
"""One of each kind for every commit: no weight, a live one, a reference's, a teacher, and a batch's sums."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in KINDS else pytest.mark.nightly) for n in LIVE])
def test_weight_zero_is_a_mask(tmp_path, name):
    """Two optimizer steps of two ragged micro-batches each."""
    settings = {"gradient_accumulation_steps": 2, "models": models_for(name)}
    equal(trained(tmp_path, name, tokenised(), **settings), trained(tmp_path, name, tokenised(True), **settings))


@pytest.mark.parametrize(
    "layout", [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}], ids=["packed", "flat"]
)
@pytest.mark.parametrize("name", ["label_smoothing", "iw_sft", "dft+label_smoothing"])
def test_packed_and_padding_free(tmp_path, name, layout):
    """Packing places the two alike, since the row that is left out is left out before."""
    settings = {**layout, "models": models_for(name)}
    equal(*(trained(tmp_path, name, tokenised(masked), **settings) for masked in (False, True)))


@pytest.mark.parametrize("target", ["asft", "consensus", "talr+sft_kl"])
@pytest.mark.parametrize("guard", [False, True])
def test_caches_hold_masked_tokens_too(tmp_path, target, guard):
    """The cache of the unweighted rows serves the weighted ones; the masked rows are other rows and have their own."""
    if guard and target == "talr+sft_kl":
        pytest.skip("the guard takes targets of token scope")
    from qtarget.integrations.sft.score import score

    runs = []
    for masked in (False, True):
        data, folder = tokenised(masked), tmp_path / f"cache-{masked}"
        args = QTargetConfig(str(tmp_path / "score"), **SETTINGS)
        scored = data if masked else data.remove_columns("loss_weights")
        score(
            make_model(),
            args,
            scored,
            None,
            make_tokenizer(),
            directory=folder,
            top_k=80,
            log_probs_dtype="float32",
            progress=False,
        )
        role = "teacher" if qtarget.get_target(target).needs.teacher else "reference"
        chosen = {f"{role}_cache": str(folder), "guard": guard, "gradient_accumulation_steps": 2}
        runs.append(trained(tmp_path, target, data, **chosen))
    equal(*runs)


def test_scoring_weighted_rows_scores_all_of_them(cached, make_trainer):
    """So that the cache serves whatever the weights become."""
    weighted = make_rows().add_column("weight", [float(i % 2) for i in range(24)])
    folder = cached(data=weighted)
    assert len(make_trainer("asft", data=weighted, reference_cache=folder).train_dataset) == 12
    assert len(make_trainer("asft", reference_cache=folder).train_dataset) == 24


def test_label_scale_by_name(make_trainer, rows):
    """The residual of a token of weight 0 stays, and a target without label term refuses the weights."""
    weighted = rows.add_column("weight", [0.0] * 24)
    trainer = make_trainer("label_smoothing", data=weighted, weights_scale="label")
    batch = next(iter(trainer.get_train_dataloader()))
    assert float(trainer.compute_loss(trainer.model, batch)) > 0
    with pytest.raises(ConfigError, match="weights_scale: all"):
        make_trainer("forward_kl", data=weighted, weights_scale="label", models={"teacher_model": make_model(1)})
    some = rows.add_column("weight", [0.5] * 24)
    trainer = make_trainer("forward_kl", data=some, models={"teacher_model": make_model(1)})
    plain = make_trainer("forward_kl", data=rows, models={"teacher_model": make_model(1)})
    losses = [float(t.compute_loss(t.model, next(iter(t.get_train_dataloader())))) for t in (trainer, plain)]
    assert losses[0] == pytest.approx(losses[1] / 2, rel=1e-5)


# -- what the data says ------------------------------------------------------------------------------------------


def by_character(trainer, row=0):
    """The trained tokens of a row and their weights; every token is a character."""
    found = trainer.train_dataset[row]
    text = "".join(trainer.processing_class.convert_ids_to_tokens(found["input_ids"]))
    return text, [w if label != -100 else None for w, label in zip(found["loss_weights"], found["labels"], strict=True)]


def test_announced(make_trainer, rows, caplog):
    logging.getLogger("qtarget").propagate = True
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer("sft", data=rows.add_column("weight", [0, 0, 2, None] * 6))
    assert "train data: weight: 24 rows, mean 0.75, smallest 0, largest 2" in caplog.text
    assert "train data: 12 rows of weight 0 are left out (rows 1, 2, 5, 6, 9, ...)" in caplog.text
    assert sorted(trainer.train_dataset["qtarget_row"]) == [i for i in range(24) if i % 4 > 1]


def test_all_zero(make_trainer, rows):
    with pytest.raises(DataError, match="every trained token of the train data has weight 0"):
        make_trainer("sft", data=rows.add_column("weight", [0] * 24))


@pytest.mark.parametrize(
    ("value", "words"), [("half", "row 4: weight is 'half'"), ("-1", "unlikelihood"), ("inf", "finite")]
)
def test_numbers_of_a_csv(make_trainer, rows, value, words):
    good = ["0.5", "", "1", "0", *["2"] * 20]
    trainer = make_trainer("sft", data=rows.add_column("weight", good))
    assert [row["loss_weights"][0] for row in trainer.train_dataset][:4] == [0.5, 1.0, 1.0, 2.0]
    with pytest.raises(DataError, match=words):
        make_trainer("sft", data=rows.add_column("weight", [*good[:3], value, *good[4:]]))


@needs_shared
@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["as-is", "reversed"])
def test_message_weights_in_any_row_order(make_trainer, order):
    lines = (SHARED / "hard_rows" / "msg_weight.jsonl").read_text().splitlines()
    data = Dataset.from_list([json.loads(line) for line in lines][order])
    trainer = make_trainer("sft", data=data)
    found = [by_character(trainer, i) for i in range(2)]
    weighted, plain = sorted(found, key=lambda pair: -len(pair[0]))
    assert weighted[0] == "<Hello>Bad^<Again>Good^" and plain[0] == "<Hello>Hi^"
    assert weighted[1] == [1.0] * 7 + [0.0] * 4 + [1.0] * 12
    assert plain[1] == [1.0] * 10


def test_a_key_that_only_a_later_row_has(make_trainer):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]}] * 3
    last = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc", "weight": 0.5}]}
    trainer = make_trainer("sft", data=Dataset.from_list([*rows, last]))
    assert by_character(trainer, 3) == ("<a>bc^", [1.0] * 3 + [0.5] * 3)
    assert by_character(trainer, 0) == ("<a>bc^", [1.0] * 6)


# -- spans -------------------------------------------------------------------------------------------------------


def test_spans_of_a_completion(make_trainer):
    rows = [
        {"prompt": "2+2=", "completion": "5, no: 4", "weight_spans": [[0, 7, 0], [7, 8, 2.5]]},
        {"prompt": "1+1=", "completion": "2", "weight_spans": None},
    ]
    trainer = make_trainer("sft", data=Dataset.from_list(rows))
    assert by_character(trainer) == ("2+2=5, no: 4^", [None] * 4 + [0.0] * 7 + [2.5, 1.0])
    assert by_character(trainer, 1) == ("1+1=2^", [None] * 4 + [1.0] * 2)


def test_spans_of_messages_and_of_the_last_one(make_trainer):
    messages = [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "abcabc", "weight_spans": [[3, 6, 0]]},
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "abc"},
    ]
    data = Dataset.from_list([{"messages": messages, "weight_spans": [[0, 1, 0.5]]}])
    trainer = make_trainer("sft", data=data, assistant_only_loss=True)
    text, weights = by_character(trainer)
    assert text == "<abc>abcabc^<abc>abc^"
    assert weights == [None] * 5 + [1.0] * 3 + [0.0] * 3 + [1.0] + [None] * 5 + [0.5, 1.0, 1.0, 1.0]


def test_spans_are_cut_with_their_tokens(make_trainer):
    rows = [{"prompt": "abcd", "completion": "efgh", "weight_spans": [[1, 3, 0.25]]}]
    for mode, expected in (
        ("keep_start", ("abcdef", [None] * 4 + [1.0, 0.25])),
        ("keep_end", ("defgh^", [None, 1.0, 0.25, 0.25, 1.0, 1.0])),
    ):
        trainer = make_trainer("sft", data=Dataset.from_list(rows), max_length=6, truncation_mode=mode)
        assert by_character(trainer) == expected


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[0.5, 2, 0]], "whole numbers"),
        ([[2, 1, 0]], "ends before it starts"),
        ([[1, 1, 0]], "empty"),
        ([[0, 9, 0]], "leaves the text"),
        ([[-1, 2, 0]], "leaves the text"),
        ([[0, 2, 0], [1, 3, 1]], "overlap"),
        ([[0, 2, -1]], "unlikelihood"),
        ([[0, 2, float("nan")]], "finite"),
        ([[0, 2]], r"expected \[start, end, weight\]"),
        ("[[0, 2, true]]", "number >= 0"),
        ("[[true, 2, 0]]", "whole numbers"),
        ("0-2", "expected a list"),
    ],
)
def test_bad_spans_are_named_with_their_row(make_trainer, spans, words):
    good = "[[0, 1, 1]]" if isinstance(spans, str) else [[0, 1, 1]]
    rows = [{"prompt": "ab", "completion": "cdefg", "weight_spans": value} for value in (good, spans)]
    with pytest.raises(DataError, match=rf"row 2: .*{words}"):
        make_trainer("sft", data=Dataset.from_list(rows))


def test_spans_without_a_response(make_trainer):
    with pytest.raises(DataError, match=r"row 1: .*no text here"):
        make_trainer("sft", data=Dataset.from_list([{"text": "abc", "weight_spans": [[0, 1, 0]]}]))
    messages = [{"role": "user", "content": "abc"}]
    with pytest.raises(DataError, match=r"row 1: .*last assistant message"):
        make_trainer("sft", data=Dataset.from_list([{"messages": messages, "weight_spans": [[0, 1, 0]]}]))


def test_unplaced_rows_are_refused_or_left_out(make_trainer, caplog):
    """The tokenizer knows no umlaut: what it decodes to is not the text."""
    rows = [{"prompt": "ab", "completion": text, "weight_spans": [[1, 3, 0]]} for text in ("defg", "düfg", "dééfg")]
    with pytest.raises(DataError, match=r"2 of 3 rows have weight_spans that are unplaced \(rows 2, 3\)"):
        make_trainer("sft", data=Dataset.from_list(rows))
    logging.getLogger("qtarget").propagate = True
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer("sft", data=Dataset.from_list(rows), unplaced_spans="leave_out")
    assert "2 of 3 rows have weight_spans that are unplaced (rows 2, 3)" in caplog.text
    assert [row["qtarget_row"] for row in trainer.train_dataset] == [0]


# -- the prompt --------------------------------------------------------------------------------------------------


def test_prompt_weight(make_trainer, cached):
    """The loss is that of the completion plus a tenth of that of the prompt, over all tokens but the first."""
    data = make_rows(4)
    trainer = make_trainer("sft", data=data, prompt_weight=0.1)
    loss = float(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))))
    model, tokenizer, total, count = make_model(), make_tokenizer(), 0.0, 0
    for row in data:
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total += float(0.1 * losses[: len(prompt) - 1].sum() + losses[len(prompt) - 1 :].sum())
        count += len(losses)
    assert loss == pytest.approx(total / count, rel=1e-5)
    folder = cached(data=data, prompt_weight=0.1)
    make_trainer("asft", data=data, prompt_weight=0.3, reference_cache=folder).train()
    with pytest.raises(qtarget.core.errors.CacheMismatchError, match="not in the cache"):
        make_trainer("asft", data=data, reference_cache=folder)


def test_prompt_weight_needs_a_prompt(make_trainer):
    with pytest.raises(ConfigError, match="no token is masked"):
        make_trainer("sft", data=Dataset.from_list([{"text": "abc"}]), prompt_weight=0.1)
    with pytest.raises(ConfigError, match="prompt_weight is -1, expected at least 0"):
        make_trainer("sft", prompt_weight=-1)


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["asft", "talr"])
def test_two_ranks_equal_one_mask(tmp_path, target):
    """Two processes with weights against one process with masks."""
    from tests.integrations.sft.test_processes import COMMON, assert_equal_runs, two_processes, work

    settings = {"target": target, "max_steps": 1}  # 15 rows: a later step would cross the end of the epoch
    one = {**COMMON, **settings, "per_device_train_batch_size": 4}
    work(tmp_path / "one", one, "--rows", "masked")
    assert_equal_runs(tmp_path / "one", two_processes(tmp_path / "two", settings, "--rows", "weighted"))
