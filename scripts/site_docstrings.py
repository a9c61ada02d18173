"""Docstrings as the site's parser reads them: it knows the section ``Examples``, and ours say ``Example``."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Called by mkdocstrings for every object (mkdocs.yml)."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
