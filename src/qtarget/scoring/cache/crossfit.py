"""What a cross-fitted cache says of itself: the folds, the recipe, and the copies that judged the rows.

Rows are dealt into folds by prompt (`qtarget.data.crossfit.folds`). A copy of the base is trained for each fold on the rows of the
others, and judges the rows of its own: no row is judged by a model that has seen it, or its prompt.
"""

from __future__ import annotations

from typing import Any

KEYS: dict[str, type] = {
    "folds": int, "seed": int, "recipe": dict, "base_fingerprint": str, "rows": list, "split": str, "copies": list,
}  # fmt: skip
"""``folds`` and ``seed`` decide who judges whom, ``recipe`` how copies were trained, ``base_fingerprint`` from what; ``rows``
counts the distinct rows of each fold, ``split`` is a digest of who is in which, ``copies`` are the fingerprints."""


def check_crossfit(value: Any) -> None:
    """Make sure that what a manifest says of its cross-fit can be read, and does not contradict itself.

    Raises:
        ValueError: names the first entry that is wrong.

    Example:
        >>> check_crossfit(None)
    """
    if value is None:
        return
    if not isinstance(value, dict) or set(value) != set(KEYS):
        raise ValueError(f"crossfit is {value!r}, expected null or the keys {', '.join(KEYS)}")
    for key, kind in KEYS.items():
        if type(value[key]) is not kind:
            raise ValueError(f"crossfit has {key} {value[key]!r}, expected a {kind.__name__}")
    if value["folds"] < 2:
        raise ValueError(f"crossfit has {value['folds']} folds, expected at least 2")
    for key, kind in (("rows", int), ("copies", str)):
        if len(value[key]) != value["folds"] or not all(type(entry) is kind for entry in value[key]):
            raise ValueError(f"crossfit has {key} {value[key]!r}, expected a {kind.__name__} for each of its folds")
