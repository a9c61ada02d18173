"""Nested objects in Arrow: each row keeps its own keys, and nulls that Arrow added are taken out again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]

OBJECTS = ("messages", "prompt", "completion", "conversations", "tools", "documents", "chat_template_kwargs")
"""Columns whose objects reach the chat template, key by key."""
ENVELOPE = ("id", "type", "function", "name", "arguments", "index")
"""Keys of a call around its arguments: null is absent there."""
SILENT, KEPT = "keys where null is absent", "="


def rows_to_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """A ``datasets.Dataset`` in which every row has its own keys and nothing else.

    Arrow gives all objects of a column the same keys: ``{"city": "Oslo"}`` would become
    ``{"city": "Oslo", "miles": None}`` once another row has ``miles``, and the null would be trained. Here messages,
    tools, documents and ``chat_template_kwargs`` are kept as ``datasets.Json``.

    Args:
        rows: any columns; those absent in a row are None there, ``chat_template_kwargs`` an empty object.

    Raises:
        DataError: an object that JSON cannot hold (a key that is no text, a number that is not finite or an integer beyond
            64 bits), or a column that mixes types.

    Example:
        >>> calls = [[{"role": "assistant", "content": "", "x": {"city": "Oslo"}}], [{"role": "user", "content": "Hi"}]]
        >>> list(rows_to_dataset([{"messages": m} for m in calls])["messages"]) == calls
        True
    """
    from datasets import Dataset, Features, concatenate_datasets

    names = list(dict.fromkeys(name for row in rows for name in row))  # from_list would keep those of row 1 alone
    plain, objects, features = {}, {}, {}
    for name in names:
        values = [row.get(name) for row in rows]
        feature = _feature(name, values)
        if feature is None:
            plain[name] = _converted(name, values)
        else:
            objects[name] = [{} if v is None else v for v in values] if name == "chat_template_kwargs" else values
            features[name] = feature
    parts = [Dataset.from_dict(plain)] if plain else []
    parts += [Dataset.from_dict(objects, features=Features(features))] if objects else []
    whole = concatenate_datasets(parts, axis=1) if len(parts) > 1 else parts[0] if parts else Dataset.from_dict({})
    return whole.select_columns(names) if names else whole


def _feature(name: str, values: list[Any]) -> Any:
    """The feature that keeps a column's objects apart, or None where Arrow changes nothing."""
    from datasets import Json, List

    if name not in OBJECTS:
        return None
    kinds = {type(value) for value in values if value is not None}
    for i, value in enumerate(values):
        check_json(value, f"row {i + 1}: column {name!r}")
    if kinds == {dict}:
        return Json()
    elements = {type(item) for value in values if isinstance(value, list) for item in value}
    if kinds != {list} or elements != {dict} or (name not in ("tools", "documents") and _alike(values)):
        return None
    return List(Json())


def _alike(values: list[Any]) -> bool:
    """Whether all messages have the same keys, in one order, and text alone."""
    first = next((list(m) for value in values if value for m in value), [])
    return all(
        list(message) == first and all(type(item) is str for item in message.values())
        for value in values
        for message in value or ()
    )


def check_json(value: Any, where: str) -> None:
    """Raise for what JSON cannot hold as it is.

    Raises:
        DataError: a key that is no text, a number that is not finite, an integer beyond 64 bits, or another kind of object.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise DataError(
                    f"{where} has the key {key!r} ({type(key).__name__}); keys of objects are text, so write {str(key)!r}"
                )
            check_json(item, where)
    elif isinstance(value, list):
        for item in value:
            check_json(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where} holds {value}, which JSON has no word for; remove it, or write it as text")
    elif type(value) is int and not -(2**63) <= value < 2**64:
        raise DataError(f"{where} holds {value}, an integer beyond 64 bits; write it as text")
    elif value is not None and not isinstance(value, str | int | float):
        raise DataError(
            f"{where} holds a {type(value).__name__}; expected what JSON can hold: text, numbers, objects, lists"
        )


def _converted(name: str, values: list[Any]) -> list[Any]:
    """Values that Arrow has a type for; a note that mixes types becomes JSON text."""
    import json

    import pyarrow as pa

    try:
        pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        if name in TRAINED:
            raise _mixed_column(name, values, error) from error
        return [None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]
    return values


TRAINED = frozenset(
    {"input_ids", "labels", "prompt", "completion", "messages", "text", "weight", "loss_weights", "completion_mask"}
    | {"assistant_masks", "tools", "chat_template_kwargs"}
)
"""Columns that TRL or qtarget trains; all others are the user's notes."""


def _mixed_column(name: str, values: list[Any], error: Exception) -> DataError:
    import json

    from qtarget.data.files import excerpt

    index = _first_of_other_type(values)
    return DataError(
        f"row {index + 1}: column {name!r} holds {excerpt(json.dumps(values[index], default=str))}, of another type than "
        f"the rows above ({error}); give the column one type, or remove it"
    )


def _first_of_other_type(values: list[Any]) -> int:
    import pyarrow as pa

    low, high = 0, len(values)  # invariant: values[:low] converts, values[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            pa.array(values[:middle])
            low = middle
        except (pa.ArrowException, OverflowError):
            high = middle
    return high - 1


@dataclass
class _Keys:
    """What is known of the objects at one path: their number, and the values of each key."""

    objects: int = 0
    values: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def is_struct(feature: Any, beyond: Sequence[str] = ()) -> bool:
    """Whether a column is one of objects, or of lists of objects, with the keys of all rows, others than these."""
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, dict) and not (beyond and set(inner) <= set(beyond))


def as_written(dataset: Any) -> tuple[list[Row], list[str], int]:
    """The rows of a Dataset without the nulls that Arrow's structs forced on them.

    A key that is null in one object and holds a value in another of the same place is taken out where it is null: the
    row lacked it. Arrow does not tell that from a null that the user wrote, so the second result says where it happened.
    Message keys (``tool_calls``, ``name``) that are null mean the same as absent ones.

    Returns:
        Rows; a warning for each place where a null of the user's would be lost or one of Arrow's is kept; the number of
        nulls that were taken out.
    """
    columns = [name for name in OBJECTS if name in dataset.features and is_struct(dataset.features[name])]
    rows: list[Row] = [dict(row) for row in dataset]
    warnings: list[str] = []
    removed = 0
    for name in columns:
        feature, keys = dataset.features[name], defaultdict(_Keys)
        for row in rows:
            _count(row[name], feature, name, keys)
        taken: dict[str, int] = defaultdict(int)
        for row in rows:
            row[name] = _without(row[name], feature, name, keys, taken)
        removed += sum(count for path, count in taken.items() if path[0] != KEPT)
        warnings += _warnings(name, taken) + _numbers(name, keys)
    return rows, warnings, removed


def _warnings(column: str, taken: Mapping[str, int]) -> list[str]:
    """One sentence for the keys whose nulls were taken out, one for those whose nulls stay."""
    out = [path for path in taken if path[0] != KEPT and path != SILENT]
    kept = [path for path in taken if path[0] == KEPT]
    lines = []
    for paths, what, why in (
        (out, "taken out", "other rows have values there"),
        (kept, "kept", "no row has a value there"),
    ):
        if paths:
            named = ", ".join(path.lstrip(KEPT) for path in paths[:3]) + f" and {len(paths) - 3} more" * (
                len(paths) > 3
            )
            lines.append(
                f"column {column!r}: nulls of {named} were {what} ({sum(taken[p] for p in paths):,} objects), since {why}; "
                "Arrow gives all objects of a column the same keys, so a null that was written cannot be told from a key "
                "that was not there. qtarget.data.loading.rows_to_dataset(rows) or Dataset.from_list(rows, "
                "on_mixed_types='use_json') leave no doubt"
            )
    return lines


def _numbers(column: str, keys: Mapping[str, _Keys]) -> list[str]:
    """Arrow makes floats of integers where another row has a fraction; a template writes 3.0 for 3."""
    mixed = [
        path
        for path, found in keys.items()
        if not found.objects and found.values.get("whole") and found.values.get("fraction")
    ]
    mixed = [path for path in mixed if not _is_message(path.rpartition(".")[0])]
    if not mixed:
        return []
    return [
        f"column {column!r}: whole numbers of {', '.join(mixed[:3])} stand there as 3.0, since other rows have fractions; if "
        "they were integers, build the data set with qtarget.data.loading.rows_to_dataset(rows), or "
        "Dataset.from_list(rows, on_mixed_types='use_json')"
    ]


def _inner(feature: Any) -> Any:
    return getattr(feature, "feature", None)


def _count(value: Any, feature: Any, path: str, keys: dict[str, _Keys]) -> None:
    if isinstance(feature, dict) and isinstance(value, dict):
        keys[path].objects += 1
        for key, item in value.items():
            if item is not None:
                keys[path].values[key] += 1
                _count(item, feature[key], f"{path}.{key}", keys)
    elif isinstance(value, list) and _inner(feature) is not None:
        for item in value:
            _count(item, _inner(feature), f"{path}[]", keys)
    elif isinstance(value, float):
        keys[path].values["whole" if value.is_integer() else "fraction"] += 1


def _without(value: Any, feature: Any, path: str, keys: dict[str, _Keys], taken: dict[str, int]) -> Any:
    if isinstance(value, list) and _inner(feature) is not None:
        return [_without(item, _inner(feature), f"{path}[]", keys, taken) for item in value]
    if not isinstance(feature, dict) or not isinstance(value, dict):
        return value
    out = {}
    for key, item in value.items():
        if item is not None:
            out[key] = _without(item, feature[key], f"{path}.{key}", keys, taken)
        elif _is_message(path):
            if key == "content":
                out[key] = None
            else:
                taken[SILENT] += 1
        elif _is_envelope(path) and key in ENVELOPE:
            taken[SILENT] += 1
        elif keys[path].objects == 1:
            out[key] = None  # one object: nobody else can have brought the key
        elif keys[path].values[key]:
            taken[f"{path}.{key}"] += 1
        else:
            out[key] = None
            taken[f"{KEPT}{path}.{key}"] += 1
    return out


def _is_message(path: str) -> bool:
    return path in ("messages[]", "prompt[]", "completion[]", "conversations[]")


def _is_envelope(path: str) -> bool:
    return path.endswith((".tool_calls[]", ".tool_calls[].function", ".function_call", "tools[]", ".content[]"))
