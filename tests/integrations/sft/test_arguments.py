"""What the trainer is asked for: TRL's configurations, and refusals before a row is tokenised."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qtarget import QTargetConfig, QTargetTrainer, get_target
from qtarget.core.errors import CacheMismatchError, ConfigError, DataError, QTargetError, UnsupportedModelError
from qtarget.integrations.sft.data.columns import ROW_IDS
from qtarget.integrations.sft.preparation import Preparation
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer


class RowsWerePrepared(BaseException):
    """No error of a row's, which preparation would look for."""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A function that builds a trainer in which tokenising is an error."""

    def tokenising(*args, **kwargs):
        raise RowsWerePrepared

    def make(*, args=None, **given):
        monkeypatch.setattr(SFTTrainer, "_prepare_dataset", tokenising)
        settings = {"train_dataset": make_rows(), "processing_class": make_tokenizer(), "model": make_model()}
        return QTargetTrainer(args=args or SFTConfig(str(tmp_path), **SETTINGS), **{**settings, **given})

    return make


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"text": ["ab"]}, "these rows are text; leave it out, and give messages"),
        (
            {"input_ids": [[2, 3]]},
            "these rows are token ids; leave it out, and mask them with labels or assistant_masks",
        ),
    ],
)
def test_assistant_only_loss_needs_messages(build, tmp_path, rows, words):
    args = QTargetConfig(str(tmp_path), **{**SETTINGS, "assistant_only_loss": True})
    with pytest.raises(ConfigError, match=words):
        build(args=args, train_dataset=Dataset.from_dict(rows))


def pictures(values):
    return Dataset.from_dict({"text": ["ab"] * len(values), "images": values})


class Pictures(ProcessorMixin):
    def __init__(self):
        pass


class Odd(torch.nn.Module):
    """A head that is no linear layer."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.bias = head.weight, None

    def forward(self, hidden):
        return (hidden @ self.weight.T).square()


def odd_model():
    model = make_model()
    model.set_output_embeddings(Odd(model.lm_head))
    return model


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"train_dataset": None}, DataError, "`train_dataset` is required"),
        ({"train_dataset": [{"text": "a"}]}, DataError, "is a list; expected a datasets.Dataset"),
        ({"train_dataset": make_rows().select([])}, DataError, "no rows"),
        ({"eval_dataset": {"a": make_rows(), "b": make_rows().select([])}}, DataError, "the b data has no rows"),
        ({"train_dataset": pictures([[], ["x.png"]])}, DataError, "train data, row 2: column 'images' holds an image"),
        ({"eval_dataset": pictures([["x.png"]])}, DataError, "eval data, row 1"),
        ({"train_dataset": pictures([["x.png"]]).to_iterable_dataset()}, DataError, "holds an image"),
        ({"train_dataset": IterableDataset.from_generator(lambda: iter(()))}, DataError, "no rows"),
        ({"processing_class": Pictures()}, UnsupportedModelError, "reads images"),
        ({"data_collator": make_rows()}, ConfigError, "third argument is data_collator"),
        ({"data_collator": lambda rows: rows}, ConfigError, "data_collator would bypass the target"),
        ({"compute_loss_func": lambda *a, **k: 0}, ConfigError, "compute_loss_func would bypass the target"),
        ({"model": odd_model()}, UnsupportedModelError, "not a plain linear layer"),
    ],
)
def test_refused_before_a_row_is_prepared(build, given, error, words):
    with pytest.raises(error, match=words):
        build(**given)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"packing": True, "max_length": None}, "set max_length"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "leaves rows unnumbered"),
        ({"target": "dtf"}, "did you mean dft"),
        ({"target": "asft"}, "needs a frozen reference"),
    ],
)
def test_settings_are_refused_before_a_row_is_prepared(build, tmp_path, settings, words):
    with pytest.raises(QTargetError, match=words):
        build(args=QTargetConfig(str(tmp_path), **{**SETTINGS, **settings}))


def test_a_cache_of_another_model_is_refused_before_a_row_is_prepared(build, cached, tmp_path):
    args = QTargetConfig(str(tmp_path), target="asft", reference_cache=cached(), **SETTINGS)
    with pytest.raises(RowsWerePrepared):
        build(args=args)
    with pytest.raises(CacheMismatchError):
        build(args=args, model=make_model(seed=1))
    stream = make_rows().to_iterable_dataset()
    with pytest.raises(ConfigError, match="a cache is looked up by whole data sets"):
        build(args=args, train_dataset=stream)
    with pytest.raises(ConfigError, match="set max_steps"):
        build(args=SFTConfig(str(tmp_path), **{**SETTINGS, "max_steps": -1}), train_dataset=stream)


def test_empty_image_columns_change_nothing(make_trainer):
    trainers = [
        make_trainer("sft", data=rows) for rows in (pictures([[], None, []]), Dataset.from_dict({"text": ["ab"] * 3}))
    ]
    ids, expected = (trainer.train_dataset["input_ids"][:] for trainer in trainers)
    assert ids == expected


def test_trls_configuration_is_taken_whole(tmp_path):
    given = SFTConfig(
        str(tmp_path), **SETTINGS, packing=True, hub_token="secret", eval_steps=5, lr_scheduler_kwargs={"a": 1}
    )
    own = QTargetConfig.from_trl(given)
    assert own.target == "sft"
    assert {name: getattr(own, name) for name in vars(given)} == vars(given)
    assert own.hub_token == "secret"
    plain = QTargetConfig.from_trl(TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.25))
    as_trl = SFTConfig(**TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.25).to_dict())
    assert (plain.learning_rate, plain.bf16, plain.max_length) == (0.25, as_trl.bf16, as_trl.max_length)
    assert plain.gradient_checkpointing == as_trl.gradient_checkpointing
    assert plain.pad_to_multiple_of is as_trl.pad_to_multiple_of is None
    assert QTargetConfig.from_trl(SFTConfig(str(tmp_path), **SETTINGS, loss_type="dft")).build_target().name == "dft"
    with pytest.raises(ConfigError, match="label_smoothing"):
        QTargetConfig.from_trl(SFTConfig(str(tmp_path), **SETTINGS, label_smoothing_factor=0.1))


def test_without_arguments_trls_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda *a: True)
    make_model().save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    trainer = QTargetTrainer("small", train_dataset=make_rows())
    assert (trainer.args.output_dir, trainer.args.target, trainer.args.max_length) == ("small-SFT", "sft", 1024)
    with pytest.raises(ConfigError, match="args is a dict"):
        QTargetTrainer("small", {}, train_dataset=make_rows())


def test_a_stream_carries_row_numbers_and_weights(make_trainer):
    rows = make_rows().add_column("weight", [float(i % 3) for i in range(24)])
    whole, stream = (make_trainer("sft", data=data) for data in (rows, rows.to_iterable_dataset()))
    expected = {tuple(row["input_ids"]): (row[ROW_IDS], row["loss_weights"]) for row in whole.train_dataset}
    found = {tuple(row["input_ids"]): (row[ROW_IDS], row["loss_weights"]) for row in stream.train_dataset}
    assert len(found) == 24  # rows of weight 0 stay in a stream, where the collator masks them
    assert {ids: row for ids, row in found.items() if any(row[1])} == expected
    cut = make_trainer("sft", data=rows.to_iterable_dataset(), max_length=8)
    assert all(len(row[ROW_IDS]) == len(row["loss_weights"]) == len(row["input_ids"]) <= 8 for row in cut.train_dataset)


def test_workers_of_a_stream_do_not_share_numbers(make_trainer):
    stream = make_rows().to_iterable_dataset(num_shards=2)
    trainer = make_trainer("sft", data=stream, dataloader_num_workers=2, max_steps=6)
    ids = [i for batch in trainer.get_train_dataloader() for i in batch["row_ids"].unique().tolist() if i >= 0]
    assert len(ids) == len(set(ids)) == 24


def test_predict_leaves_nothing_to_the_next_evaluation(make_trainer):
    trainer = make_trainer("dft", evals=make_rows(6, seed=9))
    names = ("eval_nll", "eval_entropy", "eval_label_weight", "eval_mean_token_accuracy")
    before = trainer.evaluate()
    trainer.predict(trainer.train_dataset)
    after = trainer.evaluate()
    assert [after[name] for name in names] == [before[name] for name in names]
    assert all(row["row"] < 6 for row in trainer._samples.flush())


def test_metrics_of_logits_beside_any_target(make_trainer):
    """The reported loss is the target's, the logits are the model's."""

    def metrics(prediction):
        log_probs = torch.tensor(prediction.predictions[:, :-1]).log_softmax(-1)
        labels = torch.tensor(prediction.label_ids[:, 1:])
        picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
        return {"own_nll": float(-picked.mean()), "own_dft": float(-(picked * picked.exp()).mean())}

    trainer = make_trainer("dft", evals=make_rows(4, seed=9), models={"compute_metrics": metrics})
    found = trainer.evaluate()
    assert found["eval_own_nll"] == pytest.approx(found["eval_nll"], rel=1e-5)
    assert found["eval_own_dft"] == pytest.approx(found["eval_loss"], rel=1e-5)


def test_evaluation_rows_that_are_trained_too_are_named(make_trainer, rows):
    trainer = make_trainer(evals={"a": rows.select([0]), "b": rows.select([1, 2])})
    said = trainer.preparation.audits
    assert said["a"] == [line for line in said["a"] if line.startswith("1 of 1 validation rows is a training row too")]
    assert any(line.startswith("2 of 2 validation rows are training rows too") for line in said["b"])
    other = make_trainer(data=rows.select([0, 1]), evals=rows.select([2]))
    assert not any("training row" in line for line in other.preparation.audits["eval"])


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rows_are_compared_by_their_values_whatever_their_format(kind):
    long = [
        list(range(2000)),
        [*range(1000), 7, *range(1001, 2000)],
    ]  # printed, both are the same first and last numbers
    train, other = (Dataset.from_dict({"input_ids": [ids]}).with_format(kind) for ids in long)
    told = Preparation(get_target("sft"), {})
    told.compare(train, {"same": train, "other": other}, "text")
    assert len(told.audits["same"]) == 1 and told.audits["other"] == []


def test_conversations_that_are_trained_whole_are_told(make_trainer):
    said = [{"role": role, "content": text} for role, text in (("user", "Two?"), ("assistant", "Two."))]
    whole = make_trainer(data=Dataset.from_list([{"messages": said}] * 4))
    assert any(line.startswith("conversations are trained whole") for line in whole.preparation.audits["train"])
    said[0]["weight"] = 0
    assert "conversations are trained whole" not in str(
        make_trainer(data=Dataset.from_list([{"messages": said}] * 4)).preparation.audits
    )
