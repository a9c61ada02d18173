"""One HTML file that opens from disk: styles, scripts and data inside, nothing fetched, nothing of the data run.

A page is a template of ``templates/`` that extends ``base.html``, some of ``assets/``, and one JSON document. Scripts are
named to the browser by their hash and everything else is forbidden, so text of the data could not run even if it reached
the markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qtarget.core.errors import DataError

UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
"""Characters that could end a script element, start an entity or end a line of a script; JSON strings may escape them."""


def safe_json(value: Any) -> Markup:
    """JSON that may stand inside a ``<script type="application/json">``: ASCII, without ``<``, ``>`` and ``&``.

    Raises:
        DataError: a number is not finite (JSON has none; use None), or a value has no JSON form.

    Example:
        >>> print(safe_json({"text": "</script>"}))
        {"text":"\\u003c/script\\u003e"}
    """
    try:
        text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a report holds a value that JSON cannot ({error}); use numbers, text, lists or null"
        ) from error
    return Markup(text.translate(UNSAFE))


def finite(value: float | None) -> float | None:
    """The number, or None where JSON has no word for it."""
    return float(value) if value is not None and math.isfinite(value) else None


def pack_column(values: np.ndarray) -> dict[str, Any]:
    """An array as JSON: little-endian, deflated, base64; ``QT.unpack`` in ``base.js`` reads it, ``unpack_column`` here.

    Raises:
        DataError: a dtype that browsers have no typed array for.
    """
    if str(values.dtype) not in ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32"):
        raise DataError(f"a column is {values.dtype}; expected (u)int8, 16, 32 or float32")
    raw = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False)).tobytes()
    # without zlib's header: what browsers call "deflate-raw"
    deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = deflate.compress(raw) + deflate.flush()
    return {
        "dtype": str(values.dtype),
        "shape": list(values.shape),
        "encoding": "base64 of raw deflate, little-endian",
        "data": base64.b64encode(packed).decode(),
    }


def unpack_column(column: Mapping[str, Any]) -> np.ndarray:
    """The array that ``pack_column`` was given."""
    raw = zlib.decompress(base64.b64decode(column["data"]), -zlib.MAX_WBITS)
    return np.frombuffer(raw, np.dtype(column["dtype"]).newbyteorder("<")).reshape(column["shape"])


def asset(name: str) -> str:
    """The text of a file in ``assets/``."""
    return files("qtarget.report").joinpath("assets", name).read_text(encoding="utf-8")


def render_page(
    template: str,
    data: Any,
    *,
    title: str,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    **context: Any,
) -> str:
    """A whole HTML document.

    Args:
        template: name of a file in ``templates/`` that extends ``base.html``.
        data: what ``QT.data`` is in the page; anything that ``safe_json`` takes.
        title: of the page, any text.
        styles, scripts: names in ``assets/``, after ``base.css`` and ``base.js``.
        context: further values for the template, escaped by it.

    Returns:
        The document, ASCII-only where the data is concerned.

    Raises:
        DataError: see ``safe_json``.
    """
    environment = Environment(
        loader=PackageLoader("qtarget.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = "\n".join(asset(name) for name in ("base.js", *scripts))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        title=title,
        style=Markup("\n".join(asset(name) for name in ("base.css", *styles))),
        script=Markup(script),
        # styles of single elements are set by the scripts, and no hash could name those
        policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        data=safe_json(data),
        **context,
    )
