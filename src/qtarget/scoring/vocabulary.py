"""Do two models speak of the same tokens, and over which rows of their heads may they be compared?"""

from __future__ import annotations

from typing import Any, Literal, get_args

from qtarget.core.errors import CacheMismatchError, ConfigError

VocabPadding = Literal["refuse", "truncate"]
NAMED = 3
"""How many differing tokens a message names."""


def require_same_tokens(ours: Any, theirs: Any, whose: str) -> None:
    """Make sure that every id is the same token to two tokenizers; templates and roles of tokens may differ.

    Args:
        whose: name of the second one's model, for the message.

    Raises:
        CacheMismatchError: names the first tokens that differ.
    """
    here, there = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs))
    differing = [i for i in sorted({*here, *there}) if here.get(i) != there.get(i)]
    if not differing:
        return
    named = "; ".join(
        f"id {i} is {_token(here.get(i))} here and {_token(there.get(i))} there" for i in differing[:NAMED]
    )
    more = f"; {len(differing) - NAMED} more" if len(differing) > NAMED else ""
    raise CacheMismatchError(
        f"{whose} has another tokenizer than the model that is trained: {named}{more}; ids of one are no ids of the other, "
        "so use a teacher of the same family"
    )


def _token(token: str | None) -> str:
    return "unused" if token is None else repr(token)


def shared_vocab(student: int, teacher: int, tokenizer: Any, padding: VocabPadding) -> int | None:
    """The rows over which a student's and a teacher's heads are compared, or None where they are equally long.

    Heads are often padded to a multiple of 64 or 128 (151,936 and 152,064 rows for the same tokens). ``truncate`` leaves out
    the rows of the longer head that the shorter lacks, where no token of the tokenizer uses them.

    Raises:
        ConfigError: ``padding`` is unknown.
        CacheMismatchError: the sizes differ and ``padding`` is ``refuse``, or a token would be left out.
    """
    if padding not in get_args(VocabPadding):
        raise ConfigError(f"vocab_padding {padding!r} is unknown; expected one of {', '.join(get_args(VocabPadding))}")
    if student == teacher:
        return None
    used, rows = max(tokenizer.get_vocab().values()) + 1, min(student, teacher)
    sizes = f"the model that is trained has {student} vocabulary rows, the teacher {teacher}"
    if used > rows:
        raise CacheMismatchError(
            f"{sizes}, and the tokenizer uses {used}: these are other tokens, not padding; use a teacher of the same family"
        )
    if padding == "refuse":
        raise CacheMismatchError(
            f"{sizes}, the tokenizer uses {used}: they differ by padding alone; set vocab_padding: truncate to compare them on "
            f"the first {rows}"
        )
    return rows
