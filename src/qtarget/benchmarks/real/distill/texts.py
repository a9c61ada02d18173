"""Real text for students: answers that people wrote, and stories; rows as the trainer takes them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from qtarget.benchmarks.real.demonstrations import WRITTEN, unpacked
from qtarget.benchmarks.real.distill.config import DOLLY, RealDistillConfig
from qtarget.core.errors import ConfigError

ANSWER = (40, 240)
"""Characters of a human answer: fewest and most."""


def real_rows(data: Path, text: str, config: RealDistillConfig) -> dict[str, list[dict[str, Any]]]:
    """Rows to train on, to tune by and to be tested by, as the trainer takes them; the same whatever the student.

    Raises:
        DataError: the text is missing.
        ConfigError: it has fewer rows than are asked for.
    """
    if text == DOLLY:
        found = json.loads(unpacked(data / WRITTEN["dolly"]))
        found = [row for row in found if not row["input"] and ANSWER[0] <= len(row["output"]) <= ANSWER[1]]
        rows = [in_turns(row["instruction"], row["output"]) for row in found]
    else:
        rows = [{"text": story} for story in json.loads(unpacked(data / "text_corpora" / "tinystories_1000.json.gz"))]
    sizes = {"train": config.train_rows, "validation": config.validation_rows, "test": config.test_rows}
    if len(rows) < sum(sizes.values()):
        raise ConfigError(
            f"{text} has {len(rows)} rows; {', '.join(f'{count} {n}' for n, count in sizes.items())} asked"
        )
    drawn = iter(Random(0).sample(rows, sum(sizes.values())))
    return {name: [next(drawn) for _ in range(count)] for name, count in sizes.items()}


def in_turns(question: str, answer: str) -> dict[str, Any]:
    """A row in chat form whose answer is trained.

    Example:
        >>> in_turns("Who?", "Me.")["completion"]
        [{'role': 'assistant', 'content': 'Me.'}]
    """
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
