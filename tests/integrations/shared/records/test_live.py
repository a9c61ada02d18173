"""What trackers and records get while training: equal to the log, and to a direct forward of the model."""

from __future__ import annotations

import io
import json
import math
import sys
import types

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from qtarget.core.errors import ConfigError, NonFiniteLossError
from qtarget.integrations.shared.records.samples import describe_rows
from qtarget.report.runs.records import LOG_FILE, RUN_FILE, SAMPLES_FILE, read_lines
from tests.integrations.conftest import make_model, make_rows, make_tokenizer

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "max_steps": 4}
STATISTICS = (
    "nll",
    "label_weight",
    "effective_sample_size",
    "residual_share",
    "entropy",
    "mean_token_accuracy",
    "loss",
)


def accumulated(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def direct(model, row):
    """Tokens, their log-probs (None in the prompt) of one row, from full logits of that row alone."""
    tokenizer = make_tokenizer()
    prompt = tokenizer(row["prompt"])["input_ids"]
    tokens = torch.tensor([prompt + tokenizer(row["completion"] + "^")["input_ids"]])
    with torch.no_grad():
        log_probs = model.eval()(tokens).logits[0, :-1].log_softmax(-1)
    picked = log_probs.gather(-1, tokens[0, 1:, None])[:, 0].tolist()
    return tokens[0].tolist(), [None] * len(prompt) + picked[len(prompt) - 1 :]


def test_tensorboard_holds_the_log_and_the_pictures(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer("dft", evals=make_rows(6, seed=9), report_to=["tensorboard"], **EVALUATING)
    trainer.evaluate()
    trainer.train()
    assert not (tmp_path / "runs").exists()  # where transformers alone would put an evaluation before training
    (folder,) = (tmp_path / "out/runs").iterdir()
    events = accumulated(folder)
    log = trainer.state.log_history
    for prefix, group in (("", "train/"), ("eval_", "eval/")):
        for name in STATISTICS:
            expected = [(line["step"], line[prefix + name]) for line in log if prefix + name in line]
            seen = {e.step: e.value for e in events.Scalars(group + name)}  # step 0 comes twice, with equal values
            assert [step for step, _ in expected] == sorted(seen)
            assert [seen[step] for step, _ in expected] == pytest.approx([v for _, v in expected], rel=1e-6)
    for tag in ("eval/token_log_probs", "eval/token_label_weights"):
        pictures = {e.step: e.encoded_image_string for e in events.Images(tag)}
        assert sorted(pictures) == [0, 2, 4]
        assert len(Image.open(io.BytesIO(pictures[4])).getcolors(10**6)) > 20
        assert pictures[0] != pictures[4]


@pytest.mark.parametrize("kind", ["padded", "packed", "lora"])
def test_samples_are_a_direct_forward(make_trainer, tmp_path, kind):
    settings = {"packing": True} if kind == "packed" else {}
    if kind == "lora":
        settings["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer("dft", evals=make_rows(6, seed=9), heatmap_rows=3, **EVALUATING, **settings)
    trainer.train()
    samples = {line["step"]: line["rows"] for line in read_lines(tmp_path / "out" / SAMPLES_FILE)}
    assert sorted(samples) == [0, 2, 4]
    trained = trainer.model.merge_and_unload() if kind == "lora" else trainer.model
    for step, model in ((0, make_model()), (4, trained)):
        assert len(samples[step]) == 3
        for row in samples[step]:
            tokens, log_probs = direct(model, make_rows(6, seed=9)[row["row"]])
            assert row["input_ids"] == tokens
            assert row["tokens"] == [make_tokenizer().decode([t]) for t in tokens]
            assert [v is None for v in row["log_probs"]] == [v is None for v in log_probs]
            known = [(a, b) for a, b in zip(row["log_probs"], log_probs, strict=True) if b is not None]
            assert [a for a, _ in known] == pytest.approx([b for _, b in known], abs=2e-5)
            weights = [w for w in row["label_weights"] if w is not None]
            assert weights == pytest.approx([math.exp(b) for _, b in known], rel=1e-4)


def test_several_evaluation_sets_keep_their_names(make_trainer, tmp_path):
    evals = {"near": make_rows(5, seed=1), "far": make_rows(5, seed=2)}
    trainer = make_trainer("sft", evals=evals, report_to=["tensorboard"], **EVALUATING)
    trainer.train()
    for name, seed in (("near", 1), ("far", 2)):
        values = [v for row in make_rows(5, seed=seed) for v in direct(trainer.model, row)[1] if v is not None]
        last = [line[f"eval_{name}_nll"] for line in trainer.state.log_history if f"eval_{name}_nll" in line][-1]
        assert last == pytest.approx(-sum(values) / len(values), rel=1e-5)
    names = [line["name"] for line in read_lines(tmp_path / "out" / SAMPLES_FILE)]
    assert names == ["eval_near", "eval_far"] * 3
    tags = accumulated(next((tmp_path / "out/runs").iterdir())).Tags()["images"]
    assert {tag.split("/")[1] for tag in tags} == {"near", "far"}


def test_a_killed_and_resumed_run_goes_on_in_the_same_files(make_trainer, tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    settings = {
        "eval_strategy": "steps", "max_steps": 6, "eval_steps": 1, "save_strategy": "steps", "save_steps": 3,
        "report_to": ["tensorboard"], "evals": make_rows(4, seed=9),
    }  # fmt: skip
    first = make_trainer("sft", **settings)
    first.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    out = tmp_path / "out"
    assert max(line["step"] for line in read_lines(out / LOG_FILE)) == 5
    with (out / LOG_FILE).open("a") as file:
        file.write('{"loss": 1.')  # as a kill leaves it
    killed = (out / LOG_FILE).read_bytes()
    second = make_trainer("sft", **settings)
    second.train(resume_from_checkpoint=True)
    log = read_lines(out / LOG_FILE)
    assert [line["step"] for line in log if "eval_nll" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert log == second.state.log_history
    assert [line["step"] for line in read_lines(out / SAMPLES_FILE)] == [1, 2, 3, 4, 5, 6]
    assert (out / "earlier_records/1" / LOG_FILE).read_bytes() == killed  # steps 4 and 5 ran twice
    (folder,) = (out / "runs").iterdir()
    seen = accumulated(folder).Scalars("eval/nll")
    assert [e.step for e in seen] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_in_the_folder_of_another_leaves_its_records(make_trainer, tmp_path):
    runs = []
    for target in ("sft", "dft", "sft"):
        make_trainer(target, evals=make_rows(4, seed=9), **EVALUATING).train()
        runs.append({path.name: path.read_bytes() for path in (tmp_path / "out").glob("qtarget_*")})
    assert json.loads(runs[1][RUN_FILE])["target"] == "dft"
    for number, written in enumerate(runs[:2], start=1):
        kept = tmp_path / "out/earlier_records" / str(number)
        assert {path.name: path.read_bytes() for path in kept.iterdir()} == written
    assert not (tmp_path / "out/earlier_records/3").exists()


def test_a_run_that_goes_on_where_it_stopped_moves_nothing(make_trainer, tmp_path):
    """Its log begins with what stands there, so that nothing is replaced."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer("sft", **settings)
    first.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    make_trainer("sft", **settings).train(resume_from_checkpoint=True)
    assert [line["step"] for line in read_lines(tmp_path / "out" / LOG_FILE) if "loss" in line] == [1, 2, 3, 4]
    assert not (tmp_path / "out/earlier_records").exists()


def test_evaluating_a_finished_run_changes_nothing(make_trainer, tmp_path):
    make_trainer("sft", evals=make_rows(4, seed=9), **EVALUATING).train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("qtarget_*")}
    assert set(before) == {LOG_FILE, RUN_FILE, SAMPLES_FILE}
    make_trainer("dft", evals=make_rows(4, seed=8)).evaluate()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("qtarget_*")}


def test_a_prediction_in_between_leaves_no_stale_rows(make_trainer, tmp_path):
    class Predict(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.predict(trainer.eval_dataset)

    trainer = make_trainer(
        "sft", evals=make_rows(4, seed=9), eval_strategy="steps", eval_steps=2, max_steps=2, prediction_loss_only=True
    )
    trainer.add_callback(Predict())
    trainer.train()
    (line,) = read_lines(tmp_path / "out" / SAMPLES_FILE)
    expected = direct(trainer.model, make_rows(4, seed=9)[0])[1]
    assert line["rows"][0]["log_probs"][-1] == pytest.approx(expected[-1], abs=2e-5)


def test_without_evaluation_rows_or_with_no_pictures_wanted(make_trainer, tmp_path):
    make_trainer("sft", report_to=["tensorboard"]).train()
    assert read_lines(tmp_path / "out" / SAMPLES_FILE) == []
    assert len(read_lines(tmp_path / "out" / LOG_FILE)) == 4  # three steps and the line at the end
    make_trainer("sft", evals=make_rows(4), heatmap_rows=0, **EVALUATING).train()
    assert read_lines(tmp_path / "out" / SAMPLES_FILE) == []
    with pytest.raises(ConfigError, match="heatmap_rows is -1, expected at least 0"):
        make_trainer("sft", heatmap_rows=-1)


def test_a_run_that_became_nan_says_so_in_its_log(make_trainer, rows, tmp_path):
    weighted = rows.add_column("weight", [1e38 if i == 5 else 1.0 for i in range(len(rows))])
    with pytest.raises(NonFiniteLossError):
        make_trainer("sft", data=weighted, max_steps=20).train()
    assert "rows [6]" in read_lines(tmp_path / "out" / LOG_FILE)[-1]["stopped"]


def test_wandb_gets_images_through_its_documented_calls(make_trainer, tmp_path, monkeypatch):
    """Weights & Biases itself is not installed here: a recorder with its interface stands in."""
    calls = []

    class Picture:
        def __init__(self, data, caption=None):
            self.data, self.caption = data, caption

    fake = types.SimpleNamespace(Image=Picture, log=lambda values: calls.append(values))
    monkeypatch.setitem(sys.modules, "wandb", fake)

    class WandbCallback(integration_utils.WandbCallback):
        def __init__(self):
            self._wandb, self._initialized = fake, True
            self._log_model = integration_utils.WandbLogModel.FALSE

    trainer = make_trainer("dft", evals=make_rows(6, seed=9), **EVALUATING)
    trainer.add_callback(WandbCallback())
    monkeypatch.setattr(fake, "run", types.SimpleNamespace(summary={}), raising=False)
    trainer.train()
    pictures = [values for values in calls if "eval/token_log_probs" in values]
    assert [values["train/global_step"] for values in pictures] == [0, 2, 4]
    assert all(values["eval/token_label_weights"].data.shape[2] == 3 for values in pictures)
    assert pictures[0]["eval/token_log_probs"].caption == "eval, step 0"
    logged = [values["eval/nll"] for values in calls if "eval/nll" in values]
    assert logged == [line["eval_nll"] for line in trainer.state.log_history if "eval_nll" in line]


def test_other_trackers_get_files(make_trainer, tmp_path):
    class MLflowCallback(TrainerCallback):
        pass

    trainer = make_trainer("dft", evals=make_rows(6, seed=9), **EVALUATING)
    trainer.add_callback(MLflowCallback())
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "out/token_pictures").iterdir())
    kinds = ("eval-token_label_weights", "eval-token_log_probs")
    assert names == [f"{kind}-{step:06d}.png" for kind in kinds for step in (0, 2, 4)]
    assert Image.open(tmp_path / "out/token_pictures" / names[0]).width == 1100


def test_the_fingerprint_follows_tokens_masks_and_borders():
    def described(rows):
        return describe_rows(Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows]))

    base = [([1, 2, 3], [-100, 2, 3]), ([4], [4])]
    found = described(base)
    assert (found["rows"], found["tokens"], found["supervised_tokens"]) == (2, 4, 3)
    others = [
        [([1, 2, 9], [-100, 2, 9]), ([4], [4])],
        [([1, 2, 3], [-100, -100, 3]), ([4], [4])],
        [([1, 2], [-100, 2]), ([3, 4], [3, 4])],
        base[::-1],
    ]
    prints = {described(rows)["fingerprint"] for rows in others}
    assert len(prints) == 4 and found["fingerprint"] not in prints
    assert described([*base])["fingerprint"] == found["fingerprint"]


def test_a_card_counts_no_token_of_weight_0_as_trained():
    rows = Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]], "loss_weights": [[0, 1, 0], [2]]}
    )
    plain, masked = describe_rows(rows), describe_rows(rows, zero_masks=True)
    assert (plain["supervised_tokens"], masked["supervised_tokens"]) == (3, 2)
    assert plain["fingerprint"] == masked["fingerprint"]


def test_the_description_names_data_target_and_settings(make_trainer, tmp_path):
    make_trainer("label_smoothing", evals=make_rows(4, seed=9), target_kwargs={"smoothing": 0.2}).train()
    found = json.loads((tmp_path / "out" / RUN_FILE).read_text())
    assert (found["target"], found["target_kwargs"], found["max_steps"]) == ("label_smoothing", {"smoothing": 0.2}, 3)
    assert set(found["data"]) == {"train", "eval"}
    assert (found["data"]["eval"]["rows"], found["settings"]["learning_rate"]) == (4, 1e-3)
    assert not any(key.endswith("hub_token") for key in found["settings"])
