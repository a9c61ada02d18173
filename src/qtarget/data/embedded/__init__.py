"""The embedded default: a base model of about a million parameters and demonstrations it can learn from in seconds."""

from __future__ import annotations

import json
from pathlib import Path

from qtarget.core.errors import DataError

DEMONSTRATION_SPLITS = ("train", "test", "base_format_test", "heldout_skills_test")

_FOLDER = Path(__file__).parent


def base_model_path() -> Path:
    """The Hugging Face folder of the embedded base model, for ``AutoModelForCausalLM.from_pretrained``.

    Example:
        >>> (base_model_path() / "config.json").is_file()
        True
    """
    return _FOLDER / "base_model"


def load_demonstrations(split: str) -> list[dict[str, str]]:
    """The embedded rows of a split, each with ``prompt``, ``completion``, ``answer`` and ``skill``.

    Args:
        split: ``"train"`` or ``"test"`` in the instruction format (checked by ``tasks.check``);
            ``"base_format_test"`` (every skill) or ``"heldout_skills_test"`` (the skills that no demonstration shows)
            in the base model's own format (checked by ``tasks.check_pretraining``).

    Raises:
        DataError: no such split.

    Example:
        >>> sorted(load_demonstrations("test")[0])
        ['answer', 'completion', 'prompt', 'skill']
    """
    if split not in DEMONSTRATION_SPLITS:
        raise DataError(f"unknown split {split!r}; known splits: {', '.join(DEMONSTRATION_SPLITS)}")
    text = (_FOLDER / "demonstrations" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
