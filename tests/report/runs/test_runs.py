"""Reports from run folders written by hand: what is compared, what is refused, what is said about broken runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from qtarget.core.errors import DataError
from qtarget.report.runs.document import compare_runs, read_runs, sample_changes
from qtarget.report.runs.figures import comparison_figures, png_bytes, runs_page, write_pngs
from qtarget.report.runs.records import LOG_FILE, RUN_FILE, SAMPLES_FILE, append_line, read_lines, write_lines
from qtarget.report.runs.tokens import token_changes
from qtarget.storage.files import write_text


def evaluation(step, nll, prefix="eval_"):
    return {f"{prefix}runtime": 1.0, f"{prefix}nll": nll, f"{prefix}loss": nll / 2, "step": step}


def training(step, nll, weight=0.5):
    return {"loss": nll / 2, "nll": nll, "label_weight": weight, "effective_sample_size": 0.9, "step": step}


def row(log_probs, tokens=("a", "b", "c"), number=0):
    return {"row": number, "input_ids": [ord(t[0]) for t in tokens], "tokens": list(tokens), "log_probs": log_probs,
            "label_weights": [None if v is None else 1.0 for v in log_probs]}  # fmt: skip


LOG = [evaluation(0, 5.0), training(1, 5.1), training(2, 4.0, 0.7), evaluation(2, 3.5)]
SAMPLES = [
    {"step": 0, "name": "eval", "rows": [row([None, -3.0, -1.0])]},
    {"step": 2, "name": "eval", "rows": [row([None, -1.0, -1.5])]},
]


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", log=LOG, samples=SAMPLES, **description):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in log))
        (folder / SAMPLES_FILE).write_text("".join(json.dumps(line) + "\n" for line in samples))
        whole = {
            "schema_version": 1,
            "target": "sft",
            "target_kwargs": {},
            "max_steps": 2,
            "model": {"tokenizer_fingerprint": "t"},
            "data": {"train": {"fingerprint": "x"}, "eval": {"fingerprint": "e"}},
            "settings": {"learning_rate": 0.1},
        }
        (folder / RUN_FILE).write_text(json.dumps(whole | description))
        return folder

    return make


def report_of(*folders):
    runs = read_runs(folders)
    return compare_runs(runs, [change for run in runs for change in sample_changes(run)])


def test_numbers_by_hand(make_run):
    report = report_of(make_run("a"), make_run("b", [evaluation(0, 5.0), evaluation(2, 3.0)], target="dft"))
    json.dumps(report, allow_nan=False)
    a, b = report["runs"]
    assert a["clean_nll"]["eval"] == {
        "first": {"nll": 5.0, "step": 0}, "last": {"nll": 3.5, "step": 2}, "lowest": {"nll": 3.5, "step": 2},
    }  # fmt: skip
    assert a["train"] == {
        "step": [1, 2], "nll": [5.1, 4.0], "loss": [2.55, 2.0], "label_weight": [0.5, 0.7],
        "effective_sample_size": [0.9, 0.9],
    }  # fmt: skip
    assert b["target"] == "dft"
    assert report["finding"].startswith(
        "Nll on eval rows at the last evaluation, nats a token: a 3.500, b 3.000 (no interval"
    )
    assert {d["key"]: d["values"] for d in report["differences"]} == {"target": ["sft", "dft"]}
    change = report["tokens"][0]
    assert (change["nll_before"], change["nll_after"], change["token_count"]) == (2.0, 1.25, 2)
    assert [(g["token"], g["context"], g["change"]) for g in change["gains"]] == [("b", "a", 2.0)]
    assert [(g["token"], g["change"]) for g in change["losses"]] == [("c", -0.5)]


@pytest.mark.parametrize(
    ("log", "state", "reason"),
    [
        ([*LOG, {"train_loss": 3.0, "step": 2}], "finished", None),
        (LOG, "unfinished", None),
        ([line | {"train_runtime": 3.0} for line in LOG], "unfinished", None),
        ([*LOG, {"step": 2, "stopped": "the loss is nan"}], "stopped", "the loss is nan"),
    ],
)
def test_how_a_run_ended(make_run, log, state, reason):
    status = report_of(make_run(log=log))["runs"][0]["status"]
    assert status == {"state": state, "reason": reason, "step": 2, "max_steps": 2}


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_broken_one_is_named(make_run):
    folder = make_run()
    with (folder / LOG_FILE).open("a") as file:
        file.write('{"loss": 1')
    assert report_of(folder)["runs"][0]["train"]["step"] == [1, 2]
    (folder / LOG_FILE).write_text('{"loss": \n{"loss": 1.0, "step": 1}\n')
    with pytest.raises(DataError, match="line 1"):
        read_runs([folder])


def test_scalars_of_metrics_are_recorded_as_numbers(tmp_path):
    path = tmp_path / "log.jsonl"
    write_lines(path, [])
    append_line(path, {"step": 1, "a": np.float32(1.5), "b": torch.tensor(2.0), "c": np.zeros(2)})
    assert read_lines(path) == [{"step": 1, "a": 1.5, "b": 2.0, "c": "[0. 0.]"}]


def test_values_that_are_not_finite_are_gaps_with_a_note(make_run, tmp_path):
    folder = make_run(log=[*LOG, training(3, float("nan")), evaluation(3, float("inf"))])
    report = report_of(folder)
    json.dumps(report, allow_nan=False)
    run = report["runs"][0]
    assert run["train"]["nll"][-1] is None and run["clean_nll"]["eval"]["last"] == {"nll": 3.5, "step": 2}
    assert any("not finite, first at step 3" in note for note in run["notes"])
    assert all(png_bytes(figure).startswith(b"\x89PNG") for figure in comparison_figures(report).values())


def test_what_cannot_be_compared_is_refused_with_what_differs(make_run, tmp_path):
    first = make_run("first")
    other_rows = make_run("rows", data={"train": {"fingerprint": "x"}, "eval": {"fingerprint": "other"}})
    with pytest.raises(DataError, match=r"first and rows differ in their rows of 'eval'.*--rows"):
        report_of(first, other_rows)
    with pytest.raises(DataError, match="differ in their tokenizer"):
        report_of(first, make_run("tokenizer", model={"tokenizer_fingerprint": "u"}))
    unknown = make_run("unknown", model={})
    for order in ([unknown, first, tmp_path / "tokenizer"], [first, unknown, tmp_path / "tokenizer"]):
        with pytest.raises(
            DataError, match="first and tokenizer differ in their tokenizer"
        ):  # a stranger hides nothing
            report_of(*order)
    other_training = make_run("training", data={"train": {"fingerprint": "y"}, "eval": {"fingerprint": "e"}})
    keys = [one["key"] for one in report_of(first, other_training)["differences"]]
    assert keys == ["data.train.fingerprint"]


def test_folders_that_hold_no_run(tmp_path, make_run):
    with pytest.raises(DataError, match="not a folder"):
        read_runs([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no run"):
        read_runs([tmp_path / "empty"])
    folder = make_run()
    with pytest.raises(DataError, match="twice"):
        read_runs([folder, folder / "."])
    (folder / RUN_FILE).write_text('{"schema_version": 99}')
    with pytest.raises(DataError, match="schema_version 99"):
        read_runs([folder])


def test_a_run_without_evaluation_and_one_of_another_trainer(make_run, tmp_path):
    silent = report_of(make_run("silent", log=[training(1, 2.0)], samples=[]))
    assert silent["tokens"] == [] and "nothing is ranked" in silent["finding"]
    assert any("no evaluation" in note for note in silent["runs"][0]["notes"])
    other = tmp_path / "other/checkpoint-7"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    history = [{"loss": 2.0, "step": 7}, {"eval_loss": 1.0, "eval_runtime": 1.0, "step": 7}]
    (other / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run = report_of(tmp_path / "other")["runs"][0]
    assert run["evaluations"]["eval"] == {"step": [7], "loss": [1.0]}
    assert (run["status"]["step"], run["clean_nll"]) == (7, {})
    assert len(run["notes"]) == 2


def sampling(step, reward, **more):
    return {"loss": 0.1, "reward": reward, "entropy": 1.0 / step, "divergence/kl_k3": 0.01 * step, "ratio/ess": 0.9,
            "rollout/age": step - 1.0, "step": step} | more  # fmt: skip


def test_a_run_on_samples_has_its_panels_and_one_on_demonstrations_has_none(make_run, tmp_path):
    held_out = [{"eval_runtime": 1.0, "eval_reward": value, "step": step} for step, value in ((1, 0.2), (2, 0.3))]
    log = [sampling(1, 0.25, **{"region/blocked_positive": 0.125}), held_out[0], sampling(2, 0.5), held_out[1]]
    rl, sft = make_run("rl", log=log, samples=[]), make_run("sft")
    report = report_of(rl)
    assert "rl 0.250 to 0.500" in report["finding"]
    assert report["runs"][0]["notes"] == []
    train = report["runs"][0]["train"]
    assert train["region/blocked_positive"] == [0.125, None] and "region/blocked_negative" not in train
    assert report["runs"][0]["evaluations"]["eval"]["reward"] == [0.2, 0.3]
    assert report["runs"][0]["rewards"]["samples"]["first"] == {"reward": 0.25, "step": 1}
    assert report["runs"][0]["rewards"]["eval"] == {
        "first": {"reward": 0.2, "step": 1}, "last": {"reward": 0.3, "step": 2}, "highest": {"reward": 0.3, "step": 2},
    }  # fmt: skip
    figures = comparison_figures(report)
    drawn = {axes.get_ylabel().split(",")[0]: list(axes.lines[0].get_ydata()) for axes in figures["samples"].axes}
    assert drawn == {
        "reward of samples": [0.25, 0.5],
        "KL to the sampler": [0.01, 0.02],
        "effective sample size of ratios": [0.9, 0.9],
        "blocked": [0.125],
        "entropy": [1.0, 0.5],
        "age of samples": [0.0, 1.0],
    }
    assert [list(line.get_ydata()) for line in figures["held_out_reward"].axes[0].lines] == [[0.2, 0.3]]
    assert not {"samples", "held_out_reward"} & set(comparison_figures(report_of(sft)))
    both = report_of(rl, sft)
    assert len(comparison_figures(both)["samples"].axes[0].lines) == 1  # of the run that has samples
    page = runs_page(both)
    assert 'alt="samples;' in page and "held out reward" in page


def paths_of(axes):
    """Lines of a panel without the rings: label -> (x, y)."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): list(zip(*(map(float, v) for v in line.get_data()), strict=True)) for line in lines}


def test_reward_against_kl_is_drawn_where_the_policy_moved(make_run):
    held_out = [
        {"eval_runtime": 1.0, "eval_reward": value, "step": step} for step, value in ((0, 0.1), (1, 0.2), (3, 0.4))
    ]
    moved = make_run(
        "moved", log=[held_out[0], sampling(1, 0.25), held_out[1], sampling(2, 0.5), held_out[2]], samples=[]
    )
    still = make_run("still", log=[sampling(i, 0.5, **{"divergence/kl_k3": 1e-9}) for i in (1, 2)], samples=[])
    trl = make_run(
        "trl", log=[sampling(1, 0.3, kl=0.5), sampling(2, 0.6, kl=float("nan")), sampling(3, 0.7, kl=0.7)], samples=[]
    )
    figure = comparison_figures(report_of(moved, still, trl))["reward_against_kl"]
    found = {(a.get_xlabel(), a.get_ylabel()): paths_of(a) for a in figure.axes}
    assert found == {
        ("KL to the sampler, nats a token", "reward of samples"): {"moved": [(0.01, 0.25), (0.02, 0.5)]},
        # an evaluation takes the KL of the last training line; the one before all has none
        ("KL to the sampler, nats a token", "reward of held-out prompts, eval"): {"moved": [(0.01, 0.2), (0.02, 0.4)]},
        ("KL to the start, nats a token", "reward of samples"): {"trl": [(0.5, 0.3), (0.7, 0.7)]},
    }
    rings = [line for axes in figure.axes for line in axes.lines if line.get_markersize() == 10]
    assert [float(ring.get_xdata()[0]) for ring in rings] == [0.02, 0.02, 0.7]
    assert "reward_against_kl" not in comparison_figures(report_of(still))
    assert "reward against kl" in runs_page(report_of(moved))


def test_steps_without_samples_are_named(make_run):
    (run,) = read_runs([make_run()])
    with pytest.raises(DataError, match="at step 1; there are some at 0, 2"):
        sample_changes(run, first=1)
    with pytest.raises(DataError, match="no trained token in common"):
        token_changes([row([None, -1.0, -1.0])], [row([None, -1.0, -1.0], tokens=("x", "y", "z"))])


def test_twelve_runs_have_twelve_different_lines(make_run, tmp_path):
    folders = [make_run(f"group{i % 3}/run{i // 3}", [evaluation(0, 5.0), evaluation(2, 3.0 + i)]) for i in range(12)]
    report = report_of(*folders)
    assert len({run["name"] for run in report["runs"]}) == 12
    lines = comparison_figures(report)["evaluation_nll"].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12
    assert [list(line.get_ydata()) for line in lines] == [[5.0, 3.0 + i] for i in range(12)]
    paths = write_pngs(report, tmp_path / "figures")
    assert len(paths) == 13 and all(path.stat().st_size > 1000 for path in paths)


HOSTILE = "</script><script>document.title='owned'</script>"


def test_the_page_in_a_browser(make_run, open_page, tmp_path):
    tokens = ("a", HOSTILE, "$x_1$\u202e")
    samples = [
        {"step": 0, "name": "eval", "rows": [row([None, -3.0, -1.0], tokens)]},
        {"step": 2, "name": "eval", "rows": [row([None, -1.0, -1.5], tokens)]},
    ]
    report = report_of(make_run("a_$run", samples=samples), make_run("_b", target="dft"))
    path = tmp_path / "page.html"
    write_text(path, runs_page(report))
    page = open_page(path)
    assert page.title() == "Runs: a_$run, _b"
    assert page.locator("#finding").inner_text() == report["finding"] + "."
    cells = page.locator("#summary tbody tr").first.locator("th, td").all_inner_texts()
    assert cells == ["a_$run", "sft", "unfinished, 2 of 2 steps", "eval", "5 (step 0)", "3.5 (step 2)", "3.5 (step 2)"]
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 100)")
    first, last = page.locator(".qt-token:not(.masked)").all()
    assert first.inner_text() == HOSTILE
    assert first.evaluate("e => getComputedStyle(e).backgroundColor") != last.evaluate(
        "e => getComputedStyle(e).backgroundColor"
    )
    first.hover()
    assert "log-prob -3 to -1, change 2 nats" in page.locator("#qt-tip").inner_text()
    page.keyboard.press("Escape")
    last.focus()
    assert "change -0.5 nats" in page.locator("#qt-tip").inner_text()
    page.select_option("#which", "1")
    assert page.locator(".qt-token").all_inner_texts() == ["a", "b", "c"]
    assert page.locator("#differences tbody tr").all_inner_texts() == ["target\tsft\tdft"]
