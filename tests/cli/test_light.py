"""The door is light: what is loaded for ``--help`` and errors in a config; the light check agrees with the full one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from qtarget.cli.options.config import DataConfig, build_config, field_types
from qtarget.cli.options.declared import declared_fields, declared_target
from qtarget.cli.options.early import CLASSES, check_settings
from qtarget.cli.options.settings import Setting, coerce
from qtarget.core.errors import QTargetError
from qtarget.registry import available_targets, hyperparameters, target_class
from tests import ROOT

HEAVY = ("torch", "numpy", "transformers", "trl", "datasets", "pyarrow", "matplotlib", "jinja2")


def run_fresh(arguments: list[str], folder: Path) -> tuple[str, list[str], float]:
    """What a verb says, which heavy packages it loaded, and its CPU seconds, in an interpreter of its own."""
    code = f"""
import atexit, json, sys, time
atexit.register(lambda: print("LOADED", json.dumps([[m for m in {HEAVY!r} if m in sys.modules], time.process_time()])))
from qtarget.cli.main import run
run({arguments!r})
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    loaded, seconds = json.loads(ended.stdout.rpartition("LOADED ")[2])
    return ended.stdout + ended.stderr, loaded, seconds


@pytest.mark.parametrize(
    "verb", [[], ["train"], ["score"], ["targets"], ["lens"], ["demo"], ["evaluate"], ["inspect"]], ids=str
)
def test_help_loads_no_torch(verb, tmp_path):
    said, loaded, seconds = run_fresh([*verb, "--help"], tmp_path)
    assert "Usage" in said and loaded == []
    assert seconds < 2  # 0.2 on the machine of the author; torch alone takes longer


def test_bare_import_loads_nothing_and_names_are_all_there(tmp_path):
    code = (
        "import sys, qtarget; assert 'torch' not in sys.modules\n"
        "assert set(qtarget.__all__) <= set(dir(qtarget)) and qtarget.__version__\n"
        "space = {}; exec('from qtarget import *', space)\n"
        "assert set(qtarget.__all__) <= set(space) and 'trl' not in sys.modules\n"
        "assert space['get_target'] is qtarget.get_target and vars(qtarget)['get_target'] is qtarget.get_target\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr


def test_type_checkers_see_the_names_that_are_served():
    """The imports for type checkers and the table of the lazy ones are two lists of one thing."""
    import ast

    import qtarget

    tree = ast.parse((ROOT / "src/qtarget/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {
        alias.name: f"{line.module}" for line in block.body if isinstance(line, ast.ImportFrom) for alias in line.names
    }
    assert declared == qtarget._LAZY
    assert set(declared) - set(qtarget.__all__) == {
        "QTargetConfig", "QTargetGRPOConfig", "QTargetGRPOTrainer", "QTargetTrainer",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "mine.py").write_text("raise SystemExit('imported too early')\n")
    return tmp_path


WRONG = {
    "learning_rat: 1": "did you mean learning_rate",
    "learning_rate: fast": "expected a number",
    "target: dftt": "did you mean dft",
    "target: p_power\ntarget_kwargs: {alhpa: 1}": "did you mean alpha",
    "target: dft+sft_kl\nkl_weight: 1": "write target_kwargs: {kl_weight",
    "loss_type: dft": "the loss is chosen by `target`",
    "lora_r: 0": "lora_r is 0, expected at least 1",
    "optim: adam": "optim is 'adam' in run.yaml, expected one of adamw_torch",
    "validation_file: row.jsonl": "did you mean rows.jsonl",
    "teacher: x/y\nteacher_cache: z": "both set; keep one",
    "tools_file: none.json": "tools_file: none.json is not a file",
    "dataset_name: a/b": "both are given",
    "loss_backend: fast": "expected one of auto",
    "weights_scale: none": "expected one of all, label",
    "target: mine:Own\nlerning_rate: 1": "did you mean learning_rate",
}


@pytest.mark.parametrize("text", WRONG)
def test_errors_in_a_config_come_before_torch(text, folder):
    (folder / "run.yaml").write_text(f"model_name_or_path: some/model\ntrain_file: rows.jsonl\nbf16: false\n{text}\n")
    said, loaded, seconds = run_fresh(["train", "run.yaml"], folder)
    assert WRONG[text] in said and loaded == [], (said, loaded)
    assert seconds < 3  # 0.4 on the machine of the author


@pytest.mark.parametrize("verb", [
    ["score", "run.yaml"], ["inspect", "run.yaml"], ["audit-data", "run.yaml"],
    ["cache", "export", "cache", "verl", "--config", "run.yaml", "--output", "out"],
    ["cache", "verify", "cache", "--config", "run.yaml", "--model", "some/model"],
], ids=" ".join)  # fmt: skip
def test_every_verb_with_a_config_says_so_early(verb, folder):
    (folder / "run.yaml").write_text("model_name_or_path: some/model\ntrain_file: rows.jsonl\nlearning_rat: 1\n")
    said, loaded, _ = run_fresh(verb, folder)
    assert "did you mean learning_rate" in said and set(loaded) <= {"numpy"}, (said, loaded)


# -- the light reading of TRL's classes agrees with the classes ---------------------------------------------------------


def heavy_fields():
    from trl import ModelConfig

    from qtarget.integrations.sft.config import QTargetConfig

    return [QTargetConfig, ModelConfig]


VALUES = (
    *(None, True, False, 0, 1, -1, 2.5, "text", "auto", "no", "steps", "yes", "1e-4", "{}", '{"a": 1}'),
    *([], ["a"], [1], {}, {"a": 1}),
)
"""Of every kind; each is given to every field."""


def verdict(key, value, hint, choices):
    try:
        return coerce(key, Setting(value, "run.yaml"), hint, choices)
    except QTargetError as error:
        return str(error)


def test_fields_types_and_defaults_are_those_of_the_classes():
    for known, cls in zip(CLASSES, heavy_fields(), strict=True):
        declared, real = declared_fields(*known), field_types(cls)
        assert list(declared) == list(real)
        for field in dataclasses.fields(cls):
            if field.init and declared[field.name].default is not dataclasses.MISSING:
                assert declared[field.name].default == field.default, field.name


def test_every_field_takes_and_refuses_what_the_class_does():
    """Refuses no value that the class takes; and takes one that it refuses only where a type is beyond its reading."""
    beyond = set()
    for known, cls in zip(CLASSES, heavy_fields(), strict=True):
        declared, real = declared_fields(*known), field_types(cls)
        for key, (hint, choices) in real.items():
            members = [m.value for o in getattr(hint, "__args__", (hint,)) if hasattr(o, "__members__") for m in o]
            for value in (*VALUES, *members, *(choices or ())):
                light, full = (
                    verdict(key, value, declared[key].hint, declared[key].choices),
                    verdict(key, value, hint, choices),
                )
                if light != full:
                    assert not (isinstance(light, str) and " is " in light and "expected" in light), (
                        key,
                        value,
                        light,
                        full,
                    )
                    beyond.add(key)
    assert beyond <= {"parallelism_config", "log_level", "log_level_replica"}


def test_what_the_full_check_takes_the_light_one_takes(tmp_path, monkeypatch):
    """All defaults of a run, written down and read again, and some that people write."""
    from qtarget.cli.options.config import resolved_settings

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    base = {"model_name_or_path": "some/model", "train_file": "rows.jsonl", "bf16": False, "output_dir": "out"}
    for more in (
        {}, {"target": "asft", "guard": True, "target_kwargs": {"kl_weight": 0.2}}, {"report_to": ["tensorboard"]},
        {"target": "dft+label_smoothing", "target_kwargs": '{"smoothing": 0.2}'}, {"lr_scheduler_type": "cosine", "use_peft": True},
        {"reference_model_name_or_path": "a/b", "teacher": "c/d"}, {"teacher": "http://localhost:1", "eval_strategy": "steps"},
    ):  # fmt: skip
        given = {key: Setting(value, "run.yaml") for key, value in (base | more).items()}
        run = build_config(given, tmp_path / "run.yaml")
        check_settings(given, tmp_path / "run.yaml")
        again = {
            key: Setting(value, "again.yaml")
            for key, value in yaml.safe_load(yaml.safe_dump(resolved_settings(run))).items()
        }
        if "teacher" not in more:  # a config that was read has the longer key beside it
            check_settings(again, tmp_path / "again.yaml")


def test_rows_of_our_own_class_are_read_from_itself():
    assert declared_fields("qtarget.cli.options.config", "DataConfig").keys() == field_types(DataConfig).keys()


def test_hyper_parameters_are_read_without_importing_their_target():
    for name in available_targets():
        found = {key: field.default for key, field in declared_target(name).items()}
        assert found == hyperparameters(target_class(name)), name


def test_a_class_that_moved_is_left_to_the_full_check(tmp_path, monkeypatch):
    import qtarget.cli.options.early as early

    monkeypatch.setattr(early, "CLASSES", (("trl.nowhere", "SFTConfig"),))
    early.check_settings({"nonsense": Setting(1, "run.yaml")}, tmp_path / "run.yaml")
