"""`bench distill --base`: its machinery the embedded base teaches on rows made here; no package, and seconds."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qtarget.benchmarks.pool import RunLog, Workers
from qtarget.benchmarks.real.distill import bench, runs
from qtarget.benchmarks.real.distill.bench import chosen_rates, run_real_distill
from qtarget.benchmarks.real.distill.config import CONTENDERS, DOLLY, HALF, QUICK, SIZES, SMALL, STORIES
from qtarget.benchmarks.real.distill.prepared import make_student, write_held_out
from qtarget.benchmarks.real.distill.results import real_distill_figure, real_distill_table, summarize
from qtarget.benchmarks.real.distill.runs import RealDistillWorker, measured
from qtarget.benchmarks.real.distill.texts import real_rows
from qtarget.benchmarks.real.instructions import FILE
from qtarget.benchmarks.start import Start
from qtarget.cli.app import app
from qtarget.core.errors import ConfigError, DataError
from qtarget.scoring.cache.reader import ReferenceCache

TINY = replace(
    QUICK, points=((HALF, DOLLY),), fractions=(1.0,), rates={HALF: (1e-3,)}, length=40, validation_rows=2, test_rows=3
)


class Stopped(Exception):
    """As a kill would."""


@pytest.fixture
def data(tmp_path):
    """Both texts, made here."""
    answers = [
        {
            "instruction": f"What is {n} plus {n}?",
            "input": "",
            "output": f"{n} plus {n} is {2 * n}, as all of us knew long before now.",
        }
        for n in range(12)
    ]
    stories = [f"Once there were {n} little dogs. They ran to the park and found {n} more." for n in range(12)]
    for name, rows in (("dolly_3k/dolly_3k", answers), ("text_corpora/tinystories_1000", stories)):
        path = tmp_path / "data" / f"{name}.json.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    return tmp_path / "data"


def test_a_killed_run_goes_on_from_what_it_has_and_finds_all(tmp_path, data):
    output, seen = tmp_path / "d.json", []

    def stop(done, total, said):
        seen.append(said)
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run_real_distill(TINY, data, output, resume=False, progress=stop)
    cache = tmp_path / "d.work/dolly/top8_bucket"
    before = (cache / "manifest.json").stat().st_mtime_ns
    found = run_real_distill(TINY, data, output, resume=True, progress=lambda *said: seen.append(said[2]))
    runs = [said for said in seen if "of the rows" in said]
    assert len(runs) == len(set(runs)) == TINY.runs() == 3  # the untrained student, and two contenders
    assert (cache / "manifest.json").stat().st_mtime_ns == before
    sft, listed = found["summary"]["points"][0]["methods"].values()
    assert 0 == sft["bytes_per_token"] < listed["bytes_per_token"]
    assert sft["learning_rate"] == listed["learning_rate"] == 1e-3
    assert real_distill_table(found).count("*untrained*") == 1 and len(real_distill_figure(found).axes) == 2
    assert str(tmp_path) not in output.read_text() and "folder" not in output.read_text()
    with pytest.raises(ConfigError, match="steps was 2, is 3"):
        run_real_distill(replace(TINY, steps=3), data, output, resume=True, progress=print)


@pytest.mark.nightly
def test_every_contender_trains_both_students_and_tunes(tmp_path, data):
    config = replace(
        TINY, points=((HALF, DOLLY), (SMALL, STORIES)), contenders=tuple(CONTENDERS), fractions=(0.5, 1.0), steps=4,
        rates={HALF: (1e-3,), SMALL: (1e-3, 3e-3)}, is_tuned=True,
    )  # fmt: skip
    found = run_real_distill(config, data, tmp_path / "d.json", resume=False, progress=lambda *said: None)
    half, small = found["points"]
    assert not half["tuned"] and set(small["tuned"]) == set(CONTENDERS)
    for point in (half, small):
        before = sum(point["untrained"]["nll"]) / 3
        assert all(sum(run["nll"]) / 3 < before for run in point["runs"].values())
    for name in ("top8_bucket", "top8_spread", "top8_renormalize"):
        cache = ReferenceCache.open(tmp_path / "d.work/dolly" / name)
        assert cache.manifest.tail_policy == name.partition("_")[2]


class Fixed:
    """Finds a KL by contender and rate."""

    def __init__(self, table) -> None:
        self.table = table

    def __call__(self, job):
        return {"kl_to_teacher": self.table[job.method, job.learning_rate]}


def test_each_contender_takes_its_own_rate_or_all_take_that_of_sft(tmp_path):
    config = replace(TINY, rates={HALF: (1e-3, 3e-3)}, is_tuned=True)
    table = {
        ("sft", 1e-3): [2.0, 4.0], ("sft", 3e-3): [2.0, 3.0], ("top8_bucket", 1e-3): [2.0], ("top8_bucket", 3e-3): [2.0]
    }  # fmt: skip
    for is_tuned, expected in ((True, 1e-3), (False, 3e-3)):
        config, log = replace(config, is_tuned=is_tuned), RunLog(tmp_path / f"{is_tuned}.jsonl", resume=False)
        with Workers(1, Fixed, table) as workers:
            rates, tuned = chosen_rates(config, HALF, DOLLY, workers, log, lambda _: None)
        assert rates == {"sft": 3e-3, "top8_bucket": expected}
        assert tuned["sft"] == {"0.001": 3.0, "0.003": 2.5} and ("top8_bucket" in tuned) == is_tuned
        assert all(
            "tuning" in key and "|1000|" in key for key in log.runs
        )  # on another draw of rows than the final runs


def test_the_half_is_the_teachers_own_and_a_model_is_at_no_distance_from_itself(tmp_path, data):
    """KL and NLL against those of the models' own forward passes."""
    start = Start()
    config = replace(TINY, start=start)
    make_student(start, HALF, tmp_path / HALF)
    write_held_out(config, real_rows(data, DOLLY, config), tmp_path / DOLLY)
    worker = RealDistillWorker(config, {}, [], tmp_path)
    rows, states, head = worker.held_out(DOLLY, "test")
    teacher = start.load().eval()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / HALF, dtype=torch.float32).eval()
    assert student.config.num_hidden_layers == teacher.config.num_hidden_layers // 2
    same, apart = measured(teacher, rows, states, head), measured(student, rows, states, head)
    assert same["kl_to_teacher"] == pytest.approx([0] * 3, abs=1e-5) and same["nll"] == same["teacher_nll"]
    for index, row in enumerate(rows):
        ids = torch.tensor([row.prompt + row.completion])
        with torch.no_grad():
            at = slice(len(row.prompt) - 1, -1)
            p, q = (model(ids).logits[0, at].log_softmax(-1) for model in (teacher, student))
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
        assert apart["kl_to_teacher"][index] == pytest.approx(float(kl), abs=1e-4)
        nll = torch.nn.functional.nll_loss(q, torch.tensor(row.completion))
        assert apart["nll"][index] == pytest.approx(float(nll), abs=1e-4)
        assert apart["teacher_nll"] == same["nll"]


def test_the_verdict_by_hand():
    """The contender is at 1.0 with 0.4 of the rows, cross entropy at 1.5 with all of them; in NLL nothing is told."""

    def run(kl, nll):
        return {"kl_to_teacher": kl, "nll": nll, "teacher_nll": [1.0, 1.0]}

    runs = {
        "sft|0.4": run([2.0, 3.0], [4.0, 4.0]), "sft|1": run([1.0, 2.0], [3.0, 3.0]),
        "top8_bucket|0.4": run([0.5, 1.5], [2.0, 4.5]), "top8_bucket|1": run([0.5, 0.5], [2.0, 2.0]),
    }  # fmt: skip
    point = {
        "student": HALF, "text": DOLLY, "rates": {"sft": 1e-3, "top8_bucket": 1e-3}, "runs": runs,
        "untrained": run([9.0, 7.0], [9.0, 9.0]),
    }  # fmt: skip
    results = {
        "config": {"fractions": [0.4, 1.0], "train_rows": 10, "answer_tokens": 9}, "points": [point],
        "teacher": {"students": {HALF: 8e7}, DOLLY: {"caches": {"top8_bucket": {"bytes_per_token": 25.0}}}},
    }  # fmt: skip
    results["summary"] = summarize(results, {"sft": "", "top8_bucket": "top8_bucket"})
    (found,) = results["summary"]["points"]
    row = found["methods"]["top8_bucket"]
    assert row["kl_to_teacher_to_sft_on_all_rows"] == {"mean": -0.5, "low": -0.5, "high": -0.5}
    assert row["kl_to_teacher_data_needed"]["mean"] == 0.4 and row["nll_data_needed"]["mean"] == pytest.approx(0.52)
    assert found["untrained"] == {"kl_to_teacher": 8.0, "nll": 9.0} and found["teacher_nll"] == 1.0
    assert results["summary"]["finding"] == (
        "half student, dolly, 0.4 of the rows against sft on all: KL above: sft, below: top8_bucket; "
        "NLL above: sft, not told apart: top8_bucket"
    )
    line = "| top8_bucket | 25 | 1.00 | 0.50 | 3.25 | 2.00 | -0.50 (-0.50..-0.50) | +0.25 (-1.00..+1.50) |"
    assert line in real_distill_table(results)


def test_students_of_dolly_and_the_teacher_are_asked_to_follow_instructions(tmp_path, data, monkeypatch):
    asked = [{"key": 1, "instruction_id_list": ["a"]}, {"key": 2, "instruction_id_list": ["b", "c"]}]
    lines = "".join(json.dumps({**row, "prompt": "Say it.", "kwargs": []}) + "\n" for row in asked)
    path = data / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(lines.encode()))
    layers = []

    def followed(model, tokenizer, rows, longest):
        assert [row["key"] for row in rows] == [1, 2] and longest == 7
        layers.append(model.config.num_hidden_layers)
        one = [1, len(layers) % 3]  # of the second prompt: 1, 2, 0, 1 instructions
        whole = [1, int(one[1] == 2)]
        return {
            "prompt_strict": whole,
            "instruction_strict": one,
            "prompt_loose": whole,
            "instruction_loose": one,
            "ended": [1, 0],
        }

    monkeypatch.setattr(runs, "instruction_following", followed)
    monkeypatch.setattr(bench, "check_ready", lambda data: None)
    config = replace(
        TINY,
        points=((HALF, DOLLY), (SMALL, STORIES)),
        rates={HALF: (1e-3,), SMALL: (1e-3,)},
        prompts=2,
        answer_tokens=7,
    )
    found = run_real_distill(config, data, tmp_path / "d.json", resume=False, progress=lambda *said: None)
    whole = Start().load().config.num_hidden_layers
    assert layers == [whole // 2, whole, whole // 2, whole // 2]  # untrained, teacher, and two contenders
    dolly, stories = found["points"]
    assert max(dolly["teacher"]["kl_to_teacher"]) == pytest.approx(0, abs=1e-5)
    assert "teacher" not in stories and not any("instructions" in run for run in stories["runs"].values())
    table = real_distill_table(found)
    assert table.count("IFEval") == 1 and "2 prompts, answers cut at 7 tokens" in table
    assert "| *teacher* |  | 100.0 (100..100) | 100.0 (100..100) |" in table  # both prompts, all three instructions
    assert len(found["points"]) == 2 and config.runs() == 4 + 3


def test_the_full_setting_has_what_its_page_names():
    full, short = SIZES["full"], SIZES["short"]
    assert set(full.contenders) == set(CONTENDERS) >= {"sft", "top8_spread", "top64_bucket", "draws50", "hybrid_top64"}
    assert len(full.points) == 4 and all(len(grid) == 3 for grid in full.rates.values())
    assert full.runs() == 4 * (1 + 7 * 3 + 7 * 3) + 1 and short.runs() == 2 * (1 + 3 * 3 + 2)
    assert 0.4 in full.fractions and 0.4 in short.fractions
    assert len({job.key for point in full.points for job in full.tuning_jobs(*point)}) == 4 * 21


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--base", "smollm2"], "name the folder with --data"),
        (["--base", "smollm2", "--data", ".", "--long"], "in sizes of its own"),
        (["--short"], "goes with a real base"),
        (["--base", "nonsense", "--data", "."], "is unknown"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, words):
    found = CliRunner().invoke(app, ["bench", "distill", *options, "--output", str(tmp_path / "d.json")])
    assert isinstance(found.exception, ConfigError) and words in str(found.exception)
    assert not list(tmp_path.iterdir())


def test_a_missing_text_is_named_before_anything_is_made(tmp_path):
    with pytest.raises(DataError, match=r"dolly_3k\.json\.gz is missing"):
        run_real_distill(TINY, tmp_path / "nowhere", tmp_path / "d.json", resume=False, progress=print)
    assert not list(tmp_path.iterdir())
