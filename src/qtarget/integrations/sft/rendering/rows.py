"""What a row becomes: TRL's tokens and labels of whole rows, and what of the row did not arrive in them.

``train``, ``score``, ``inspect`` and ``audit-data`` all ask here. Tokens, labels and masks are TRL's own; the chat template is
rendered again only to tell the template from the tokenizer where something is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from qtarget.core.errors import DataError, QTargetError, counted, inflected
from qtarget.data.checks.audit import IGNORE_INDEX
from qtarget.data.checks.findings import Finding, finding, named
from qtarget.data.checks.rendered import Issue, findings_of
from qtarget.integrations.sft.data.columns import ROW, with_row_ids
from qtarget.integrations.sft.data.ragged import Ragged
from qtarget.integrations.sft.rendering.probes import probe_template, todays_date
from qtarget.integrations.sft.rendering.prompt_ends import changed_prompts, held_back
from qtarget.integrations.sft.rendering.renderer import Renderer
from qtarget.integrations.sft.rendering.scan import nulls, scan
from qtarget.integrations.sft.rendering.token_rows import given_tokens

Trl = Callable[..., Any]
TokenRow = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rendered:
    """Rows as TRL makes them, before it cuts and drops any.

    Attributes:
        tokens: ``input_ids`` and ``labels`` beside the row's own columns and its number; None where TRL stops.
        findings: what ``qtarget audit-data`` says of them; errors are what training stops at.
        silent: conversations without a single assistant token under ``assistant_only_loss``, by number, all their labels
            ignored; TRL stops at them, so ``tokens`` has the others.
        unanswered: those of them in which nobody answers, or the answer is empty; of the others the template marks none.
        roles: of their messages.
    """

    tokens: Dataset | None
    findings: list[Finding] = field(default_factory=list)
    silent: dict[int, TokenRow] = field(default_factory=dict)
    unanswered: frozenset[int] = frozenset()
    roles: tuple[str, ...] = ()

    def raise_errors(self, name: str) -> None:
        """Refuse rows that would not be trained as they were written.

        Raises:
            DataError: names rows, cause and next step of every error.
        """
        errors = [found.message for found in self.findings if found.severity == "error"]
        if rows := sorted(self.unanswered):
            errors.append(
                f"{counted(len(rows), 'row')} {inflected(len(rows), 'have')} no answer to train on: {named(rows)} (roles: "
                f"{', '.join(self.roles)}); add a message of the role assistant that says something, or remove "
                f"them; assistant_only_loss: false trains whole conversations"
            )
        if rows := sorted(set(self.silent) - self.unanswered):
            errors.append(
                f"{counted(len(rows), 'row')} {inflected(len(rows), 'have')} no assistant token under "
                f"assistant_only_loss: {named(rows)} (roles: {', '.join(self.roles)}); mark assistant text with "
                "{% generation %} ... {% endgeneration %} in the chat template, or remove "
                f"them"
            )
        if errors:
            raise DataError(f"{name} data: " + "\n".join(errors))


def render(
    dataset: Dataset, name: str, *, trl: Trl, args: Any, renderer: Renderer, formatting_func: Any = None
) -> Rendered:
    """Tokens and labels of whole rows.

    Args:
        dataset: of one shape, see ``adopt``.
        name: of the data set, for messages.
        trl: ``SFTTrainer._prepare_dataset`` of the trainer.
        args: with ``max_length`` None, so that nothing is cut.
        renderer: the template and the masks in use.

    Raises:
        DataError: masks or texts of the wrong type.
    """
    dataset = with_row_ids(dataset)
    if "input_ids" in dataset.column_names:
        pad = unambiguous_pad(renderer.tokenizer)
        dataset = given_tokens(dataset, name, pad_token_id=pad, completion_only=args.completion_only_loss)
        tokens: Any = trl(dataset, renderer.tokenizer, args, False, None, name)
        return Rendered(tokens, doubled_marks(tokens, renderer.tokenizer))
    if formatting_func is not None:
        dataset = formatted(dataset, name, formatting_func, renderer.text_field, args.dataset_num_proc)
    if renderer.tokenizer.eos_token is None and not renderer.conversational(dataset):
        raise DataError(f"the {name} data is text, and the tokenizer has no end-of-sequence token; set eos_token")
    silent: dict[int, TokenRow] = {}
    try:
        with held_back() as told:
            tokens = trl(dataset, renderer.tokenizer, args, False, None, name)
    except (QTargetError, MemoryError, OSError):  # no fault of a row
        raise
    except Exception as error:  # a template raises what it likes (jinja2.TemplateError, TypeError, KeyError)
        if dataset.format["type"] == "custom":
            raise  # TRL 1.16 refuses rows behind a transform, in its own words
        silent = without_assistant(dataset, renderer) if "assistant" in str(error) else {}
        if not silent:
            return Rendered(None, findings_of(why(dataset, name, trl, args, renderer, error), len(dataset)))
        rest = dataset.select([i for i, number in enumerate(dataset[ROW]) if number not in silent])
        with held_back() as told:
            tokens = trl(rest, renderer.tokenizer, args, False, None, name) if len(rest) else None
    unanswered, roles = unanswered_of(dataset, renderer, silent), roles_of(dataset, renderer, silent)
    if tokens is None:
        return Rendered(None, [], silent, unanswered, roles)
    issues, features = scan(tokens, renderer, args.dataset_num_proc)
    issues += probe_template(tokens, renderer, features)
    found = findings_of(issues, len(dataset))
    if told:
        found += changed_prompts(tokens, renderer)
    found += [*doubled_marks(tokens, renderer.tokenizer), *todays_date(tokens, renderer)]
    return Rendered(tokens, found, silent, unanswered, roles)


def formatted(dataset: Dataset, name: str, function: Any, text_field: str, num_proc: int | None) -> Dataset:
    """Rows with the text that ``formatting_func`` makes, and nothing that TRL would read before it.

    Raises:
        DataError: it fails, or returns something else than text.
    """

    def text(row: dict[str, Any]) -> dict[str, Any]:
        number = row.pop(ROW)
        made = function(row)
        if not isinstance(made, str):
            raise DataError(
                f"formatting_func returned {type(made).__name__} for row {number + 1} of the {name} data; expected text"
            )
        return {text_field: made, ROW: number}

    weights = [c for c in ("weight", "loss_weights", "weight_spans") if c in dataset.column_names]
    gone = [c for c in dataset.column_names if c not in (ROW, *weights)]
    return dataset.map(
        text, remove_columns=gone, num_proc=num_proc, desc=f"Applying formatting function to {name} dataset"
    )


def unambiguous_pad(tokenizer: Any) -> int | None:
    """The padding token where it has no other use."""
    pad = tokenizer.pad_token_id
    return None if pad in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) else pad


def without_assistant(dataset: Dataset, renderer: Renderer) -> dict[int, TokenRow]:
    """Conversations whose assistant mask is all zero, by row number."""
    found: dict[int, TokenRow] = {}
    rows: Any = dataset
    for row in rows:
        try:
            processed = renderer.tokens(row, return_assistant_tokens_mask=True)
        except Exception:  # another row's fault, which `why` names
            return {}
        if 1 not in processed["assistant_masks"]:
            ids = np.asarray(processed["input_ids"], dtype=np.int64)
            found[row[ROW]] = {"input_ids": ids, "labels": np.full_like(ids, IGNORE_INDEX)}
    return found


def unanswered_of(dataset: Dataset, renderer: Renderer, numbers: Collection[int]) -> frozenset[int]:
    """Those rows of these numbers in which no message of the assistant holds text or a call."""
    rows: Any = dataset.select([i for i, n in enumerate(dataset[ROW]) if n in numbers]) if numbers else []
    return frozenset(
        row[ROW]
        for row in rows
        if not any(
            message.get("role") in ("assistant", "model") and (message.get("content") or message.get("tool_calls"))
            for message in renderer.messages(row)
        )
    )


def roles_of(dataset: Dataset, renderer: Renderer, numbers: Collection[int]) -> tuple[str, ...]:
    """The roles in the rows of these numbers."""
    rows: Any = dataset.select([i for i, n in enumerate(dataset[ROW]) if n in numbers]) if numbers else []
    return tuple(sorted({str(message.get("role")) for row in rows for message in renderer.messages(row)}))


def why(dataset: Dataset, name: str, trl: Trl, args: Any, renderer: Renderer, error: Exception) -> list[Issue]:
    """The rows at which TRL stops, with the template's own words."""
    issues = []
    rows: Any = dataset
    if renderer.conversational(dataset):
        for row in rows:
            try:
                renderer.text(row)
            except Exception as own:
                empty = list(nulls(row, renderer.messages(row), strict=False))
                issues += empty or [Issue(row[ROW], "template_raises", "", said(own))]
    if issues:
        return issues
    number = int(rows[first_failing(dataset, name, trl, args, renderer)][ROW])
    return [Issue(number, "template_raises", "", said(error))]


def said(error: Exception) -> str:
    """An exception in its own words; the type helps where they are a bare key."""
    if isinstance(error, json.JSONDecodeError):
        return f"`tools` is text that is no JSON ({error}); leave it out, or give a list of schemas"
    return f"{type(error).__name__}: {error}"


def first_failing(dataset: Dataset, name: str, trl: Trl, args: Any, renderer: Renderer) -> int:
    """Index of a row at which TRL stops, by halving."""
    low, high = 0, len(dataset)
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        while high - low > 1:
            middle = (low + high) // 2
            try:
                trl(dataset.select(range(low, middle)), renderer.tokenizer, args, False, None, name)
                low = middle
            except Exception:
                high = middle
    finally:
        if shown:
            enable_progress_bar()
    return low


def doubled_marks(tokens: Dataset, tokenizer: Any) -> list[Finding]:
    """Rows that begin with two start tokens, or end with two end tokens."""
    ids = Ragged.of(tokens, "input_ids")
    numbers = np.asarray(tokens[ROW])
    long = np.flatnonzero(ids.lengths >= 2)
    starts = ids.starts[long]
    ends = starts + ids.lengths[long] - 1
    found: list[Finding] = []
    for check, first, second, mark, what in (
        ("double_start", starts, starts + 1, tokenizer.bos_token_id, "begin with two start tokens"),
        ("double_end", ends, ends - 1, tokenizer.eos_token_id, "end with two end tokens"),
    ):
        if mark is None:
            continue
        rows = numbers[long[(ids.values[first] == mark) & (ids.values[second] == mark)]]
        step = "the text or the template writes the token, and the tokenizer adds it again: take it out of one of them"
        found += finding(check, "warning", sorted(rows.tolist()), len(numbers), what, step, token=int(mark))
    return found
