"""The README says what the code does: its table, its examples and its commands."""

import json
import re
import shlex
import subprocess
import sys
from statistics import fmean

import pytest

from tests import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_pages_are_what_their_script_writes():
    """Examples, table and numbers come from the files they are about."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from update_docs import render
    finally:
        sys.path.pop(0)
    for page, text in render().items():
        assert (ROOT / page).read_text() == text, page


def test_it_is_one_screen():
    assert len(README.splitlines()) <= 130


def test_numbers_in_the_text_are_those_of_the_raw_results():
    noise = json.loads((ROOT / "benchmarks/results/noise.json").read_text())
    goals = noise["summary"]["goals"]
    noisy = [g for g in goals if g["rate"] and g["base"] != "untrained"]
    assert len(noisy) == 12
    over = [g["ours"] - g["sft"] for g in noisy]
    assert (round(min(over), 1), round(max(over))) == (-0.1, 22)
    means = {
        (cell["base"], cell["kind"], cell["rate"]): {
            n: m["accuracy_percent"]["mean"] for n, m in cell["methods"].items()
        }
        for cell in noise["summary"]["cells"]
    }
    end = means["most", "random_tokens", 0.4]
    assert [round(end[name]) for name in ("target_sft", "asft", "sft")] == [69, 64, 43]
    assert means["none", "random_tokens", 0.4]["target_sft"] == means["none", "random_tokens", 0.4]["asft"] == 0
    # 1 - p_base: below sft at every point but the one without noise tokens where they tie within a point
    assert all(cell["prior_surprise"] < cell["sft"] for cell in means.values())


def raw(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def means_of(name: str) -> dict[tuple[str, str, float], dict[str, float]]:
    cells = raw(name)["cells"]
    return {
        (cell["base"], cell["kind"], cell["rate"]): {
            method: fmean(run["accuracy_percent"] for run in runs) for method, runs in cell["runs"].items()
        }
        for cell in cells
    }


def test_the_table_of_situations_is_of_the_raw_results():
    clean, random, filtered = ("most", "random_tokens", 0.0), ("most", "random_tokens", 0.4), "sft, rows by witness"
    scan, noise, cogs = means_of("noise_scan")[clean], means_of("noise"), means_of("noise_cogs_tuned")[clean]
    smol = {key[1:]: found for key, found in means_of("noise_smollm2_tuned").items()}
    behind = [
        noise[b, *clean[1:]]["sft"] - noise[b, *clean[1:]]["crossfit_consensus"] for b in ("none", "half", "most")
    ]
    compared = [(p["clean_percent"]["consensus"] - p["clean_percent"]["sft"]) for p in raw("compare")["points"]]
    gains = [
        found[filtered] - found["sft"]
        for name in ("noise_crossfit", "noise_cogs_tuned")
        for (_, kind, _), found in means_of(name).items()
        if kind == "wrong_answer"
    ]
    found = {
        f"`target_sft` is {scan['target_sft'] - scan['sft']:.1f} points above": "clean rows",
        f"{min(gains):.0f} to {max(gains):.0f} points above `sft` at {len(gains)} points": "some rows are wrong",
        f"{noise[clean]['sft'] - noise[clean]['consensus']:.1f} below on clean rows": "some tokens are wrong, nothing",
        f"{-sorted(compared)[1]:.0f} and {-min(compared):.0f} below at {sum(x < 0 for x in compared)} of [{len(compared)} points]":
            "some tokens are wrong, nothing",
        f"at most {max(behind):.1f} below on clean rows there": "the same, and two",
        f"{cogs['sft'] - cogs['crossfit_consensus']:.1f} below on [clean rows of COGS]": "the same, and two",
        f"{smol[clean[1:]]['crossfit_consensus'] - smol[clean[1:]]['sft']:.1f} above on clean rows, "
        f"{smol[random[1:]]['sft'] - smol[random[1:]]['crossfit_consensus']:.1f} below under random tokens": "the same, and two",
        f"untrained {raw('noise')['untrained']['most']['accuracy_percent']:.0f} %, `consensus` {noise[random]['consensus']:.0f} %":
            "some tokens are wrong, the base answers",
        f"{smol[random[1:]]['consensus']:.0f} % against {smol[random[1:]]['sft']:.0f} on [SmolLM2](docs/real_model.md), where "
        f"`p_power` has {smol[random[1:]]['p_power']:.0f}": "some tokens are wrong, nothing",
        f"with {raw('distill_long')['methods']['distillation']['data_needed']['mean']:.2f} of the rows": "a bigger model",
    }  # fmt: skip
    for words, situation in found.items():
        [row] = [line for line in README.splitlines() if line.startswith(f"| {situation}")]
        assert words in row, words


def test_a_verdict_is_quoted_as_it_is_said():
    from qtarget.report.comparison.verdict import Line, Measure, verdict

    lines = [Line("sft", 0.5, None), Line("dft", 0.5, {"mean": 0.0, "low": -0.1, "high": 0.1})]
    said = verdict(lines, Measure("exact", 300, 3), {}).sentence
    before, _, after = re.sub(r" \(.*\)", " (...)", said).partition("300 rows")
    for page, rows in (("README.md", 300), ("docs/compare.md", 300), ("docs/tutorial.md", 132)):
        assert f"{before}{rows} rows{after}" in " ".join((ROOT / page).read_text().split()), page


def test_the_embedded_model_is_as_large_as_is_said():
    from safetensors.numpy import load_file

    from qtarget.data.embedded import base_model_path

    millions = sum(x.size for x in load_file(base_model_path() / "model.safetensors").values()) / 1e6
    for page, words in (
        ("src/qtarget/cli/demo.py", "parameters"),
        ("docs/staleness.md", "parameters"),
        ("docs/crossfit.md", "weights"),
    ):
        assert f"{millions:.1f} million {words}" in (ROOT / page).read_text(), page


def test_the_python_start_runs(tmp_path):
    [code] = blocks("python")
    assert len(code.splitlines()) <= 8
    short = code.replace("bf16=False)", "bf16=False, max_steps=3)")
    assert short != code
    done = subprocess.run([sys.executable, "-c", short], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/first").is_dir()


@pytest.mark.slow
def test_a_verdict_on_rows(tmp_path, monkeypatch):
    """As written, but for the size."""
    from typer.testing import CliRunner

    from qtarget.cli.app import app
    from qtarget.data.embedded import base_model_path, load_demonstrations

    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(base_model_path())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in load_demonstrations("train")[:80]))
    few = ["--max_steps", "2"]
    small = {"compare": [*few, "--seeds", "1", "--rates", "1", "--at-once", "1", "--max-new-tokens", "4"], "train": few}
    commands = [shlex.split(line, comments=True) for line in blocks("bash")[2].splitlines()]
    assert [command[1] for command in commands] == ["init", "compare", "train"]
    for command in commands:
        done = CliRunner().invoke(app, [*command[1:], *small.get(command[1], [])], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    [page] = tmp_path.glob("runs/run/*-compare/comparison.html")
    assert "sft" in page.read_text()
    assert (tmp_path / "runs/run/consensus/model.safetensors").is_file()


def test_the_yaml_start_has_keys_that_are_there(tmp_path, monkeypatch):
    from qtarget.cli.options.config import load_config
    from qtarget.data.embedded import base_model_path

    [text] = blocks("yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(base_model_path())
    for name in ("run.yaml", "run.train.jsonl", "run.validation.jsonl"):
        (tmp_path / name).write_text(text)
    config = load_config(tmp_path / "run.yaml", ["--use_cpu", "true", "--bf16", "false"])
    assert (config.training.target, config.training.filter, config.training.learning_rate) == (
        "consensus",
        "auto",
        1e-3,
    )


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    commands = [line.split("#")[0].split() for line in blocks("bash")[1].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for name in ("demo", "test", "docs"))


@pytest.mark.slow
def test_benchmark_commands_run(tmp_path, monkeypatch):
    """Of docs/performance.md, as written, but for the size."""
    from typer.testing import CliRunner

    from qtarget.benchmarks.speed import losses as speed
    from qtarget.benchmarks.speed import memory
    from qtarget.cli.app import app

    monkeypatch.setattr(memory, "MEMORY", ("sft",))
    monkeypatch.setattr(speed, "compile_obstacle", lambda device: "the annotations' checker is on")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/performance.md").read_text()
    [block] = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [c[1:3] for c in commands] == [["bench", "speed"]] * 2
    small = ["--tokens", "8", "--width", "8", "--vocab", "256", "--rounds", "1", "--threads", "1"]
    for command in commands:
        result = CliRunner().invoke(app, [*command[1:], *small], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"speed.json", "memory.json"}
