"""docs/weights.md: its example prints what it says, and its rows and keys train."""

import contextlib
import io
import json
import re

import yaml

from qtarget.cli.main import run
from qtarget.data.loading import load_dataset_file
from tests import ROOT

PAGE = (ROOT / "docs/weights.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_example_prints_what_it_says():
    (code,) = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert f"# {printed.getvalue()}" in code


def test_the_rows_train(make_trainer, tmp_path):
    (lines,) = blocks("json")
    weighted = []
    for number, line in enumerate(lines.splitlines()):
        (tmp_path / f"{number}.jsonl").write_text(line + "\n")
        trainer = make_trainer("sft", data=load_dataset_file(tmp_path / f"{number}.jsonl"))
        row = trainer.train_dataset[0]
        ids = [
            i
            for i, w, y in zip(row["input_ids"], row["loss_weights"], row["labels"], strict=True)
            if not w and y != -100
        ]
        weighted.append("".join(trainer.processing_class.convert_ids_to_tokens(ids)))
    assert weighted == ["It is 48.", "Bad^"]


def test_the_command_line_takes_the_keys(tmp_path, caplog):
    from qtarget.data.embedded import base_model_path

    rows = [
        {"prompt": f"{i} + 1 = ", "completion": f"x {i + 1}", "weight_spans": [[0, 1, 0]], "weight": i % 2}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model_name_or_path": str(base_model_path()), "train_file": str(tmp_path / "rows.jsonl"), "target": "label_smoothing",
        "output_dir": str(tmp_path / "run"), "max_steps": 1, "report_to": "none", "prompt_weight": 0.1, "use_cpu": True,
        "weights_scale": "all", "unplaced_spans": "leave_out", "bf16": False,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with contextlib.suppress(SystemExit):
        run(["train", str(tmp_path / "run.yaml")])
    said = caplog.text
    assert "weight: 8 rows, mean 0.5, smallest 0, largest 1" in said
    assert "4 rows of weight 0 are left out" in said
    assert (tmp_path / "run" / "train_summary.json").exists()
