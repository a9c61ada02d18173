"""The checker that jaxtyping's import hook puts around every core function: an ``int`` is a good ``float``."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
