"""Real rows whose noise somebody marked: GSM8K model solutions (right or wrong), HaluEval (hallucinated spans)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
"""Models whose solutions ``gsm8k/model_solutions`` holds, weakest first."""


def load_gsm8k_solutions(data: Path) -> list[Row]:
    """5,276 rows, four solutions a question: ``prompt``, ``completion``, ``source``, ``is_noise``, ``noise_spans``.

    ``is_noise`` is the data's own mark (``is_correct`` negated). A wrong solution is marked from its first character to
    its last (kind ``wrong_solution``): the data does not say where it goes wrong.
    """
    rows = []
    for question in _json_lines(data / "gsm8k" / "model_solutions.jsonl.gz"):
        for solver in SOLVERS:
            text, noise = question[solver]["solution"], not question[solver]["is_correct"]
            spans = [[0, len(text), "wrong_solution"]] if noise else []
            rows.append(_row(question["question"], text, noise, spans, solver))
    return rows


def load_halueval_general(data: Path) -> list[Row]:
    """4,507 rows: queries, ChatGPT's answers, human marks; columns as ``load_gsm8k_solutions``.

    ``is_noise`` is the mark of the row. ``noise_spans`` (kind ``hallucination``) are the marked strings that stand in the
    answer word for word, every one at its first place; marks that annotators rephrased have no place and no span.
    """
    rows = []
    for entry in _json_lines(data / "halueval_general" / "general_data.jsonl.gz"):
        answer, noise = entry["chatgpt_response"], entry["hallucination"].strip().lower() == "yes"
        places = [(answer.find(span), len(span)) for span in entry.get("hallucination_spans") or [] if span]
        spans = sorted([start, start + size, "hallucination"] for start, size in places if start >= 0) if noise else []
        rows.append(_row(entry["user_query"], answer, noise, spans, "chatgpt"))
    return rows


MARKED_DATA: dict[str, Callable[[Path], list[Row]]] = {
    "gsm8k_model_solutions": load_gsm8k_solutions,
    "halueval_general": load_halueval_general,
}
"""Name -> loader; each takes the folder that holds ``gsm8k`` and ``halueval_general``."""


def _row(question: str, answer: str, noise: bool, spans: list[list[Any]], source: str) -> Row:
    return {
        "prompt": f"{question}\n", "completion": answer, "source": source, "is_noise": noise, "noise_spans": spans
    }  # fmt: skip


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} is missing; expected the folder of marked data sets that holds it (docs/audit.md)")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load_story_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of ``tinystories-656k`` from its own file.

    The wrapper of transformers drops letters that it does not know, and puts a blank behind the start mark
    ``<|start_story|>``, with which every prompt has to begin.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end_story|>", unk_token="<unk>", pad_token="<unk>"
    )
