"""The bad inputs: good rows, a model, a run and caches, every damage of each, and the command lines that meet it."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from attack_models import MODELS, damaged_model
from attack_options import CACHE_DAMAGES, EVALUATE, KEYS, OPTIONS, YAML

from qtarget.data.embedded import base_model_path

REFUSED = frozenset({2})
FINDINGS = frozenset({1, 2})
"""``audit-data`` ends with 1 where it found errors in the rows."""
SERVE_SECONDS = 20.0
"""``serve`` loads its model in a fresh process, whose imports count."""
Run = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Case:
    """A command line that must be refused.

    Attributes:
        kind: what is bad.
        name: which one, with its verb.
        command: without the program's name.
        codes: exit codes that are a refusal.
        seconds: within which it must be refused.
    """

    kind: str
    name: str
    command: tuple[str, ...]
    codes: frozenset[int] = REFUSED
    seconds: float = 5.0


def text_lines(*rows: Any) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def said(*messages: Any) -> bytes:
    """One row of messages."""
    return text_lines({"messages": list(messages)})


GOOD_ROW = {"prompt": "Instruction: Find the largest of 7 5 2.\nResponse:\n", "completion": "It is [7].", "answer": "7"}
USER, ASSISTANT = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}
ROWS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "blank lines": b"\n\n  \n",
    "no JSON": b"prompt: hello\n",
    "cut off": text_lines(GOOD_ROW) + b'{"prompt": "a", "compl',
    "nested 100,000 deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b', "completion": "b"}\n',
    "objects 100,000 deep": b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}\n",
    "integer of 5,000 digits": b'{"prompt": ' + b"9" * 5000 + b', "completion": "b"}\n',
    "UTF-16": text_lines(GOOD_ROW).decode().encode("utf-16"),
    "latin-1": '{"prompt": "caf\xe9", "completion": "b"}\n'.encode("latin-1"),
    "binary": bytes(range(256)) * 8,
    "zeros": b"\0" * 4096,
    "numbers": b"1\n2\n",
    "strings": b'"a"\n"b"\n',
    "lists": b'["a", "b"]\n',
    "null": b"null\n",
    "no known column": text_lines({"foo": "a", "bar": "b"}),
    "prompt null": text_lines({"prompt": None, "completion": "b"}),
    "prompt a number": text_lines({"prompt": 5, "completion": "b"}),
    "completion missing": text_lines({"prompt": "a"}),
    "completion a list of numbers": text_lines({"prompt": "a", "completion": [1, 2]}),
    "completion an object": text_lines({"prompt": "a", "completion": {"text": "b"}}),
    "text null": text_lines({"text": None}),
    "no messages": said(),
    "messages a string": text_lines({"messages": "hello"}),
    "messages of strings": said("hello", "you"),
    "message without role": said({"content": "a"}, ASSISTANT),
    "message without content": said(USER, {"role": "assistant"}),
    "unknown role": said({"role": "wizard", "content": "a"}, ASSISTANT),
    "role a number": said({"role": 5, "content": "a"}, ASSISTANT),
    "content a number": said({"role": "user", "content": 5}, ASSISTANT),
    "types that change": text_lines(GOOD_ROW, GOOD_ROW | {"prompt": 7}),
    "formats that change": text_lines(GOOD_ROW, {"messages": [USER, ASSISTANT]}),
    "lone surrogate": b'{"prompt": "\\ud800", "completion": "b"}\n',
}
WEIGHTS: dict[str, bytes] = {
    name: text_lines(*[GOOD_ROW | {"weight": value}] * 4)
    for name, value in (("negative", -1.0), ("NaN", float("nan")), ("infinite", float("inf")), ("text", "much"))
} | {
    "a list too short": text_lines(*[GOOD_ROW | {"loss_weights": [1.0]}] * 4),
    "weights of text": text_lines(*[GOOD_ROW | {"loss_weights": "abc"}] * 4),
    "negative weights": text_lines(*[GOOD_ROW | {"loss_weights": [-1.0, 2.0]}] * 4),
    "spans of text": text_lines(*[GOOD_ROW | {"weight_spans": "abc"}] * 4),
}
MEGABYTES = 640
"""That the packed files of a few kilobytes hold."""


def shared_texts() -> bytes:
    """A Parquet file of rows that all are one text of a megabyte, stored once."""
    held = io.BytesIO()
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * MEGABYTES, pa.int32()), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"text": texts}), held)
    return held.getvalue()


def packed_texts() -> bytes:
    """The same texts in an Arrow file, packed."""
    held, table = io.BytesIO(), pa.table({"text": pa.array(["x" * 2**20] * 16)})
    with pa.ipc.new_file(held, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for _ in range(MEGABYTES // 16):
            writer.write_table(table)
    return held.getvalue()


OTHER_FILES: dict[str, tuple[str, bytes]] = {
    "gz damaged": ("rows.jsonl.gz", b"\x1f\x8b\x08\0 and no more"),
    "parquet damaged": ("rows.parquet", b"PAR1 and nothing else PAR1"),
    "parquet empty": ("rows.parquet", b""),
    "csv of binary": ("rows.csv", bytes(range(256)) * 4),
    "csv without columns": ("rows.csv", b"\n\n"),
    "json of one number": ("rows.json", b"5"),
    "json cut off": ("rows.json", b'[{"prompt": "a"'),
    "unknown ending": ("rows.xyz", b"hello"),
    "gz of 640 MB": ("rows.jsonl.gz", gzip.compress(b" " * 2**20) * MEGABYTES),
    "zst of 640 MB": ("rows.jsonl.zst", pa.compress(b" " * 2**20, codec="zstd", asbytes=True) * MEGABYTES),
    "parquet of 640 MB": ("rows.parquet", shared_texts()),
    "arrow of 640 MB": ("rows.arrow", packed_texts()),
    "a zip": ("rows.zip", b"PK\x03\x04 and nothing else"),
}


class Place:
    """A folder with everything good, and what is bad beside it.

    Args:
        folder: an empty one.
        run: runs a good command line; its exit code.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder, self.run = folder, run
        self.good, self.bad, self.out = (folder / name for name in ("good", "bad", "out"))
        for made in (self.good, self.bad, self.out):
            made.mkdir()
        self.model = self.good / "model"
        shutil.copytree(base_model_path(), self.model)
        self.rows = self._rows("rows", 0)
        self.other_rows = self._rows("other", 5)
        (self.good / "key").write_bytes(bytes(range(64)))
        self.config = self.write_config("run", self.good)
        self.cache, self.other_cache, self.trained = (self.good / n for n in ("cache", "other_cache", "trained"))
        self.count = 0

    def _rows(self, name: str, start: int) -> Path:
        path = self.good / f"{name}.jsonl"
        path.write_bytes(
            text_lines(
                *[
                    {"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "answer": f"{i + 1}"}
                    for i in range(start, start + 8)
                ]
            )
        )
        return path

    def write_config(self, name: str, folder: Path, **keys: Any) -> Path:
        """A config of a short run, with other keys."""
        settings = {
            "model_name_or_path": str(self.model), "train_file": str(self.rows), "output_dir": str(self.out / name),
            "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "bf16": False, "use_cpu": True, "activation_checkpointing": False, "dataloader_pin_memory": False,
        } | keys  # fmt: skip
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    def score_and_train(self) -> None:
        """Two caches and a run; everything good is there then."""
        for command in (
            ("score", self.config, "--output", self.cache, "--top-k", "4"),
            ("score", self.config, "--train_file", self.other_rows, "--output", self.other_cache, "--top-k", "4"),
            ("train", self.config, "--output_dir", self.trained),
        ):
            code = self.run([str(word) for word in command])
            if code:
                raise RuntimeError(f"a good command line ended with {code}: {command}")

    def new(self, name: str) -> str:
        """A path for an output that nothing else writes."""
        self.count += 1
        return str(self.out / f"{self.count}-{name}")

    def bad_file(self, name: str, content: bytes | None) -> Path:
        """A bad file; None: a path where none is."""
        self.count += 1
        folder = self.bad / f"{self.count}"
        folder.mkdir()
        if content is not None:
            (folder / name).write_bytes(content)
        return folder / name

    def words(self, command: str) -> tuple[str, ...]:
        """A command line of the tables: places by name, ``{out}`` for a new one."""
        places = {
            "config": self.config, "rows": self.rows, "other_rows": self.other_rows, "model": self.model, "good": self.good,
            "cache": self.cache, "other_cache": self.other_cache, "trained": self.trained, "key": self.good / "key",
        }  # fmt: skip
        return tuple(word.format(out=self.new("out"), **places) for word in command.split())


def row_cases(place: Place) -> list[Case]:
    """Bad rows, in every verb that reads rows."""
    files = [(name, place.bad_file("rows.jsonl", content)) for name, content in ROWS.items()]
    files += [(name, place.bad_file(file, content)) for name, (file, content) in OTHER_FILES.items()]
    files.append(("a folder", place.bad))
    out = []
    for number, (name, file) in enumerate(files):
        for verb in ("train", ("score", "inspect")[number % 2], "audit-data"):
            words = [verb, str(place.config), "--train_file", str(file)]
            words += [
                "--output_dir" if verb == "train" else "--json" if verb == "audit-data" else "--output",
                place.new("o.json"),
            ]
            out.append(Case("rows", f"{name}: {verb}", tuple(words), FINDINGS if verb == "audit-data" else REFUSED))
        out.append(Case("rows", f"{name}: convert", ("convert", str(file), place.new("o.jsonl"))))
        noise = ("noise", str(file), place.new("o.jsonl"), "--kind", "random_tokens", "--rate", "0.5")
        if number % 2:
            out.append(Case("rows", f"{name}: noise", noise))
        evaluate = ("evaluate", str(place.model), "--data", str(file), "--output", place.new("o.json"), "--limit", "2")
        if not number % 2:
            out.append(Case("rows", f"{name}: evaluate", evaluate))
    for name, content in WEIGHTS.items():
        file = place.bad_file("rows.jsonl", content)
        words = ("train", str(place.config), "--train_file", str(file), "--output_dir", place.new("o"))
        out.append(Case("weights", f"{name}: train", words))
    return out


def config_cases(place: Place) -> list[Case]:
    """Broken YAML, and values that no run can have."""
    out = []
    for name, content in YAML.items():
        file = place.bad_file("run.yaml", content)
        for verb in ("train", ("score", "inspect")[len(out) % 4 // 2]):
            words = (verb, str(file), "--output_dir" if verb == "train" else "--output", place.new("o"))
            out.append(Case("YAML", f"{name}: {verb}", words))
    for key, value in KEYS:
        word = value.format(good=place.good, model=place.model, cache=place.cache, other_cache=place.other_cache)
        words = ("train", str(place.config), "--output_dir", place.new("o"), *word.split(" ")) if key == "+" else (
            "train", str(place.config), "--output_dir", place.new("o"), f"--{key}={word}")  # fmt: skip
        out.append(Case("keys", f"{key}={value}"[:60], words))
    return out


def model_cases(place: Place) -> list[Case]:
    """Models that are not whole, in every verb that loads one."""
    out = []
    for name, damage in MODELS.items():
        model = str(damaged_model(place.model, place.bad / f"model {len(out)}", damage))
        for verb in ("train", ("score", "inspect")[len(out) % 2]):
            words = (verb, str(place.config), "--model_name_or_path", model)
            words += ("--output_dir" if verb == "train" else "--output", place.new("o"))
            out.append(Case("models", f"{name}: {verb}", words))
        data = ("--data", str(place.rows), "--output", place.new("o.json"), "--limit", "2")
        if len(out) % 3:
            out.append(Case("models", f"{name}: evaluate", ("evaluate", model, *data)))
        out.append(Case("models", f"{name}: serve", ("serve", model, "--port", "0"), seconds=SERVE_SECONDS))
    return out


def cache_cases(place: Place) -> list[Case]:
    """Caches that are damaged, in every verb that reads one."""
    out = []
    for name, damage in CACHE_DAMAGES.items():
        cache = place.bad / f"cache {len(out)}"
        shutil.copytree(place.cache, cache)
        damage(cache)
        verify = ("cache", "verify", str(cache))
        export = ("cache", "export", str(cache), "verl", "--config", str(place.config), "--output", place.new("o"))
        merge = ("cache", "merge", str(cache), str(place.other_cache), "--output", place.new("o"))
        train = (
            "train",
            str(place.config),
            "--target",
            "asft",
            "--reference_cache",
            str(cache),
            "--output_dir",
            place.new("o"),
        )
        out += [
            Case("caches", f"{name}: {' '.join(c[:2]) if c[0] == 'cache' else c[0]}", c)
            for c in (verify, export, merge, train)
        ]
    return out


def option_cases(place: Place) -> list[Case]:
    """Options and arguments that make no sense, of every verb."""
    return [Case("options", text[:70], place.words(text)) for text in (*OPTIONS, *EVALUATE)]


def all_cases(place: Place) -> list[Case]:
    """About 650; written in folders beside the good ones."""
    makers = (option_cases, config_cases, row_cases, cache_cases, model_cases)
    return [case for make in makers for case in make(place)]
