"""What other libraries raise, through the command line: one block each, no traceback on the screen."""

from __future__ import annotations

import errno
import gzip
import importlib
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import jinja2
import pytest
import yaml

from qtarget.cli import boundary, main
from qtarget.core.errors import DataError


def stopped(raise_it, capsys, monkeypatch, *arguments: str) -> tuple[str, int]:
    """Standard error and exit code of a verb that does ``raise_it``."""
    monkeypatch.setattr(main, "_app", lambda: lambda *_, **__: raise_it())
    with pytest.raises(SystemExit) as exit_:
        main.run(["train", "run.yaml", *arguments])
    return capsys.readouterr().err, exit_.value.code


def raising(error):
    def raise_it():
        raise error

    return raise_it


def cut_parquet(folder: Path):
    import pyarrow.parquet

    (folder / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    return lambda: pyarrow.parquet.read_table(folder / "rows.parquet")


def cut_safetensors(folder: Path):
    from safetensors import safe_open

    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    return lambda: safe_open(folder / "model.safetensors", "pt")


def broken_tokenizer(folder: Path):
    from tokenizers import Tokenizer

    return lambda: Tokenizer.from_str('{"version": "no tokenizer"}')


def nested_json(folder: Path):
    return lambda: json.loads("[" * 100_000)


CASES = {
    "torch's disk": (
        lambda f: raising(RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos 64 vs 0")),
        "a file could not be written",
        "free space",
    ),
    "template": (lambda f: lambda: jinja2.Template("{{ a.b.c }}").render(), "chat template", "chat_template_path"),
    "parquet": (cut_parquet, "an Arrow or Parquet file cannot be read", "again"),
    "safetensors": (cut_safetensors, "a .safetensors file is damaged", "again"),
    "tokenizer": (broken_tokenizer, "tokenizers refuses|JSON", "debug|again"),
    "recursion": (nested_json, "nested too deep", "flatten"),
    "digits": (lambda f: lambda: int("9" * 5000), "thousands of digits", "quote"),
    "yaml": (lambda f: lambda: yaml.safe_load("a: [1"), "a YAML file is broken", "line"),
    "gzip": (lambda f: lambda: gzip.decompress(b"not gzip at all"), "a .gz file is damaged", "again"),
    "zlib": (lambda f: lambda: zlib.decompress(b"no"), "a compressed file is damaged", "again"),
    "memory": (lambda f: raising(MemoryError()), "not enough memory", "max_length"),
    "nothing there": (lambda f: (f / "absent").read_text, "is not there", "check the path"),
}


@pytest.mark.parametrize("name", CASES)
def test_foreign_errors_are_one_block(name, tmp_path, capsys, monkeypatch) -> None:
    make, what, step = CASES[name]
    text, code = stopped(make(tmp_path), capsys, monkeypatch)
    assert code == 2
    assert "Traceback" not in text and len(text.splitlines()) <= 6
    first, *_ = text.splitlines()
    assert first.startswith("`qtarget train run.yaml` stopped: ")
    assert re.search(what, text) and re.search(step, text), text
    path = text.rsplit("the traceback is in ", 1)[1].strip().rstrip(")")
    assert "Traceback (most recent call last)" in Path(path).read_text()


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.ENOSPC, "free space or fix the folder"),
        (errno.EDQUOT, "free space or fix the folder"),
        (errno.EROFS, "choose another folder"),
    ],
)
def test_what_the_disk_refuses_is_a_storage_error(number, step, capsys, monkeypatch) -> None:
    text, code = stopped(raising(OSError(number, os.strerror(number), "runs/a")), capsys, monkeypatch)
    assert code == 2
    assert text.startswith(f"StorageError: cannot write runs/a: {os.strerror(number)}; {step}")


def test_an_error_of_a_library_is_its_refusal(capsys, monkeypatch) -> None:
    def refuse():
        from trl import SFTConfig

        SFTConfig(
            output_dir="x", packing=True, packing_strategy="bfd", eval_strategy="steps", eval_steps=None, bf16=True
        )

    text, code = stopped(refuse, capsys, monkeypatch)
    assert code == 2 and re.search(r"stopped: (transformers|trl|torch) refuses", text), text


def test_a_fault_of_ours_is_one_line_and_a_file(capsys, monkeypatch) -> None:
    text, code = stopped(lambda: {}["missing"], capsys, monkeypatch, "--learning_rate", "1e-4")
    assert code == 1
    first, second = text.splitlines()
    assert first.startswith(
        "`qtarget train run.yaml --learning_rate 1e-4` stopped with an error that qtarget did not foresee"
    )
    assert "KeyError" in Path(second.split(" is in ")[1]).read_text()


def test_notes_say_where(capsys, monkeypatch) -> None:
    error = DataError("weight='x'; expected a number")
    error.add_note("row 12 of rows.jsonl")
    text, code = stopped(raising(error), capsys, monkeypatch)
    assert code == 2 and "  where  row 12 of rows.jsonl" in text


def test_debug_keeps_the_traceback(monkeypatch) -> None:
    monkeypatch.setattr(main, "_app", lambda: lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError):
        main.run(["--debug", "targets"])


def test_a_reader_that_left_is_no_error(tmp_path) -> None:
    code = f"{sys.executable} -m qtarget.cli.main targets | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and done.returncode in (0, 141)


def test_every_class_of_the_table_exists() -> None:
    for name in boundary.BY_CLASS:
        module, _, attribute = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), attribute), BaseException), name


def test_an_error_begins_a_line_of_its_own_below_a_bar(capsys, monkeypatch):
    from tqdm.auto import tqdm

    bar = tqdm(total=2)
    try:
        text, code = stopped(raising(DataError("the disk is full")), capsys, monkeypatch)
    finally:
        bar.close()
    assert code == 2 and re.search(r"(?m)^DataError: the disk is full", text)
