"""Which rows belong to one source: by a column, or by the language that a library detects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtarget.core.errors import ConfigError, MissingDependencyError
from qtarget.data.fields import GROUP_COLUMNS

LANGUAGE = "language"
"""Detected where no column has this name."""
UNKNOWN = "unknown"
SURE = 0.5
"""Probability from which a text counts as being in a language: first among all languages, then among those of the rows."""


def row_groups(
    rows: Sequence[Mapping[str, Any]],
    column: str | None = None,
    *,
    text_field: str = "text",
    at_most: int | None = None,
) -> tuple[str, list[str]] | None:
    """The column that tells rows apart, and each row's value; None where there is none.

    Args:
        rows: as read from a file, in one of TRL's shapes.
        column: its name, or ``language``; default: the first of ``GROUP_COLUMNS`` that holds texts.
        at_most: different values; a column of more names rows, and no sources. A column that is asked for is taken as it is.

    Raises:
        ConfigError: no row has the column that is asked for.
        MissingDependencyError: ``language``, without the library.

    Example:
        >>> row_groups([{"text": "a", "source": "web"}, {"text": "b", "source": "mail"}])
        ('source', ['web', 'mail'])
        >>> row_groups([{"text": "a"}]) is None
        True
    """
    names = dict.fromkeys(name for row in rows for name in row)
    if column is not None and column in names:
        return column, [str(row.get(column)) for row in rows]
    if column == LANGUAGE:
        return column, languages([response(row, text_field) for row in rows])
    if column is not None:
        raise ConfigError(
            f"group_by: {column}: the data has no such column; columns: {', '.join(names)}; or `language`, which is detected"
        )
    for name in (name for name in GROUP_COLUMNS if name in names):
        values = [row.get(name) for row in rows]
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) == len(rows) and (at_most is None or len(set(texts)) <= at_most):
            return name, texts
    return None


def response(row: Mapping[str, Any], text_field: str = "text") -> str:
    """What a row's answer says, as text; of token ids nothing.

    Example:
        >>> response({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Guten Tag"}]})
        'Guten Tag'
    """
    said = row.get("completion") if row.get("completion") is not None else row.get("messages")
    if said is None:
        said = row.get(text_field)
    if isinstance(said, str):
        return said
    answers = [m for m in said or [] if isinstance(m, Mapping) and m.get("role") == "assistant"]
    return "\n".join(m["content"] for m in answers if isinstance(m.get("content"), str))


def languages(texts: Sequence[str]) -> list[str]:
    """The language of each text, an ISO 639 code; ``unknown`` where it cannot be told, as for a formula.

    Texts are judged twice: among all languages, then among those that some text surely is in. A short text is seldom sure by
    itself. Where all sure texts are in one language, the short ones count as being in it, too.

    Raises:
        MissingDependencyError: the library is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MissingDependencyError(
            "group_by: language needs py3langid; `pip install 'qtarget[language]'`, or name a column"
        ) from error
    judge = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    spoken = [text if any(character.isalpha() for character in text) else "" for text in texts]
    first = [judge.classify(text) if text else (UNKNOWN, 1.0) for text in spoken]
    known = sorted({name for name, sure in first if sure >= SURE} - {UNKNOWN, "zxx"})
    if len(known) > 1:
        judge.set_languages(known)
        first = [judge.classify(text) if text else (UNKNOWN, 1.0) for text in spoken]
    elif known:
        return [known[0] if text else UNKNOWN for text in spoken]
    return [name if sure >= SURE and name != "zxx" else UNKNOWN for name, sure in first]
