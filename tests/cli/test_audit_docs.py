"""docs/audit.md: its commands run, and its numbers are those of the result file."""

from __future__ import annotations

import json
import re
import shlex

import pytest

pytest.importorskip("typer")

from qtarget.cli.main import run
from tests import ROOT

PAGE = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks/results/audit_noise.json").read_text())


def commands() -> list[list[str]]:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [shlex.split(line)[1:] for line in block.splitlines()]
    return [[str(ROOT / word) if word.startswith(("src/", "examples/")) else word for word in line] for line in lines]


@pytest.mark.slow
def test_the_commands_run_and_find_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in commands():
        with pytest.raises(SystemExit) as ended:
            run(command)
        assert ended.value.code == 0
    audit = json.loads((tmp_path / "runs/known.json").read_text())
    (found,) = [f for f in audit["findings"] if f["check"] == "surprising_tokens"]
    rows = [json.loads(line) for line in (tmp_path / "runs/known.jsonl").read_text().splitlines()]
    noisy = [i for i, row in enumerate(rows) if row["noise_spans"]]
    assert (len(rows), len(noisy)) == (300, 15)
    assert found["count"] == 15
    assert found["rows"] == noisy[:5]
    assert {example["row"] for example in found["evidence"]["examples"]} <= set(noisy)
    assert found["message"] in PAGE


def test_the_table_is_the_result_file():
    table = {
        cells[0].strip("` "): cells[1:]
        for cells in (
            [c.strip() for c in line.strip("|").split("|")] for line in PAGE.splitlines() if line.count("|") == 7
        )
    }
    runs = {name.replace("_", " "): run for name, run in RESULTS["injected"].items()} | RESULTS["real"]
    real = json.loads((ROOT / "benchmarks/results/audit_smollm2.json").read_text())["smollm2"]
    runs |= {f"SmolLM2, `{name}": run for name, run in real.items()}
    for name, result in runs.items():
        first, rows, tokens, reported, labels = table[name]
        assert first == f"{result['favourite_share']:.0%}"
        assert float(rows) == pytest.approx(result["row_auc"]["mean_surprise"], abs=0.005)
        assert float(tokens.split()[0]) == pytest.approx(result["token_auc"]["surprise"], abs=0.005)
        for cell, part in ((reported, "surprising_rows"), (labels, "surprising_tokens")):
            count, rest = re.fullmatch(r"([\d,]+), (\S+) .*", cell).groups()  # pyright: ignore[reportOptionalMemberAccess]
            assert int(count.replace(",", "")) == result[part]["reported"]
            precision = result[part]["precision"]
            assert (rest == "-") if precision is None else float(rest) == pytest.approx(precision, abs=0.005)


def test_every_check_of_the_table_exists_in_the_source():
    listed = {
        name
        for cells in re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cells)
    }
    source = "".join(
        path.read_text(encoding="utf-8") for folder in ("data", "report", "cli", "integrations")
        for path in (ROOT / "src/qtarget" / folder).rglob("*.py")
    )  # fmt: skip
    checks = listed - set(RESULTS["real"])
    assert len(checks) >= 35
    assert all(f'"{name}"' in source for name in checks), sorted(n for n in checks if f'"{n}"' not in source)
