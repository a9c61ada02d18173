"""Text of single tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

REPLACEMENT = "\ufffd"


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """What each token adds to a text, leading space included; bytes that are no character by themselves as ``<0xE2>``.

    Each is decoded behind a letter, since some tokenizers drop the leading space of a first token.
    """
    wanted = sorted({int(i) for i in ids if i >= 0})
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    keywords = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(anchor, **keywords)
    behind = tokenizer.batch_decode([[*anchor, i] for i in wanted], **keywords)
    out = {}
    for i, text in zip(wanted, behind, strict=True):
        shown = text.removeprefix(before) if anchor and text.startswith(before) else tokenizer.decode([i], **keywords)
        out[i] = _bytes_of(tokenizer, i, shown) if REPLACEMENT in shown else shown
    return out


def _bytes_of(tokenizer: Any, number: int, shown: str) -> str:
    """The bytes of a byte-level token, spelled out; the tokenizer's own piece where it has no such bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    piece = tokenizer.convert_ids_to_tokens(number)
    if not isinstance(piece, str):
        return shown
    known = {character: byte for byte, character in bytes_to_unicode().items()}
    if all(character in known for character in piece):
        return "".join(f"<0x{known[character]:02X}>" for character in piece)
    return piece
