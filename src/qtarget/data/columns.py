"""Weights that the user's data carries: one a message, or one a token."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

from qtarget.core.errors import DataError, counted

Message = Mapping[str, Any]
# A word that no template rewrites; it marks where a message's own text ends in the rendered conversation.
END_MARK = " qzEndOfMessageqz"
LIGHT = 0.05
"""Weight of a row, or mean weight of its labels, under which it hardly teaches."""


def message_token_weights(
    tokenizer: Any,
    messages: Sequence[Message],
    input_ids: Sequence[int],
    *,
    chat_template: str | None = None,
    tools: list | None = None,
    **template_kwargs: Any,
) -> list[float]:
    """The ``weight`` of each message on the tokens it is rendered to.

    A token belongs to the first message ``i`` whose prefix ``messages[:i + 1]``, rendered alone, contains it; so a
    message owns its header and its end-of-turn token. Only prefixes between messages of different weight are rendered,
    so a template that refuses some prefixes (a lone system message) is no obstacle to equal weights.

    Args:
        tokenizer: has ``apply_chat_template``.
        messages: ``role``, ``content`` and optionally ``weight`` (a finite number >= 0; absent or None is 1).
        input_ids: ``[length]`` of the whole conversation, possibly cut at its end.
        chat_template, tools, template_kwargs: as the conversation was rendered.

    Returns:
        ``[length]`` weights.

    Raises:
        DataError: a weight is no finite number >= 0, ``input_ids`` are not this conversation, or the template refuses
            or rewrites a prefix so that the border between two messages cannot be told.
    """
    weights = [_message_weight(i, message) for i, message in enumerate(messages)]
    if not messages:
        raise DataError("the conversation has no messages; expected at least one with role and content")
    borders = [i for i, (left, right) in enumerate(pairwise(weights), start=1) if left != right]
    if not borders:
        return [weights[0]] * len(input_ids)

    plain = without_weights(messages)

    def render(part: Sequence[Message]) -> list[int]:
        return tokenizer.apply_chat_template(
            list(part), tokenize=True, return_dict=True, chat_template=chat_template, tools=tools, **template_kwargs
        )["input_ids"]

    whole = render(plain)
    if common_prefix_length(whole, input_ids) < len(input_ids):
        raise DataError(
            f"input_ids ({len(input_ids)} tokens) are not the rendered conversation ({len(whole)} tokens): they "
            "differ from token "
            f"{common_prefix_length(whole, input_ids)} on; pass the chat template and the options they were rendered "
            "with"
        )
    out: list[float] = []
    for i in borders:
        border = _border(tokenizer, render, plain, whole, i)
        out += [weights[i - 1]] * (border - len(out))
    return (out + [weights[-1]] * (len(whole) - len(out)))[: len(input_ids)]


def without_weights(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a template should see them."""
    return [{key: value for key, value in m.items() if key not in ("weight", "weight_spans")} for m in messages]


def row_loss_weights(row: Mapping[str, Any], length: int) -> list[float]:
    """The ``loss_weights`` column of a tokenised row, checked.

    Args:
        row: holds ``loss_weights``, ``[length]`` finite numbers >= 0 aligned with ``input_ids``.
        length: number of tokens of the row.

    Raises:
        DataError: the column is absent, of another length, or a value is no finite number >= 0.

    Example:
        >>> row_loss_weights({"loss_weights": [1, 0.5]}, 2)
        [1.0, 0.5]
    """
    values = row.get("loss_weights")
    if values is None:
        raise DataError(
            f"the row has no `loss_weights` (columns: {', '.join(row) or 'none'}); expected {length} numbers"
        )
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise DataError(f"`loss_weights` is {values!r}; expected a list of {length} numbers, one a token")
    if len(values) != length:
        raise DataError(f"`loss_weights` has {len(values)} entries, input_ids {length}; expected one weight a token")
    return [_weight(value, f"loss_weights[{t}]") for t, value in enumerate(values)]


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading entries that are equal.

    Example:
        >>> common_prefix_length([1, 2, 3], [1, 2, 4])
        2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _border(tokenizer: Any, render: Any, messages: list[dict], whole: list[int], i: int) -> int:
    """Index in ``whole`` of the first token of message ``i``."""
    try:
        alone = render(messages[:i])
    except Exception as error:  # a template raises what it likes (jinja2.TemplateError, TypeError)
        raise DataError(
            f"the chat template cannot render the first {counted(i, 'message')} alone ({error}), so where message {i} begins "
            "cannot be "
            f"told; give messages {i - 1} and {i} equal weights, or use a template without this check"
        ) from error
    border = common_prefix_length(alone, whole)
    if not tokenizer.decode(alone[border:], skip_special_tokens=True).strip():
        return border
    # The template renders message i - 1 differently as the last one (Qwen3 adds an empty thought): compare what follows
    # its text instead.
    in_alone, in_whole = _end_of_text(render, messages[:i], i - 1, alone), _end_of_text(render, messages, i - 1, whole)
    if in_alone is None or in_whole is None:
        raise DataError(
            f"the chat template renders message {i - 1} differently when message {i} follows, so the border between "
            "them "
            "cannot be told; give them equal weights, or use a template that renders turns independently"
        )
    return in_whole + common_prefix_length(alone[in_alone:], whole[in_whole:])


def _end_of_text(render: Any, messages: list[dict], i: int, ids: list[int]) -> int | None:
    """Index in ``ids`` (the rendered ``messages``) just after the text of message ``i``."""
    content = messages[i].get("content")
    if not isinstance(content, str):
        return None
    marked = render([*messages[:i], {**messages[i], "content": content + END_MARK}, *messages[i + 1 :]])
    # from the end: the mark changes the tokens of the text before it, never those that follow
    common_suffix = common_prefix_length(ids[::-1], marked[::-1])
    return None if marked == ids else len(ids) - common_suffix


def parsed_weight(value: Any, what: str) -> float | None:
    """A weight as the data spells it: a number, or a CSV's text of one; None where nothing is given.

    Raises:
        DataError: anything else, a negative or a non-finite number.

    Example:
        >>> parsed_weight("0.5", "weight"), parsed_weight(None, "weight"), parsed_weight("", "weight")
        (0.5, None, None)
    """
    number = value
    if isinstance(value, str):
        if not value.strip():
            return None
        with contextlib.suppress(ValueError):  # then it is named below
            number = float(value)
    return None if value is None else _weight(number, what)


def _message_weight(index: int, message: Message) -> float:
    value = parsed_weight(message.get("weight"), f"the weight of message {index} ({message.get('role', 'no role')})")
    return 1.0 if value is None else value


def _weight(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise DataError(f"{what} is {value!r}; expected a number >= 0 (0 trains on nothing of it, 1 is the default)")
    if not math.isfinite(value) or value < 0:
        raise DataError(
            f"{what} is {value}; expected a finite number >= 0 (0 trains on nothing of it, 1 is the default)"
            + ("; " + NOT_NEGATIVE if value < 0 else "")
        )
    return float(value)


NOT_NEGATIVE = (
    "pushing a text's probability down is another objective (unlikelihood), whose loss has no lower bound in this form"
)
