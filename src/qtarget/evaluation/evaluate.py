"""The evaluation itself: every contender, every set, likelihood and completions, a record a row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from qtarget.core.errors import NonFiniteLossError
from qtarget.evaluation.contenders import Contender, weights_digest
from qtarget.evaluation.generation import (
    Decoding,
    complete,
    new_tokens,
    prompt_ids,
    refuse_full,
    room,
    rows_at_once,
)
from qtarget.evaluation.judges import Judge, judged
from qtarget.evaluation.loaded import Loaded
from qtarget.evaluation.questions import Question
from qtarget.evaluation.records import WEIGHTS, Records
from qtarget.integrations.shared.saved.ends import stop_ids
from qtarget.storage.files import digest

SetName = Literal["data", "forgetting"]
COUNTED = "tokens and answers of weight 0 do not count"
"""The rule by which weights decide what is measured, as plans name it; another rule gets other words."""
Advance = Callable[[int, int, str], None]
"""Rows done, rows in all, and what was done."""


@dataclass(frozen=True)
class RowSet:
    """Rows to be evaluated on.

    Attributes:
        name: ``data`` or ``forgetting``.
        file: for people.
        dataset: as training reads it.
        questions: the rows asked, or None where they are scored alone.
        judge: of the answers.
        numbers: of the rows in their file, from 0; None: their places in the data set.
    """

    name: SetName
    file: str
    dataset: Any
    questions: Sequence[Question] | None
    judge: Judge | None
    numbers: Sequence[int] | None = None

    def where(self, row: int) -> str:
        """A row of the data set as people find it in the file."""
        return f"{self.file}, row {(row if self.numbers is None else self.numbers[row]) + 1}"

    @cached_property
    def fingerprint(self) -> str:
        """Of the rows, in their order."""
        return rows_digest(self.dataset)


def rows_digest(rows: Any) -> str:
    """Of a data set's rows, in their order."""
    return digest(json.dumps(rows.to_list(), sort_keys=True, default=str).encode())


@dataclass(frozen=True)
class Served:
    """A server that completes for some contenders.

    Attributes:
        endpoint: to it.
        engine: what it is.
        ids: contender -> id of the served model.
    """

    endpoint: Any
    engine: Any
    ids: Mapping[str, str]


@dataclass(frozen=True)
class Choices:
    """How to evaluate.

    Attributes:
        nll: whether to score the rows' own answers.
        decoding: how completions are chosen.
        max_new_tokens: of a completion; None: see ``generation.new_tokens``.
        batch_size: prompts at once.
        trust_remote_code: as transformers has it.
        served: a server, if there is one.
    """

    nll: bool = True
    decoding: Decoding = field(default_factory=Decoding)
    max_new_tokens: int | None = None
    batch_size: int = 32
    trust_remote_code: bool = False
    served: Served | None = None


def plan(contenders: Sequence[Contender], sets: Sequence[RowSet], choices: Choices) -> dict[str, Any]:
    """What the records depend on, as JSON; the judge is no part of it: completions can be judged anew."""
    served = choices.served
    return {
        "rows": {one.name: one.fingerprint for one in sets},
        "models": {one.name: weights_digest(one) for one in contenders},
        "temperature": choices.decoding.temperature,
        "samples": choices.decoding.samples,
        "seed": choices.decoding.seed,
        "max_new_tokens": choices.max_new_tokens,
        "batch_size": choices.batch_size,
        "served": dict(served.ids) if served else {},
        **weights_rule(sets, {one.name: one.settings for one in contenders}),
    }


def weights_rule(sets: Sequence[RowSet], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What decides which tokens and answers count, as a part of a plan; nothing where no row has weights.

    Args:
        settings: by contender; those in ``WEIGHT_SETTINGS`` decide.
    """
    from qtarget.integrations.sft.data.weights import Weighting  # TRL, as late as can be
    from qtarget.integrations.sft.rows import WEIGHT_SETTINGS

    if not any(Weighting.of(one.dataset) for one in sets):
        return {}
    own = {name: {key: keys[key] for key in WEIGHT_SETTINGS if key in keys} for name, keys in settings.items()}
    return {WEIGHTS: {"rule": COUNTED, "settings": own}}


def asked_prompts(tokenizer: Any, context: int | None, rows: RowSet, model: str) -> dict[int, list[int]]:
    """Token ids of the questions whose answers count, by number, each with room for an answer.

    Args:
        context: positions of the model; None: no limit.
        model: its name.

    Raises:
        DataError: a prompt leaves no room; names all such rows.
        ConfigError: see ``prompt_ids``.
    """
    asked = [q for q in rows.questions or () if q.counts]
    found = {q.number: prompt_ids(tokenizer, q.prompt, q.template) for q in asked}
    numbers = [i if rows.numbers is None else rows.numbers[i] for i in found]
    refuse_full([len(ids) for ids in found.values()], context, rows.file, numbers, model)
    return found


class Evaluation:
    """One evaluation, from contenders and rows to results.

    Args:
        contenders: bases first.
        sets: ``data``, and ``forgetting`` if there is one.
        choices: how.
        records: what is known already, and where the rest goes.
        advance: told of every batch.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        sets: Sequence[RowSet],
        choices: Choices,
        records: Records,
        advance: Advance = lambda done, total, text: None,
    ) -> None:
        self._contenders, self._sets, self._choices, self._records = contenders, sets, choices, records
        self._advance, self._done = advance, 0
        parts = sum(len(one.dataset) * choices.nll + sum(q.counts for q in one.questions or ()) for one in sets)
        self._total = parts * len(contenders)
        self._scores: dict[tuple[str, str, int], list[float]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        """Of each contender: ``notes``, and ``max_new_tokens`` of each set."""

    def run(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Find out what is not known yet.

        Returns:
            (set, contender) -> ``nll`` and ``completion``: a record a row, None where it was not asked for; completions
            have their ``scores``, and are None for rows whose answer has weight 0.

        Raises:
            ConfigError: a model cannot be loaded, or the user's metric fails.
            DataError: rows that cannot be used.
            ScoringServerError: the server fails.
        """
        with one_bar():
            every = [Loaded(contender, self._choices.trust_remote_code) for contender in self._contenders]
            asked = [self._asked(loaded) for loaded in every]  # all are refused before the first is measured
            for loaded, prompts in zip(every, asked, strict=True):
                self._evaluate(loaded, prompts)
        return {(rows.name, one.name): self.results_of(rows, one) for rows in self._sets for one in self._contenders}

    def evaluate(self, loaded: Loaded) -> None:
        """Find out what is not known yet of one contender."""
        self._evaluate(loaded, self._asked(loaded))

    def _asked(self, loaded: Loaded) -> dict[str, dict[int, list[int]]]:
        """By set, see ``asked_prompts``; the model is not loaded for it."""
        asked = [one for one in self._sets if one.questions is not None]
        name = loaded.contender.name
        return {one.name: asked_prompts(loaded.tokenizer, loaded.context, one, name) for one in asked}

    def _evaluate(self, loaded: Loaded, prompts: Mapping[str, Mapping[int, list[int]]]) -> None:
        contender = loaded.contender
        notes = [*contender.notes, *loaded.notes, *self._prompts_counted(contender)]
        self.facts[contender.name] = {"notes": notes, "max_new_tokens": {}}
        for rows in self._sets:
            if self._choices.nll:
                self._score(loaded, rows)
            if rows.questions is not None:
                self._complete(loaded, rows, rows.questions, prompts[rows.name])
        loaded.forget()

    def _prompts_counted(self, contender: Contender) -> list[str]:
        """Sets whose nll is not of answers alone, in words."""
        if not self._choices.nll or contender.settings.get("assistant_only_loss"):
            return []
        return [
            f"nll of {rows.file} counts prompts too: its rows are conversations, and assistant_only_loss is off in the run; rows "
            "of prompt and completion count answers alone"
            for rows in self._sets if "messages" in rows.dataset.column_names
        ]  # fmt: skip

    # -- likelihood -------------------------------------------------------------------------------------------

    def _score(self, loaded: Loaded, rows: RowSet) -> None:
        name, count = loaded.contender.name, len(rows.dataset)
        known = [self._records.get(("nll", rows.name, name, i)) for i in range(count)]
        if all(line is not None for line in known):
            self._tell(count, f"{name}: nll of {rows.name}, known")
            return
        ready = loaded.ready_rows(rows)
        size = self._choices.batch_size
        for start in range(0, len(ready.rows), size):
            part = slice(start, start + size)
            if any(known[row["row"]] is None for row in ready.rows[part]):
                scored = ready.score(loaded.tokenizer, part)
                pairs = zip(ready.rows[part], scored, strict=True)
                self._records.add(nll_line(rows, name, row, found) for row, found in pairs)
            self._tell(len(ready.rows[part]), f"{name}: nll of {rows.name}")
        missing = sorted(set(range(count)) - {row["row"] for row in ready.rows})
        empty = {"part": "nll", "set": rows.name, "contender": name, "nats": 0.0, "tokens": 0, "key": ""}
        self._records.add(empty | {"row": i} for i in missing)
        self._tell(len(missing), f"{name}: nll of {rows.name}")

    # -- completion -------------------------------------------------------------------------------------------

    def _complete(
        self, loaded: Loaded, rows: RowSet, questions: Sequence[Question], prompts: Mapping[int, list[int]]
    ) -> None:
        name, tokenizer = loaded.contender.name, loaded.tokenizer
        wanted = self._choices.max_new_tokens or new_tokens(tokenizer, [q.reference for q in questions if q.counts])
        self.facts[name]["max_new_tokens"][rows.name] = wanted
        size = self._choices.batch_size
        said = (self._records.get(("completion", rows.name, name, i)) for i in prompts)
        if not self._is_served(loaded) and any(line is None for line in said):  # else no model need be loaded
            size = rows_at_once(loaded.model, tokenizer, size)  # padding on the left disturbs some architectures
        numbers = list(prompts)
        for stream, places in enumerate(batches([len(prompts[i]) for i in numbers], size)):
            chosen = [numbers[place] for place in places]
            keys = [("completion", rows.name, name, i) for i in chosen]
            if any(self._records.get(key) is None for key in keys):
                space = room([len(prompts[i]) for i in chosen], wanted, loaded.context)
                said = self._said(loaded, rows, [prompts[i] for i in chosen], space, stream)
                self._records.add(
                    {"part": "completion", "set": rows.name, "contender": name, "row": i,
                     "completions": [one.text for one in found], "stopped": [one.stopped for one in found]}
                    for i, found in zip(chosen, said, strict=True)
                )  # fmt: skip
            for i in chosen:
                self._judge(rows, questions[i], name)
            self._tell(len(chosen), f"{name}: completion of {rows.name}")

    def _is_served(self, loaded: Loaded) -> bool:
        return self._choices.served is not None and loaded.contender.name in self._choices.served.ids

    def _said(self, loaded: Loaded, rows: RowSet, prompts: Sequence[list[int]], space: int, stream: int) -> Any:
        served, decoding = self._choices.served, self._choices.decoding
        assert rows.questions is not None
        chat = not isinstance(rows.questions[0].prompt, str)
        common: dict[str, Any] = {"max_new_tokens": space, "decoding": decoding}
        if served is not None and self._is_served(loaded):
            from qtarget.evaluation.served import complete_served

            stops = stop_ids(loaded.tokenizer, loaded.generation_config, chat=chat)
            return complete_served(
                served.endpoint, served.ids[loaded.contender.name], prompts, engine=served.engine, stops=stops,
                stream=stream * self._choices.batch_size, **common,
            )  # fmt: skip
        stops = stop_ids(loaded.tokenizer, loaded.model.generation_config, chat=chat)
        return complete(loaded.model, loaded.tokenizer, prompts, stops=stops, stream=stream, **common)

    def _judge(self, rows: RowSet, question: Question, name: str) -> None:
        assert rows.judge is not None
        line = self._records.get(("completion", rows.name, name, question.number))
        assert line is not None, "it was just added"
        where = f"{rows.where(question.number)} ({name})"
        self._scores[rows.name, name, question.number] = [
            judged(rows.judge, question.text, text, question.reference, question.row, where)
            for text in line["completions"]
        ]

    def results_of(self, rows: RowSet, contender: Contender) -> dict[str, Any]:
        """What ``run`` gives for one set and one contender that was evaluated."""
        count, name = range(len(rows.dataset)), contender.name
        nll = [self._records.get(("nll", rows.name, name, i)) for i in count] if self._choices.nll else None
        said = None
        if rows.questions is not None:
            said = [
                {
                    **(self._records.get(("completion", rows.name, name, q.number)) or {}),
                    "scores": self._scores[rows.name, name, q.number],
                }
                if q.counts
                else None
                for q in rows.questions
            ]
        return {"nll": nll, "completion": said}

    def _tell(self, rows: int, text: str) -> None:
        if rows:
            self._done += rows
            self._advance(self._done, self._total, text)


@contextmanager
def one_bar() -> Iterator[None]:
    """Without the bars of datasets and transformers: a terminal shows one at a time."""
    import datasets
    from transformers.utils import logging

    shown = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if not shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            logging.enable_progress_bar()


def nll_line(rows: RowSet, name: str, row: Mapping[str, Any], scored: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a row's likelihood: nats over its trained tokens, their number, and a key of ids and mask.

    Raises:
        NonFiniteLossError: a token has no probability at all.
    """
    found = [value for value in scored["log_probs"] if value is not None]
    nats = -math.fsum(found)
    if not math.isfinite(nats):
        raise NonFiniteLossError(f"{name} gives {rows.where(row['row'])}, an nll of {nats}; is the model damaged?")
    supervised = [value is not None for value in scored["log_probs"]]
    key = digest(json.dumps([list(map(int, row["input_ids"])), supervised]).encode())
    return {
        "part": "nll", "set": rows.name, "contender": name, "row": int(row["row"]), "nats": nats, "tokens": len(found),
        "key": key[:16],
    }  # fmt: skip


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Rows of like length together, the same batches whatever is known already.

    Example:
        >>> list(batches([5, 1, 3], 2))
        [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    yield from (order[start : start + size] for start in range(0, len(order), size))
