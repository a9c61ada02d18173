"""Instructions that a program can check (IFEval): 541 prompts, and the official checks as the library ``lm_eval`` keeps them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qtarget.benchmarks.generation import greedy_answers
from qtarget.benchmarks.real.model import INSTALL
from qtarget.benchmarks.seeds import bootstrap_means, percentiles
from qtarget.core.errors import DataError, MissingDependencyError
from qtarget.evaluation.generation import Completion

PROMPTS = 541
"""All that there are; they ask for 834 things of 25 kinds."""
FILE = Path("instruction_prompts") / "ifeval_input_data.jsonl.gz"
MEASURES = {
    "prompt_strict": "prompt_level_strict_acc",
    "instruction_strict": "inst_level_strict_acc",
    "prompt_loose": "prompt_level_loose_acc",
    "instruction_loose": "inst_level_loose_acc",
}
"""Ours, and what the library calls them. A prompt is followed where all its instructions are; loose forgives asterisks, and a
first or last line."""
BATCH = 32
"""Prompts at once: more would only lengthen what the shorter answers of a batch wait for."""
PACKAGES = ("lm_eval", "langdetect", "immutabledict", "nltk", "llama_index.core")
Check = Callable[[Mapping[str, Any], Sequence[str]], Mapping[str, Any]]


def instruction_rows(data: Path | None, count: int = PROMPTS) -> list[dict[str, Any]]:
    """Prompts with what each asks for, in the order of the file; fewer are drawn with a fixed seed.

    Args:
        data: the folder of real data; None: no prompts.
        count: of prompts.

    Raises:
        DataError: the file is missing.
    """
    if data is None:
        return []
    path = data / FILE
    if not path.is_file():
        raise DataError(f"{path} is missing; name the folder of the real data with --data, or leave it out")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()]
    if count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), count))]


def check_ready(data: Path | None) -> None:
    """Raise before anything is made, where answers could not be judged afterwards.

    Raises:
        DataError: the prompts are missing.
        MissingDependencyError: a package of the checks is.
    """
    if data is not None:
        instruction_rows(data, 1)
        _sentence_splitter()


def _sentence_splitter() -> Path:
    """The folder of ``nltk``'s sentence splitter, which would otherwise be downloaded: a package brings it along."""
    absent = [name for name in PACKAGES if not _is_there(name)]
    if absent:
        raise MissingDependencyError(
            f"instruction following (IFEval) is judged by packages that are not installed ({', '.join(absent)}); run `make real`, "
            f"or `{INSTALL}`, or leave --data out: then neither it nor forgetting is measured"
        )
    carrier: Any = importlib.util.find_spec("llama_index.core")
    folder = Path(carrier.origin).parent / "_static" / "nltk_cache"
    if not (folder / "tokenizers" / "punkt_tab").is_dir():
        raise MissingDependencyError(f"{folder} has no sentence splitter; expected llama-index-core as in `{INSTALL}`")
    return folder


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@lru_cache(maxsize=1)
def official_checks() -> Check:
    """``process_results`` of the library's task, which needs no network.

    Raises:
        MissingDependencyError: a package is not installed.
    """
    splitter = str(_sentence_splitter())
    import langdetect  # pyright: ignore[reportMissingImports]
    import nltk  # pyright: ignore[reportMissingImports]

    # before the import below, which downloads what it does not find
    nltk.data.path.insert(0, splitter)
    langdetect.DetectorFactory.seed = 0  # it draws, and would judge one answer now so, now otherwise
    from lm_eval.tasks.ifeval.utils import process_results  # pyright: ignore[reportMissingImports]

    return process_results


def answers_to(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], new_tokens: int) -> list[Completion]:
    """Greedy answers to the prompts in the model's chat template, up to the end of the turn or ``new_tokens``."""
    turns = ([{"role": "user", "content": row["prompt"]}] for row in rows)
    prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return greedy_answers(model, tokenizer, prompts, max_new_tokens=new_tokens, batch_size=BATCH)


def followed(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> dict[str, list[int]]:
    """How many of a prompt's instructions each answer follows; for whole prompts 1 or 0. A list a measure.

    Raises:
        MissingDependencyError: see ``official_checks``.
    """
    check = official_checks()
    found = []
    for row, text in zip(rows, texts, strict=True):
        with same_draws():
            found.append(check(row, [text]))
    return {name: [int(np.sum(one[theirs])) for one in found] for name, theirs in MEASURES.items()}


@contextmanager
def same_draws() -> Iterator[None]:
    """Python's random numbers from one seed, and as they were afterwards.

    lm_eval 0.4.13 draws a letter where a prompt asks for the number of a sign that is none, as `#`: the official check does so.
    """
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def instruction_following(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], new_tokens: int
) -> dict[str, list[int]]:
    """``followed`` by the model's own answers, and which of them ``ended`` by themselves; the others count as they stand."""
    answers = answers_to(model, tokenizer, rows, new_tokens)
    found = followed(rows, [answer.text for answer in answers])
    return {**found, "ended": [int(answer.stopped) for answer in answers]}


def checker_versions() -> dict[str, str]:
    """Of the packages that decide what is followed."""
    return {name: version(name) for name in ("lm_eval", "langdetect", "nltk", "llama-index-core")}


def asked_of(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many instructions each prompt has."""
    return [len(row["instruction_id_list"]) for row in rows]


def share_percent(
    runs: Sequence[Sequence[int]], asked: Sequence[int], baseline: Sequence[Sequence[int]] | None = None
) -> dict[str, float]:
    """What share of the instructions is followed, in percent, with its 95 % interval over prompts (and over seeds).

    Instructions of a prompt stay together, as an answer follows or misses them together. For whole prompts ``asked`` is 1 each.

    Args:
        runs: ``[seeds][prompts]`` instructions that are followed.
        asked: ``[prompts]`` instructions there are.
        baseline: as ``runs``: then the difference to it, in points, paired prompt by prompt.

    Example:
        >>> share_percent([[1, 1, 0, 0]], [1, 1, 1, 1])["mean"]
        50.0
        >>> share_percent([[2, 1]], [2, 2], baseline=[[0, 1]])["mean"]
        50.0
    """
    counts = np.asarray(runs, dtype=float) - (0 if baseline is None else np.asarray(baseline, dtype=float))
    of = np.broadcast_to(np.asarray(asked, dtype=float), counts.shape)
    above, below = bootstrap_means(np.stack([counts, of]))
    low, high = percentiles(100 * above / below)
    return {"mean": round(float(100 * counts.sum() / of.sum()), 2), "low": round(low, 2), "high": round(high, 2)}
