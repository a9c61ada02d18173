"""docs/crossfit.md: its config and commands run; wrong uses of the options say what and how; an interrupt says how to go on."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("trl")

from qtarget.cli.bench.app import app
from qtarget.cli.crossfit import how_to_go_on
from qtarget.cli.main import run
from qtarget.cli.score import how_to_go_on as of_shards
from tests import ROOT

PAGE = (ROOT / "docs/crossfit.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


LABELS = {
    "sft, marks left out": ("*oracle: marks left out*", "*oracle: marked tokens left out*"),
    "sft, marked rows left out": ("*oracle: marked rows left out*",),
    "sft, filtered rows": ("sft, filtered rows", "sft, filtered rows (tuned)", "sft, filtered rows (0.7 kept, tuned)"),
}
EQUAL = {name: (f"{name}, 187 steps more",) for name in ("sft", "sft, filtered rows")}


POINTS = {
    "none: 40 % random tokens": "none random_tokens 0.4", "none: 40 % wrong answer": "none wrong_answer 0.4",
    "most: clean": "most random_tokens 0.0", "most: 40 % wrong answer": "most wrong_answer 0.4",
}  # fmt: skip
COGS = {
    "40 % wrong answer": "most wrong_answer 0.4", "40 % another row's response": "most other_response 0.4",
    "40 % random tokens": "most random_tokens 0.4", "clean": "most random_tokens 0.0",
}  # fmt: skip
KINDS = {
    "none: 20 % wrong answer": "none wrong_answer 0.2", "most: 40 % truncation": "most truncation 0.4",
    "most: 40 % boilerplate": "most boilerplate 0.4", "none: 40 % contradictory duplicate": "none contradictory_duplicate 0.4",
    "none: 20 % random tokens": "none random_tokens 0.2",
}  # fmt: skip
SELECTION = {
    "COGS, 40 % wrong answer": "most wrong_answer 0.4", "COGS, 40 % another row's response": "most other_response 0.4",
}  # fmt: skip
CAESAR = {"caesar, most, 40 % wrong answer": "most wrong_answer 0.4"}
LISTOPS = {"most (untrained 84.0)": "most wrong_answer 0.4", "none (untrained 0.0)": "none wrong_answer 0.4"}


def tables() -> list[list[list[str]]]:
    found = re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in one.splitlines()] for one in found]


@pytest.mark.parametrize(
    ("name", "labels", "points", "contenders"),
    [
        ("noise_crossfit", LABELS, POINTS, 8), ("noise_equal", EQUAL, POINTS, 2), ("noise_cogs_tuned", LABELS, COGS, 8),
        ("noise_listops_tuned", LABELS, LISTOPS, 10), ("noise_kinds_tuned", LABELS, KINDS, 8),
        ("noise_cogs_selection", LABELS, SELECTION, 3), ("noise_caesar_tuned", LABELS, CAESAR, 8),
    ],
)  # fmt: skip
def test_the_tables_of_tuned_points_are_the_result_files(name, labels, points, contenders):
    (table,) = [
        one for one in tables() if one[0][1:] == list(points) and "(" in one[2][1] and len(one) == contenders + 2
    ]
    cells = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["cells"]
    assert len(cells) == len(points)
    for cell in cells:
        column = 1 + list(points.values()).index(f"{cell['base']} {cell['kind']} {cell['rate']}")
        shown = {line[0]: line[column] for line in table[2:] if line[column]}
        assert len(shown) == len(cell["runs"])
        for method, runs in cell["runs"].items():
            found = [run["accuracy_percent"] for run in runs]
            said = f"{sum(found) / len(found):.1f} ({min(found):.1f} .. {max(found):.1f})"
            assert [shown[label] for label in labels.get(method, (method,)) if label in shown] == [said]


@pytest.mark.nightly
def test_the_config_and_the_commands_run(workspace, tmp_path, tiny_model, monkeypatch, capsys):
    pytest.importorskip("ray.data")
    workspace()  # writes rows.jsonl
    monkeypatch.chdir(tmp_path)
    (config,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(config.replace("path/to/base", str(tiny_model)))
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert [line[1] for line in lines] == ["score", "cache", "score", "train", "score", "train", "bench"]
    *lines, _ = lines  # the benchmark takes minutes: its options are checked below
    for line in lines:
        assert called(*line[1:]) == 0, line
    told = json.loads((tmp_path / "witness/manifest.json").read_text())["crossfit"]
    assert (told["folds"], told["rows"], told["recipe"]["rank"], told["recipe"]["learning_rate"]) == (
        2,
        [6, 6],
        16,
        1e-3,
    )
    side_by_side = json.loads((tmp_path / "from-ray/manifest.json").read_text())["crossfit"]
    assert side_by_side | {"copies": None} == told | {"copies": None}
    assert called("cache", "verify", "witness") == 0
    assert called("cache", "verify", "witness", "--model", str(tiny_model), "--config", "run.yaml") == 2
    assert "judged by 2 copies, none of which is kept" in " ".join(capsys.readouterr().err.split())
    for folder, target in (("surprise", "prior_surprise"), ("consensus", "crossfit_consensus")):
        summary = json.loads((tmp_path / "runs" / folder / "train_summary.json").read_text())
        assert (summary["target"], summary["steps"]) == (target, 8)


@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        ({"witness": "w"}, ["--crossfit", "2", "--role", "teacher"], "leave --role and --known out"),
        ({"witness": "w"}, ["--crossfit", "2", "--engine", "vllm"], "expected --engine local or --engine ray"),
        (
            {"witness": "w"},
            ["--crossfit", "2", "--engine", "mosec", "--url", "http://localhost:1"],
            "expected --engine local or --engine ray",
        ),
        ({"witness": "w"}, ["--crossfit", "1"], "crossfit"),
        ({"witness": "w"}, ["--crossfit", "2", "--crossfit-rate", "nan"], "positive rate"),
        ({"witness": "w"}, ["--crossfit", "2", "--crossfit-rate", "0"], "positive rate"),
        ({"witness": "w"}, ["--crossfit", "13"], "12 different prompts for 13 folds"),
    ],
)
def test_wrong_uses_say_what_and_how(workspace, capsys, keys, options, words):
    assert called("score", workspace(**keys), *options) == 2
    errors = capsys.readouterr().err
    assert words in " ".join(errors.replace("│", " ").split())
    assert "Traceback" not in errors


def test_an_interrupt_says_what_is_safe(tmp_path):
    assert how_to_go_on(tmp_path, 3, of_shards).startswith("0 of 3 copies are trained")
    (tmp_path / ".copies/fold-0").mkdir(parents=True)
    (tmp_path / ".copies/fold-0/copy.json").write_text("{}")
    assert how_to_go_on(tmp_path, 3, of_shards).startswith("1 of 3 copies are trained")
    (tmp_path / "plan.json").write_text(json.dumps({"shards": [1, 2]}))
    assert how_to_go_on(tmp_path, 3, of_shards).startswith("0 of 2 shards are finished")


def test_the_benchmark_of_the_page_is_the_small_one_with_steps_tuned(monkeypatch, tmp_path):
    from qtarget.benchmarks.noise import bench

    class Stop(Exception):
        pass

    def run_noise(config, output, **_):
        found.append((config, output))
        raise Stop

    found = []
    monkeypatch.setattr(bench, "run_noise", run_noise)
    monkeypatch.chdir(tmp_path)
    line = shlex.split(blocks("sh")[-1])
    ended = CliRunner().invoke(app, line[2:])
    assert isinstance(ended.exception, Stop), ended.output
    ((config, output),) = found
    assert (config.steps_grid, config.seeds, str(output)) == ((40, 120), 5, "runs/noise_crossfit.json")
    assert {"sft", "crossfit_consensus", "sft, rows by witness", "sft, marks left out"} <= set(config.names)


def test_the_page_names_every_option_and_its_default(workspace):
    import inspect

    from qtarget.cli.score import score

    given = {name: p.default for name, p in inspect.signature(score).parameters.items() if name.startswith("crossfit_")}
    for name, default in given.items():
        row = next(line for line in PAGE.splitlines() if f"`--{name.replace('_', '-')}`" in line)
        shown = {True: "on", False: "off"}.get(default) if isinstance(default, bool) else None
        assert shown is None or f"| {shown} |" in row
        assert default is None or shown or f"{default:g}" in row
    assert yaml.safe_load(blocks("yaml")[0])["witness"] == "witness"


@pytest.mark.parametrize("task", ["cogs", "listops", "caesar"])
def test_the_table_of_fresh_tasks_is_the_result_files(task):
    results = json.loads((ROOT / f"benchmarks/results/noise_{task}.json").read_text())
    names = (
        "sft", "sft, marked rows left out", "crossfit_consensus", "sft, rows by witness", "crossfit_consensus, rows by witness"
    )  # fmt: skip
    for cell in results["cells"]:
        kind = f"{100 * cell['rate']:g} % {cell['kind'].replace('_', ' ')}" if cell["rate"] else "clean"
        (line,) = [row for row in PAGE.splitlines() if row.startswith(f"| {task}, {cell['base']}, {kind} |")]
        shown = [part.strip().split(" ")[0] for part in line.strip("|").split("|")][2:]
        for name, text in zip(names, shown, strict=True):
            runs = cell["runs"].get(name)
            assert (text == "") == (runs is None)
            assert runs is None or float(text) == pytest.approx(
                sum(run["accuracy_percent"] for run in runs) / len(runs), abs=0.05
            )


def test_the_table_of_recipes_is_the_result_file():
    points = json.loads((ROOT / "benchmarks/results/copies.json").read_text())["points"]
    found = {(p["noise"], c["steps"], c["rate"]): c for p in points for c in p["copies"] if p["rows"] == 90}
    lines = [row for row in PAGE.splitlines() if re.match(r"\| [0-9]+, 0\.00", row)]
    assert len(lines) > 5
    for line in lines:
        recipe, *cells = [part.strip() for part in line.strip("|").split("|")]
        steps, rate = re.findall(r"[0-9.]+", recipe)[:2]
        for noise, cell in zip((0.0, 0.4), cells, strict=True):
            one = found.get((noise, int(steps), float(rate)))
            assert cell == ("" if one is None else f"{one['nll']:.2f} ({one['row_unexpected']:+.1f})")
