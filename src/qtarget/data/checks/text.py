"""Checks of the rows as the user wrote them: empty answers, broken characters, duplicates. No tokenizer, one pass, hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from qtarget.core.errors import counted
from qtarget.data.checks.findings import ROWS_NAMED, Finding, finding

REPLACEMENT = "\ufffd"
EXCERPT_CHARACTERS = 120


def check_texts(rows: Sequence[Mapping[str, Any]], *, text_field: str = "text") -> list[Finding]:
    """All checks of this file.

    Args:
        rows: in one of ``load_rows``'s shapes.
        text_field: name of the text column.

    Example:
        >>> rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "3"}]
        >>> [(found.check, found.rows) for found in check_texts(rows)]
        [('contradictory_duplicates', (0, 1))]
    """
    pairs = [exchange(row, text_field) for row in rows]
    return [*_empty(pairs), *_broken(pairs), *_duplicates(pairs)]


def exchange(row: Mapping[str, Any], text_field: str = "text") -> tuple[str | None, str]:
    """What a row asks and what it answers, as text that is equal for rows that ask (answer) the same.

    The answer is the completion or the last message of the assistant; what stands before it, roles and tools included,
    is the prompt. Runs of white space count as one space. Of tokens, the prompt is what stands before the first label.

    Returns:
        Prompt and answer; the prompt is None where a row has none (plain text, an empty prompt, or tokens that are all trained on).

    Example:
        >>> exchange({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello  you"}]})
        ('[["user", "Hi"]]', 'Hello you')
    """
    if row.get("input_ids") is not None:
        return _exchange_of_tokens(row)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _plain(prompt) or None, _plain(completion)
    messages = [*prompt, *completion] if isinstance(prompt, list) and completion else row.get("messages")
    if messages is None:
        return None, _plain(row.get(text_field))
    last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=len(messages))
    asked = [[m.get("role"), _plain(m.get("content"))] for m in messages[:last]]
    tools = [row["tools"]] if row.get("tools") else []
    answer = messages[last] if last < len(messages) else {}
    # a call of a tool is an answer without text
    said = [_plain(answer.get("content")), *([json.dumps(answer["tool_calls"])] if answer.get("tool_calls") else [])]
    question = json.dumps([*asked, *tools], ensure_ascii=False) if tools or any(text for _, text in asked) else None
    return question, " ".join(said).strip()


def _exchange_of_tokens(row: Mapping[str, Any]) -> tuple[str | None, str]:
    ids = np.asarray(row["input_ids"])
    labels = row.get("labels")
    trained = np.flatnonzero(np.asarray(labels)[1:] != -100) + 1 if labels is not None else np.arange(len(ids))
    if not len(trained) or trained[0] < 2:
        return None, " ".join(map(str, ids.tolist()))
    return " ".join(map(str, ids[: trained[0]].tolist())), " ".join(map(str, ids[trained].tolist()))


def _plain(text: Any) -> str:
    """Text of a string or of content parts, white space folded."""
    if isinstance(text, list):
        text = " ".join(str(part.get("text", part)) if isinstance(part, Mapping) else str(part) for part in text)
    return " ".join(text.split()) if isinstance(text, str) else ""


def _empty(pairs: Sequence[tuple[str | None, str]]) -> list[Finding]:
    rows = [i for i, (_, answer) in enumerate(pairs) if not answer]
    step = "they are trained as written and teach to end at once; remove them unless that is meant"
    return finding("empty_answer", "warning", rows, len(pairs), "have an empty answer, or only white space", step)


def _broken(pairs: Sequence[tuple[str | None, str]]) -> list[Finding]:
    rows = [i for i, pair in enumerate(pairs) if any(REPLACEMENT in text for text in pair if text)]
    examples = []
    for i in rows[:ROWS_NAMED]:
        text = "".join(part for part in pairs[i] if part)
        at = text.index(REPLACEMENT)
        examples.append({"row": i, "text": text[max(0, at - 40) : at + 40]})
    what = "hold U+FFFD, the mark of a character that an earlier step could not decode"
    step = "export them again as UTF-8"
    return finding("broken_characters", "warning", rows, len(pairs), what, step, examples=examples)


def _duplicates(pairs: Sequence[tuple[str | None, str]]) -> list[Finding]:
    answers_of: dict[bytes, dict[bytes, list[int]]] = {}
    for i, (prompt, answer) in enumerate(pairs):
        if prompt is None:  # plain text asks nothing, so it can repeat but not contradict
            answers_of.setdefault(b"text" + _hash(answer), {}).setdefault(b"", []).append(i)
        else:
            answers_of.setdefault(_hash(prompt), {}).setdefault(_hash(answer), []).append(i)
    groups = [list(answers.values()) for answers in answers_of.values()]
    repeated = sorted(chain.from_iterable(rows[1:] for group in groups for rows in group))
    contrary = [group for group in groups if len(group) > 1]
    disagreeing = sorted(chain.from_iterable(chain.from_iterable(contrary)))
    first = {row: rows[0] for group in groups for rows in group for row in rows[1:]}
    copies = [
        {"row": row, "other_row": first[row], "text": pairs[row][1][:EXCERPT_CHARACTERS]}
        for row in repeated[:ROWS_NAMED]
    ]
    found = finding(
        "duplicates", "warning", repeated, len(pairs), "repeat an earlier row, prompt and answer",
        "remove them, or give the first a `weight`: each copy is one more vote for its tokens",
        distinct=len(pairs) - len(repeated), examples=copies,
    )  # fmt: skip
    examples = [_contradiction(pairs, group) for group in contrary[:ROWS_NAMED]]
    return found + finding(
        "contradictory_duplicates", "warning", disagreeing, len(pairs),
        f"share their prompt with a row that answers otherwise ({counted(len(contrary), 'prompt')})",
        "keep the right answer where only one can be right; several good answers to one prompt are no fault",
        prompts=len(contrary), examples=examples,
    )  # fmt: skip


def _contradiction(pairs: Sequence[tuple[str | None, str]], group: list[list[int]]) -> dict[str, Any]:
    first, other = group[0][0], group[1][0]
    return {
        "row": other,
        "other_row": first,
        "prompt": (pairs[first][0] or "")[-EXCERPT_CHARACTERS:],
        "answer": pairs[other][1][:EXCERPT_CHARACTERS],
        "other_answer": pairs[first][1][:EXCERPT_CHARACTERS],
        "votes": [len(rows) for rows in group],
    }


def _hash(text: str) -> bytes:
    # half of a surrogate pair, which JSON can spell, has no UTF-8 of its own
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
