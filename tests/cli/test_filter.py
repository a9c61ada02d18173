"""`qtarget filter` and `filter:` end to end, under the embedded base; docs/filter.md runs and says what comes out."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("trl")

from qtarget.cli.filtered import weight_lines
from qtarget.cli.main import run
from qtarget.data.embedded import base_model_path, load_demonstrations
from tests import ROOT

PAGE = (ROOT / "docs" / "filter.md").read_text(encoding="utf-8")


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def measure_filter():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("measure_filter", ROOT / "scripts/measure_filter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def documented(tmp_path_factory) -> Path:
    """A folder in which the page's commands were run."""
    folder = tmp_path_factory.mktemp("filter")
    (block,) = blocks("bash")
    written = blocks("yaml")[0].replace("path/to/base", str(base_model_path()))
    (folder / "run.yaml").write_text(written + "use_cpu: true\nactivation_checkpointing: false\nreport_to: none\n")
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    with contextlib.chdir(folder):
        for command in commands:
            words = [str(ROOT / word) if word.startswith(("src/", "examples/")) else word for word in command]
            extra = ["--max_steps", "3", "--save_strategy", "no"] if words[0] == "train" else []
            assert called(*words, *extra) == 0
    (folder / "noisy.jsonl").rename(folder / "runs/noisy.jsonl")
    return folder / "runs"


def cache_of(folder: Path) -> Path:
    """The one cache of whole rows."""
    [found] = [path for path in folder.glob("reference_cache-*") if not path.name.endswith("-alone")]
    return found


@pytest.fixture
def config(documented, tmp_path):
    """A function that writes a config of the page's noisy rows and their cache."""

    def write(**keys) -> Path:
        settings = {
            "model_name_or_path": str(base_model_path()), "train_file": str(documented / "noisy.jsonl"),
            "reference_cache": str(cache_of(documented)), "output_dir": str(tmp_path / "out"),
            "max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "report_to": "none", "bf16": False,
            "use_cpu": True, "activation_checkpointing": False,
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({name: v for name, v in (settings | keys).items() if v is not None}))
        return path

    return write


class TestPage:
    def test_the_verdict_is_the_pages(self, documented):
        document = json.loads((documented / "filtered/filter.json").read_text())
        verdict, weighed = blocks("text")
        assert document["summary"] == verdict.strip()
        lines = weight_lines(json.loads((documented / "weighed/filter.json").read_text()))
        total, light, step = weighed.splitlines()
        assert total == lines[0]
        assert any(line.startswith(light.removesuffix("...")) for line in lines[1:])
        assert step.removeprefix("next: `").removesuffix("`") in blocks("bash")[0]

    def test_the_example_prints_what_it_says(self):
        (code,) = blocks("python")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert f"# {printed.getvalue()}" in code

    def test_every_form_of_the_key_is_one(self):
        from qtarget.filtering import Filter

        block = blocks("yaml")[1]
        for line in block.splitlines():
            ((key, value),) = yaml.safe_load(line.removeprefix("# ")).items()
            assert key == "filter"
            assert Filter.of(value)


class TestMeasurements:
    RESULTS = json.loads((ROOT / "benchmarks/results/filter.json").read_text())

    def test_the_table_is_the_result_file(self):
        lines = measure_filter().table(self.RESULTS["points"])
        assert len(lines) > 30
        assert [line for line in PAGE.splitlines() if line.startswith("| ") and "%:" in line] == lines

    def test_the_table_of_weighed_rows_is_the_result_file(self):
        cells = json.loads((ROOT / "benchmarks/results/noise_weighed.json").read_text())["cells"]
        assert [(cell["base"], cell["kind"], cell["rate"]) for cell in cells] == [
            ("none", "wrong_answer", 0.4), ("most", "wrong_answer", 0.4), ("none", "wrong_answer", 0)
        ]  # fmt: skip
        for name in cells[0]["runs"]:
            runs = [[run["accuracy_percent"] for run in cell["runs"][name]] for cell in cells]
            said = " | ".join(f"{sum(pair) / 2:.1f} ({pair[0]:.1f}, {pair[1]:.1f})" for pair in runs)
            assert f"| {name} | {said} |" in PAGE

    def test_clean_rows_are_never_two_kinds(self):
        clean = [point for point in self.RESULTS["points"] if point["kind"] == "clean"]
        verdicts = [line["verdict"] for point in clean + self.RESULTS["fresh"] for line in point["rules"].values()]
        assert set(verdicts) == {"cannot tell"}
        assert f"{len(clean)} clean sets" in PAGE
        assert f"{len(self.RESULTS['fresh'])} fresh ones" in PAGE

    def test_size(self):
        large = self.RESULTS["large"]
        assert large["seconds_in_all"] < 120
        assert f"{large['rows']:,} rows of 50 tokens took {large['seconds_in_all']:.0f} s" in PAGE


class TestFiles:
    def test_every_row_is_kept_or_dropped_as_it_came(self, documented):
        rows = lines_of(documented / "noisy.jsonl")
        keep, drop = lines_of(documented / "filtered/keep.jsonl"), lines_of(documented / "filtered/drop.jsonl")
        reasons = [json.loads(line) for line in lines_of(documented / "filtered/reasons.jsonl")]
        assert [line["row"] for line in reasons] == list(range(len(rows)))
        assert keep == [row for row, line in zip(rows, reasons, strict=True) if line["kept"]]
        assert drop == [row for row, line in zip(rows, reasons, strict=True) if not line["kept"]]
        assert all(line["reason"].startswith("kept" if line["kept"] else "dropped") for line in reasons)

    def test_the_marked_rows_are_the_dropped_ones(self, documented):
        noisy = np.array([bool(json.loads(line)["noise_spans"]) for line in lines_of(documented / "noisy.jsonl")])
        kept = np.array([json.loads(line)["kept"] for line in lines_of(documented / "filtered/reasons.jsonl")])
        assert noisy.sum() == 60
        assert (~kept)[noisy].mean() > 0.9
        assert (~kept)[~noisy].sum() == 0
        document = json.loads((documented / "filtered/filter.json").read_text())
        assert document["roc"]["auc"]["surprise"] > 0.95
        assert document["groups"]["column"] == "skill"
        assert sum(line["dropped"] for line in document["groups"]["rows"]) == document["dropped"] == (~kept).sum()

    def test_weights_are_one_minus_the_posterior(self, documented):
        rows = [json.loads(line) for line in lines_of(documented / "noisy.jsonl")]
        weighted = [json.loads(line) for line in lines_of(documented / "filtered/weights.jsonl")]
        reasons = [json.loads(line) for line in lines_of(documented / "filtered/reasons.jsonl")]
        for row, other, line in zip(rows, weighted, reasons, strict=True):
            assert other.pop("weight") == pytest.approx(1 - line["posterior"], abs=1e-6)
            assert other == row

    def test_a_share_is_kept_exactly(self, documented):
        assert len(lines_of(documented / "by_share/keep.jsonl")) == 210
        assert cache_of(documented)


class TestVerb:
    def test_a_rule_of_the_command_line_takes_no_share_from_the_config(self):
        from qtarget.cli.filter import wish
        from qtarget.filtering import Filter

        named = Filter("surprise", 0.6)
        assert wish(named, None, None) == named
        assert wish(named, None, 0.7) == Filter("surprise", 0.7)
        assert wish(named, "auto", None) == Filter("auto")
        assert wish(Filter("none"), None, None) == Filter("auto")
        weighed = Filter("surprise", None, "weight")
        assert wish(weighed, "auto", None) == Filter("auto", None, "weight")
        assert wish(weighed, None, 0.7, "drop") == Filter("surprise", 0.7)
        assert wish(Filter("none"), None, None, "weight") == Filter("auto", None, "weight")

    def test_clean_rows_are_all_kept(self, documented, config, tmp_path):
        rows = tmp_path / "clean.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in load_demonstrations("base_format_test")[:120]))
        path = config(train_file=str(rows), reference_cache=None)
        assert called("filter", path, "--output", tmp_path / "f") == 0
        document = json.loads((tmp_path / "f/filter.json").read_text())
        assert (document["verdict"], document["dropped"]) == ("cannot tell", 0)
        assert lines_of(tmp_path / "f/keep.jsonl") == lines_of(rows)
        assert (tmp_path / "f/drop.jsonl").read_text() == ""

    def test_training_says_who_scores_the_answers(self, config, tmp_path, capsys):
        assert called("train", config(filter={"rule": "gain", "keep": 0.8}, output_dir=str(tmp_path / "early"))) == 2
        assert "run.yaml --rule gain` once" in capsys.readouterr().err

    def test_gain_scores_the_answers_once(self, config, tmp_path, capsys):
        path = config()
        assert called("filter", path, "--rule", "gain", "--keep", "0.8", "--output", tmp_path / "f") == 0
        assert "scoring the answers" in capsys.readouterr().out
        first = (tmp_path / "f/reasons.jsonl").read_bytes()
        assert called("filter", path, "--rule", "gain", "--keep", "0.8", "--output", tmp_path / "f") == 0
        assert "scoring the answers" not in capsys.readouterr().out
        assert (tmp_path / "f/reasons.jsonl").read_bytes() == first

    def test_the_answers_alone_are_what_the_model_says_without_a_prompt(self, config, tmp_path):
        import torch
        from transformers import AutoModelForCausalLM

        from qtarget.cli.filter import decide_config
        from qtarget.cli.options.config import load_config

        found = decide_config(load_config(config()), {"rule": "gain", "keep": 0.5}, alone=tmp_path / "alone")
        model = AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()
        rows = found.rows
        for place in (0, 17, 123):
            ids = rows.ids[rows.offsets[place] : rows.offsets[place + 1]]
            trained = rows.trained[rows.offsets[place] : rows.offsets[place + 1]]
            tail = torch.tensor(ids[int(np.argmax(trained)) - 1 :])[None]
            with torch.no_grad():
                expected = model(tail).logits[0, :-1].log_softmax(-1).gather(1, tail[0, 1:, None])[:, 0]
            assert rows.alone is not None
            np.testing.assert_allclose(rows.alone[rows.bounds[place] : rows.bounds[place + 1]], expected, atol=1e-3)

    def test_rows_without_a_trained_token_are_kept_and_said(self, documented, config, tmp_path, capsys):
        rows = [
            *lines_of(documented / "noisy.jsonl"),
            '{"prompt": "nothing", "completion": "x", "weight": 0, "noise_spans": []}',
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(rows) + "\n")
        written = config(train_file=str(path), reference_cache=None)
        assert called("filter", written, "--output", tmp_path / "f") == 0
        assert "1 row trains on nothing: not judged, and among the rows that are kept" in capsys.readouterr().out
        assert lines_of(tmp_path / "f/keep.jsonl")[-1] == rows[-1]
        assert json.loads(lines_of(tmp_path / "f/weights.jsonl")[-1])["weight"] == 0

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--keep", "1.5"], "above 0 and below 1"),
            (["--rule", "none", "--keep", "0.5"], "keeps every row"),
            (["--group_by", "colour"], "no such column"),
            (["--mark", "colour=red"], "no row has a value"),
            (["--filter", "{rule: surprize}"], "unknown"),
            (["--as", "weight", "--keep", "0.7"], "no row has a P(right) to be weighed by"),
            (["--reference_cache", "nowhere"], "nowhere"),
        ],
    )
    def test_what_cannot_be_is_said_in_words(self, config, tmp_path, capsys, arguments, said):
        path = config()
        assert called("filter", path, "--output", tmp_path / "f", *arguments) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "f/filter.json").exists()

    def test_a_folder_of_somebody_else_is_left_alone(self, config, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/notes.txt").write_text("mine")
        path = config()
        assert called("filter", path, "--output", tmp_path / "mine") == 2
        assert "did not write" in capsys.readouterr().err
        assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]

    def test_a_cache_of_other_rows_is_refused(self, config, tmp_path, capsys):
        rows = tmp_path / "other.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in load_demonstrations("train")[:60]))
        assert called("filter", config(train_file=str(rows)), "--output", tmp_path / "f") == 2
        assert "are not in the cache" in capsys.readouterr().err


class TestWeighing:
    def test_the_documented_run_trained_on_the_weights(self, documented):
        weights = [json.loads(line)["weight"] for line in lines_of(documented / "weighed/weights.jsonl")]
        assert len(weights) == 300 and min(weights) > 0
        trained = yaml.safe_load((documented / "weighed_sft/qtarget_config.yaml").read_text())
        assert trained["train_file"].endswith("weighed/weights.jsonl")
        last = json.loads((documented / "weighed_sft/train_summary.json").read_text())
        assert last["filter"] is None

    def test_every_row_is_weighed_and_counted_and_never_twice(self, documented, config, tmp_path, capsys):
        rows = [json.loads(line) for line in lines_of(documented / "noisy.jsonl")]
        for row in rows[:40]:
            row["weight"] = 0.5
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path, folder = config(train_file=str(tmp_path / "rows.jsonl"), group_by="skill"), tmp_path / "w"
        assert called("filter", path, "--output", folder) == 0
        assert (folder / "drop.jsonl").is_file()
        capsys.readouterr()
        assert called("filter", path, "--as", "weight", "--output", folder) == 0
        said = capsys.readouterr().out
        assert {file.name for file in folder.glob("*.jsonl")} == {"weights.jsonl", "reasons.jsonl"}
        assert "40 rows had a weight of their own, which is multiplied" in said
        reasons = [json.loads(line) for line in lines_of(folder / "reasons.jsonl")]
        right = np.array([1 - line["posterior"] for line in reasons])
        weights = np.array([json.loads(line)["weight"] for line in lines_of(folder / "weights.jsonl")])
        assert weights == pytest.approx(right * np.where(np.arange(300) < 40, 0.5, 1.0), abs=1e-6)
        assert weights.min() > 0  # 0 would leave the row out
        assert all(line["kept"] and line["reason"].startswith("weighed ") for line in reasons)

        document = json.loads((folder / "filter.json").read_text())
        found, light = document["weights"], int((right < 0.05).sum())
        assert (found["sum"], found["light"], found["own"]) == (pytest.approx(right.sum(), abs=1e-3), light, 40)
        assert f"{right.sum():,.1f} of 300 rows in all, mean {right.mean():.2f}, {light} under 0.05" in said
        skills = np.array([row["skill"] for row in rows])
        for line in document["groups"]["rows"]:
            mine = right[skills == line["value"]]
            assert (line["weight"], line["light"]) == (pytest.approx(mine.sum(), abs=1e-3), (mine < 0.05).sum())
        lowest = int(np.argmin(weights))
        assert any(line.startswith(f"{skills[lowest]}: ") and f"row {lowest + 1}, " in line for line in found["lines"])

        (command,) = re.findall(r"next: `qtarget (.*)`", said)
        assert command == f"train {path} --train_file {folder / 'weights.jsonl'}"

        assert called("filter", path, "--train_file", folder / "weights.jsonl", "--as", "weight") == 2
        twice = ["--train_file", folder / "weights.jsonl", "--filter", "{as: weight}", "--output_dir", tmp_path / "no"]
        assert called("train", path, *twice) == 2
        assert called("compare", path, *twice, "--validation_file", tmp_path / "rows.jsonl") == 2
        assert capsys.readouterr().err.count("would count twice") == 3
        assert not (tmp_path / "no").exists()
        # rows of it may be left out, and then nothing is weighed once more
        assert called("filter", path, "--train_file", folder / "weights.jsonl", "--output", tmp_path / "again") == 0
        assert (tmp_path / "again/keep.jsonl").is_file() and not (tmp_path / "again/weights.jsonl").exists()

    @pytest.mark.nightly
    def test_an_audit_of_weighed_rows_says_so_and_sends_nobody_to_the_filter(
        self, documented, config, tmp_path, capsys
    ):
        path = config()
        assert called("audit-data", path, "--train_file", documented / "filtered/weights.jsonl") == 0
        said = capsys.readouterr().out
        assert "so they are weighed already" in said
        assert "qtarget filter" not in said
        assert called("audit-data", path) == 0
        assert "`filter: auto` leaves them out" in capsys.readouterr().out

    def test_where_nobody_can_tell_no_weights_are_written(self, config, tmp_path, capsys):
        rows = tmp_path / "clean.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in load_demonstrations("base_format_test")[:60]))
        path = config(train_file=str(rows), reference_cache=None, filter={"as": "weight"})
        assert called("filter", path, "--output", tmp_path / "f") == 0
        (tmp_path / "f/weights.jsonl").write_text("of an earlier call\n")
        assert called("filter", path, "--output", tmp_path / "f") == 0
        said = capsys.readouterr().out
        assert "no weights are written: cannot tell" in said
        assert "next: `qtarget train" not in said
        assert [file.name for file in (tmp_path / "f").glob("*.jsonl")] == ["reasons.jsonl"]
        assert json.loads((tmp_path / "f/filter.json").read_text())["weights"] is None

    @pytest.mark.nightly
    def test_training_weighs_no_row_where_nobody_can_tell(self, config, tmp_path, caplog):
        from qtarget.cli.options.config import load_config
        from qtarget.cli.options.datasets import load_datasets
        from qtarget.cli.train import build_trainer

        rows = tmp_path / "clean.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in load_demonstrations("base_format_test")[:60]))
        path = config(train_file=str(rows), reference_cache=None, filter={"as": "weight"})
        assert called("filter", path, "--output", tmp_path / "f") == 0
        run_config = load_config(path)
        run_config.training.reference_cache = str(cache_of(tmp_path))
        trainer = build_trainer(run_config, *load_datasets(run_config))
        assert "no row is weighed" in caplog.text
        assert "mean_weight" not in trainer.preparation.filtered
        assert "loss_weights" not in trainer.train_dataset.column_names


class TestTraining:
    def test_the_documented_run_left_out_what_the_verb_dropped(self, documented):
        summary = json.loads((documented / "filtered_sft/train_summary.json").read_text())["filter"]
        assert summary["left_out"] == len(lines_of(documented / "filtered/drop.jsonl"))
        assert (summary["rows"], summary["verdict"]) == (300, "two kinds")
        assert yaml.safe_load((documented / "filtered_sft/qtarget_config.yaml").read_text())["filter"] == "auto"

    def test_in_python_the_rows_are_those_of_the_verb(self, documented, config, tmp_path):
        from qtarget.cli.options.config import load_config
        from qtarget.cli.options.datasets import load_datasets
        from qtarget.cli.train import build_trainer
        from qtarget.integrations.sft.data.columns import ROW_IDS

        reasons = [json.loads(line) for line in lines_of(documented / "filtered/reasons.jsonl")]
        kept = [line["row"] for line in reasons if line["kept"]]
        run_config = load_config(config(filter="auto"))
        trainer = build_trainer(run_config, *load_datasets(run_config))
        assert [row[0] for row in trainer.train_dataset[ROW_IDS]] == kept
        assert trainer.preparation.filtered["left_out"] == 300 - len(kept)
        trainer.train()

    def test_one_cache_serves_the_filter_and_a_target_that_reads_it(self, config, tmp_path):
        path = config(reference_cache=None, target="consensus", filter="auto")
        assert called("filter", path, "--output", tmp_path / "f") == 0
        assert called("train", path) == 0
        assert cache_of(tmp_path)
        summary = json.loads((tmp_path / "out/train_summary.json").read_text())
        assert (summary["target"], summary["filter"]["left_out"]) == (
            "consensus",
            len(lines_of(tmp_path / "f/drop.jsonl")),
        )

    def test_as_weight_every_token_of_a_row_has_its_rows_weight(self, documented, config):
        from qtarget.cli.options.config import load_config
        from qtarget.cli.options.datasets import load_datasets
        from qtarget.cli.train import build_trainer
        from qtarget.integrations.sft.data.columns import ROW_IDS

        reasons = [json.loads(line) for line in lines_of(documented / "filtered/reasons.jsonl")]
        run_config = load_config(config(filter={"rule": "auto", "as": "weight"}))
        trainer = build_trainer(run_config, *load_datasets(run_config))
        for row in trainer.train_dataset:
            expected = 1 - reasons[row[ROW_IDS][0]]["posterior"]
            assert row["loss_weights"] == pytest.approx([expected] * len(row["input_ids"]), abs=1e-5)
        trainer.train()

    @pytest.mark.parametrize(
        ("keys", "said"),
        [
            ({"filter": "auto", "prompt_weight": 0.1}, "prompt_weight trains prompts"),
            ({"filter": {"rule": "surprise", "keep": 2}}, "above 0 and below 1"),
            ({"filter": "best"}, "expected one of auto"),
        ],
    )
    def test_what_cannot_be_filtered_is_refused(self, config, capsys, keys, said):
        assert called("train", config(**keys)) == 2
        assert said in capsys.readouterr().err


def test_prompts_that_are_trained_are_refused_before_the_base_is_scored(config, tmp_path, capsys):
    path = config(reference_cache=None, prompt_weight=0.1)
    assert called("filter", path, "--output", tmp_path / "found") == 2
    assert "prompt_weight trains prompts too" in capsys.readouterr().err
    assert not list(tmp_path.glob("reference_cache*"))
