"""The official checks of IFEval, offline, and a real model's answers under them: `make real`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from qtarget.benchmarks.real import instructions
from qtarget.benchmarks.real import model as real
from qtarget.benchmarks.real.bench import SIZES, run_real
from qtarget.benchmarks.real.results import real_table
from qtarget.benchmarks.start import Start
from qtarget.core.errors import MissingDependencyError
from tests import ROOT, SHARED

try:
    instructions.official_checks()
    MISSING = "" if real.SMOLLM2.is_installed else f"not installed: {real.SMOLLM2.install}"
except MissingDependencyError as error:
    MISSING = str(error)
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.skipif(
        not (SHARED / instructions.FILE).is_file(), reason=f"no prompts at {SHARED / instructions.FILE}"
    ),
]
RESULTS = ROOT / "benchmarks/results/ifeval_smollm2.json"

OFFLINE = """
import socket, sys

def refuse(*_, **__):
    raise OSError("the network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from qtarget.benchmarks.real.instructions import followed

row = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
       "kwargs": [{}, {"relation": "at least", "num_sentences": 3}]}
print(followed([row, row, row], ["Sure, here it is:\\nOne. Two. Three.", "One. Two. Three.", "Dr. Smith came, late."]))
"""


def test_the_checks_load_and_judge_without_a_network():
    """A sentence splitter that knows no abbreviation, or none at all, would find other sentences."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1].replace("'", '"'))
    # the first line is forgiven by the loose measures alone; "Dr." ends no sentence
    assert found == {
        "prompt_strict": [0, 1, 0], "instruction_strict": [1, 2, 0], "prompt_loose": [1, 1, 0], "instruction_loose": [2, 2, 0]
    }  # fmt: skip


def test_published_answers_are_judged_again_to_the_same_numbers():
    """The language detector draws at random; with its seed every answer gets the same verdict each time."""
    published, rows = json.loads(RESULTS.read_text()), instructions.instruction_rows(SHARED)
    longest = max(published["lengths"], key=int)
    found = instructions.followed(rows, published["answers"])
    assert found == {name: published["lengths"][longest][name] for name in instructions.MEASURES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return real.prepared(tmp_path_factory.mktemp("real") / "smollm2")


def test_a_bench_measures_it_for_the_untrained_and_the_trained(folder, tmp_path):
    config = SIZES["quick"].with_start(Start(str(folder), learning_rate=1e-3), SHARED, 1)
    scope = replace(config.scope, train_rows=32, test_rows=8, texts=2)
    config = replace(config, noise=replace(config.noise, names=("sft",), steps=2), scope=scope)
    found = run_real(config, tmp_path / "n.json", resume=False, progress=lambda *_: None)
    asked = found["instructions"]["asked"]
    (before,), (after,) = ([one["instructions"] for one in some] for some in (
        found["untrained"].values(), found["cells"][0]["runs"]["sft"]))  # fmt: skip
    for said in (before, after):
        assert all(len(values) == len(asked) == config.scope.prompts for values in said.values())
        assert all(0 <= some <= most for some, most in zip(said["instruction_strict"], asked, strict=True))
        assert all(a <= b for a, b in zip(said["prompt_strict"], said["prompt_loose"], strict=True))
    assert "IFEval): 4 prompts, answers cut at 32 tokens" in real_table(found)
