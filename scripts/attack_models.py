"""Models that are not whole: one damage each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]


def damaged_model(good: Path, to: Path, damage: Damage) -> Path:
    """A copy of a model, damaged."""
    shutil.copytree(good, to)
    damage(to)
    return to


def without(name: str) -> Damage:
    """A file is missing."""
    return lambda folder: (folder / name).unlink()


def holding(name: str, content: bytes) -> Damage:
    """A file holds something else."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def with_keys(name: str, **keys: Any) -> Damage:
    """A JSON file says something else."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | keys))

    return damage


def cut(name: str, share: float) -> Damage:
    """A file is cut off."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def weights(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Other weights."""

    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


def gone(folder: Path) -> None:
    """Nothing is there."""
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    """An empty folder."""
    gone(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    """A file where the folder should be."""
    gone(folder)
    folder.write_text("a model, said somebody")


def a_folder(name: str) -> Damage:
    """A folder where a file should be."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


NORM = "model.layers.0.input_layernorm.weight"
NESTED = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
MODELS: dict[str, Damage] = {
    "missing": gone,
    "empty folder": empty,
    "a file": a_file,
    "config missing": without("config.json"),
    "config empty": holding("config.json", b""),
    "config broken": holding("config.json", b"{"),
    "config nested 100,000 deep": holding("config.json", NESTED),
    "config a list": holding("config.json", b"[]"),
    "config binary": holding("config.json", bytes(range(256))),
    "config a folder": a_folder("config.json"),
    "unknown model type": with_keys("config.json", model_type="nonsense"),
    "layers that disagree": with_keys("config.json", num_hidden_layers=7),
    "fewer layers": with_keys("config.json", num_hidden_layers=2),
    "width that disagrees": with_keys("config.json", hidden_size=96),
    "negative vocabulary": with_keys("config.json", vocab_size=-5),
    "vocabulary that disagrees": with_keys("config.json", vocab_size=600),
    "layers of text": with_keys("config.json", num_hidden_layers="many"),
    "weights missing": without("model.safetensors"),
    "weights empty": holding("model.safetensors", b""),
    "weights cut off": cut("model.safetensors", 0.5),
    "weights a folder": a_folder("model.safetensors"),
    "header of 2**60 bytes": holding("model.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
    "NaN weights": weights(lambda tensors: tensors[NORM].fill_(float("nan"))),
    "a weight missing": weights(lambda tensors: tensors.pop(NORM)),
    "a weight too many": weights(lambda tensors: tensors.update(extra=tensors[NORM].clone())),
    "tokenizer missing": without("tokenizer.json"),
    "tokenizer broken": holding("tokenizer.json", b'{"version"'),
    "tokenizer of nothing": holding("tokenizer.json", b"{}"),
    "tokenizer nested 100,000 deep": holding("tokenizer.json", NESTED),
    "tokenizer config broken": holding("tokenizer_config.json", b"{nope"),
    "tokenizer config a list": holding("tokenizer_config.json", b"[1]"),
    "generation config broken": holding("generation_config.json", b"{"),
}
